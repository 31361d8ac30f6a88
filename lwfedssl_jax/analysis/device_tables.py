"""What a pilot's devices did: tables of measured beside predicted costs, and the events, in words."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pandas as pd

from lwfedssl_jax.analysis.tables import Table
from lwfedssl_jax.analysis.wording import bytes_words, event_sentence
from lwfedssl_jax.workdir.metrics import read_pilot


class Ratio(NamedTuple):
    """A measured quantity and what it is compared with, by their names in ``pilot.jsonl``."""

    words: str
    measured: str
    predicted: str


RATIOS = (
    Ratio("download, parameters", "payload_down", "download"),
    Ratio("download, on the wire", "wire_down", "download"),
    Ratio("upload, parameters", "payload_up", "upload"),
    Ratio("upload, on the wire", "wire_up", "upload"),
    Ratio("training time", "train_seconds", "seconds"),
    Ratio("memory of the program", "program_bytes", "memory"),
)


def measured_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of ``pilot.jsonl`` with measurements, one for each device and round."""
    return [line for line in read_pilot(path) if "measured" in line]


def device_table(directories: Mapping[str, Path]) -> Table | None:
    """Make the table of the devices of pilots: what they exchanged and needed in a round; None without any pilot.

    Args:
      directories: work directories, by the label of their setting.
    """
    rows, words = [], []
    for label, path in directories.items():
        measured = measured_lines(path)
        for name in sorted({line["name"] for line in measured}):
            lines = [line for line in measured if line["name"] == name]
            rows.append({"setting": label} | device_row(name, lines))
            words.append({"setting": label} | device_words(rows[-1]))
    return Table("devices", pd.DataFrame(words), pd.DataFrame(rows)) if rows else None


def device_row(name: str, lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a device's numbers: sums of bytes, medians of seconds over its rounds, and the most memory.

    What is known of some rounds only is compared with what was predicted for these.
    """
    measured = [line["measured"] for line in lines]
    row: dict[str, Any] = {"device": name, "rounds": len(lines)}
    for ratio in RATIOS[:4]:
        row[ratio.measured] = sum(found.get(ratio.measured) or 0 for found in measured)
        row[f"{ratio.measured}_of_predicted"] = of_sums(lines, ratio)
    row["polling_bytes"] = sum(found.get("polling_bytes") or 0 for found in measured)
    row |= {key: median(found[key] for found in measured) for key in ("train_seconds", "message_seconds")}
    row["train_seconds_of_predicted"] = middle(ratios(lines, RATIOS[4]))
    row["compile_seconds"] = sum(found["compile_seconds"] for found in measured)
    row |= {key: max(found[key] for found in measured) for key in ("peak_rss", "program_bytes")}
    return row | {"step_bytes": max(line["predicted"].get("memory") or 0 for line in lines)}


def ratios(lines: Sequence[Mapping[str, Any]], ratio: Ratio) -> list[float]:
    """Return measured over predicted of each line that has both."""
    pairs = [(line["measured"].get(ratio.measured), line["predicted"].get(ratio.predicted)) for line in lines]
    return [measured / predicted for measured, predicted in pairs if measured is not None and predicted]


def of_sums(lines: Sequence[Mapping[str, Any]], ratio: Ratio) -> float | None:
    """Return the sum of what was measured over the sum of what was predicted for the same rounds; None without any."""
    known = [line for line in lines if line["measured"].get(ratio.measured) is not None]
    predicted = sum(line["predicted"][ratio.predicted] for line in known)
    return sum(line["measured"][ratio.measured] for line in known) / predicted if predicted else None


def middle(values: Sequence[float]) -> float | None:
    """Return the median; None without any value."""
    return median(values) if values else None


def device_words(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a device's numbers for readers."""

    def traffic(payload: str, wire: str) -> str:
        on_wire = row[f"{wire}_of_predicted"]
        known = "not known" if on_wire is None else f"{on_wire:.3f}x"
        return f"{bytes_words(row[payload])} ({row[f'{payload}_of_predicted'] or 0:.3f}x; {known})"

    seconds = row["train_seconds_of_predicted"]
    return {
        "device": row["device"],
        "rounds": str(row["rounds"]),
        "downloaded (of predicted; on the wire)": traffic("payload_down", "wire_down"),
        "uploaded (of predicted; on the wire)": traffic("payload_up", "wire_up"),
        "polls and confirmations": bytes_words(row["polling_bytes"]),
        "training per round (of predicted)": f"{row['train_seconds']:.3g} s"
        + ("" if seconds is None else f" ({seconds:.2f}x)"),
        "from request to answer, per round (s)": f"{row['message_seconds']:.3g}",
        "compiling, all rounds (s)": f"{row['compile_seconds']:.3g}",
        "program (step predicted)": f"{bytes_words(row['program_bytes'])} ({bytes_words(row['step_bytes'])})",
        "process, at most": bytes_words(row["peak_rss"]),
    }


def stage_table(directories: Mapping[str, Path]) -> Table | None:
    """Make the table of measured over predicted by stage, over all devices and rounds; None without any pilot."""
    rows, words = [], []
    for label, path in directories.items():
        for stage, lines in by_stage(measured_lines(path)).items():
            row: dict[str, Any] = {"setting": label, "stage": stage, "updates": len(lines)}
            said = {key: str(value) for key, value in row.items()}
            for ratio in RATIOS:
                values = ratios(lines, ratio)
                of = f"{ratio.measured}_of_predicted"
                row |= {f"{of}_{name}": f(values) if values else None for name, f in SPREAD.items()}
                said[ratio.words] = ratio_words(values)
            rows.append(row)
            words.append(said)
    return Table("device_stages", pd.DataFrame(words), pd.DataFrame(rows)) if rows else None


SPREAD: dict[str, Callable[[Sequence[float]], float]] = {"median": median, "min": min, "max": max}


def by_stage(lines: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Return lines by their stage, in order."""
    return {stage: [x for x in lines if x["stage"] == stage] for stage in sorted({x["stage"] for x in lines})}


def ratio_words(values: Sequence[float]) -> str:
    """Return a median and its range if there is one, such as "1.050 (1.010 to 1.200)"."""
    if not values:
        return "not known"
    middle, low, high = (f"{x:.3f}" for x in (median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def event_words(path: Path) -> Iterator[str]:
    """Describe the events of a pilot, in order."""
    for line in read_pilot(path):
        if what := event_sentence(line):
            yield f"round {line['round']}: {what}" if line["round"] else what
