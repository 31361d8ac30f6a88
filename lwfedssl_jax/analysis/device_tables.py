"""What a pilot's devices did: a table of measured beside predicted costs, and the events, in words."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from lwfedssl_jax.analysis.tables import Table
from lwfedssl_jax.analysis.wording import bytes_words
from lwfedssl_jax.workdir.metrics import PILOT_LINES, read_lines

EVENTS = {
    "joined": "{name} joined",
    "returned": "{name} returned",
    "left": "{name} left",
    "late": "{name} was late",
    "missing": "{name} had lost layers",
    "refused": "{name} was left out",
    "failed": "{name} did not answer",
    "waiting": "waiting for devices",
}


def device_table(directories: Mapping[str, Path]) -> Table | None:
    """Make the table of the devices of pilots: what they exchanged and needed in a round; None without any pilot.

    Args:
      directories: work directories, by the label of their setting.
    """
    rows, words = [], []
    for label, path in directories.items():
        measured = [line for line in read_lines(path, PILOT_LINES) if "measured" in line]
        for name in sorted({line["name"] for line in measured}):
            lines = [line for line in measured if line["name"] == name]
            rows.append({"setting": label} | device_row(name, lines))
            words.append({"setting": label} | device_words(rows[-1]))
    return Table("devices", pd.DataFrame(words), pd.DataFrame(rows)) if rows else None


def device_row(name: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a device's numbers: sums of bytes, medians of seconds over its rounds, and the most memory."""
    measured = [line["measured"] for line in lines]
    row: dict[str, Any] = {"device": name, "rounds": len(lines)}
    for predicted, payload in (("download", "payload_down"), ("upload", "payload_up")):
        row[payload] = sum(found[payload] for found in measured)
        row[f"predicted_{predicted}"] = sum(line["predicted"][predicted] for line in lines)
    row |= {key: median(found[key] for found in measured) for key in ("train_seconds", "message_seconds")}
    row["compile_seconds"] = sum(found["compile_seconds"] for found in measured)
    return row | {key: max(found[key] for found in measured) for key in ("peak_rss", "program_bytes")}


def device_words(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a device's numbers for readers."""

    def traffic(payload: str, predicted: str) -> str:
        return f"{bytes_words(row[payload])} ({row[payload] / max(row[predicted], 1):.3f}x)"

    return {
        "device": row["device"],
        "rounds": str(row["rounds"]),
        "downloaded (of predicted)": traffic("payload_down", "predicted_download"),
        "uploaded (of predicted)": traffic("payload_up", "predicted_upload"),
        "training, a round (s)": f"{row['train_seconds']:.3g}",
        "asked to answered, a round (s)": f"{row['message_seconds']:.3g}",
        "compiling, in all (s)": f"{row['compile_seconds']:.3g}",
        "program": bytes_words(row["program_bytes"]),
        "process, at most": bytes_words(row["peak_rss"]),
    }


def event_words(path: Path) -> Iterator[str]:
    """Describe the events of a pilot, in order."""
    for line in read_lines(path, PILOT_LINES):
        if form := EVENTS.get(line.get("event", "")):
            name = line.get("name") or "a device that is not known"
            what = form.format(name=name) + (f": {line['why']}" if line.get("why") else "")
            yield f"round {line['round']}: {what}" if line["round"] else what
