"""Reads runs from their work directories, and makes data frames of them."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lwfedssl_jax.analysis.wording import COSTS
from lwfedssl_jax.config import ConfigError, flat, from_dict, join_lists, to_dict
from lwfedssl_jax.config.protocols import protocol_on
from lwfedssl_jax.costs import fleet
from lwfedssl_jax.data.fingerprint import PARTS
from lwfedssl_jax.workdir.metrics import METRICS, read_lines

SEED, STRATEGY, END_TO_END = "runtime.seed", "strategy.name", "end_to_end"
# Fingerprints, as one text, of the clients' data set and of all evaluation.data; empty for runs older than them.
FINGERPRINT, EVALUATION_FINGERPRINT = "data.fingerprint", "evaluation.fingerprint"


class RunRecord(NamedTuple):
    """The content of a work directory, as far as it can be read.

    Attributes:
      path: the directory, which may not exist yet for a run of a sweep.
      config: ``{"section.field": value}``, lists as in JSON.
      about: the rest of ``config.json``: versions, device, lanes, the command.
      lines: the complete lines of ``metrics.jsonl``.
      summary: ``summary.json`` of a finished run, otherwise empty.
      fault: why the run is not finished, or an empty string.
      label: the name of the run's setting in its sweep, or an empty string.
    """

    path: Path
    config: dict[str, Any]
    about: dict[str, Any]
    lines: list[dict[str, Any]]
    summary: dict[str, Any]
    fault: str
    label: str


def load_results(*directories: str | Path) -> pd.DataFrame:
    """Read every run under the directories, at any depth, finished or not.

    Returns:
      A frame with one row per run. Its columns are ``path``, ``name``, ``finished``, ``fault`` (why it is not
      finished), ``label`` (of its setting in a sweep), ``config_file`` (hash of the user's own config file); every
      config field as ``section.field`` (a list as its values with spaces between), ``data.fingerprint`` and
      ``evaluation.fingerprint``;
      ``accuracy.PROTOCOL``, ``std.PROTOCOL`` over its draws, ``untrained.PROTOCOL`` and ``scratch.PROTOCOL``, all in
      [0, 1], also on ``evaluation.data`` by ``PROTOCOL@NAME``; ``label_free.effective_rank`` and so on, also as
      ``untrained.label_free.effective_rank``;
      ``traffic_bytes`` (per client, both directions, by the ledger), ``measured_bytes_per_client``,
      ``flops_paper_rule`` and ``flops_executed`` (multiply-adds per sample), ``peak_memory_bytes``, and the same
      four for end_to_end with this config as ``end_to_end.traffic_bytes`` and so on; ``rounds`` and ``seconds`` so
      far; of private runs ``epsilon`` (infinite without noise), ``delta``, ``noise_multiplier``, ``noise_over_clip``;
      ``membership_auc.trained`` and ``.untrained``. Unknown numbers are NaN.

    Raises:
      ConfigError: a directory does not exist, cannot be read or contains no run.
    """
    return frame(find_runs(directories))


def load_metrics(*directories: str | Path) -> pd.DataFrame:
    """Read ``metrics.jsonl`` of the runs under the directories: one row per line, with the run's ``path``.

    Raises:
      ConfigError: as ``load_results``.
    """
    return pd.DataFrame([{"path": str(run.path)} | line for run in find_runs(directories) for line in run.lines])


def find_runs(directories: Sequence[str | Path]) -> list[RunRecord]:
    """Read the runs under the directories, each once, in the order of their paths.

    Runs of a sweep come in the sweep's order, and only those that ``sweep.json`` lists.

    Raises:
      ConfigError: as ``load_results``.
    """
    runs: dict[Path, RunRecord] = {}
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise ConfigError(f"DIR: {directory} is not a directory; accepted: a run's work directory, or one above it")
        found = list(_runs_under(directory))
        if not found:
            raise ConfigError(f"DIR: {directory} contains no run; accepted: a run's work directory, or one above it")
        for run in found:
            runs.setdefault(run.path.resolve(), run)
    return list(runs.values())


def _runs_under(directory: Path) -> Iterator[RunRecord]:
    listed: dict[Path, tuple[str, str, dict[str, Any]]] = {}
    paths = []
    try:
        for place, folders, files in os.walk(directory, onerror=_raise):
            folders.sort()
            if "sweep.json" in files and (sweep := _read_sweep(Path(place))):
                listed |= sweep
                folders.clear()  # directories left by an earlier version of the sweep do not count
            elif {"config.json", METRICS} & set(files) and (run := read_run(Path(place))):
                paths.append(run.path)
                folders.clear()
        for path in [*listed, *(p for p in paths if p not in listed)]:
            label, failed, overrides = listed.get(path, ("", "", {}))
            found = read_run(path) or RunRecord(path, overrides, {}, [], {}, "not started", "")
            yield found._replace(label=label, fault=(found.fault and failed) or found.fault)
    except OSError as error:
        raise ConfigError(
            f"DIR: {error.filename} cannot be read ({error.strerror}); accepted: a directory you can read"
        ) from error


def _raise(error: OSError) -> None:
    raise error


def _read_sweep(place: Path) -> dict[Path, tuple[str, str, dict[str, Any]]]:
    """Read the label, failure and overrides of each run of a sweep; empty if ``sweep.json`` is damaged."""
    content = _read_json(place / "sweep.json")
    try:
        return {
            place / run["directory"]: (
                str(run.get("label", "")),
                str(content.get("failed", {}).get(run["directory"], "")),
                dict(run.get("overrides", {})) | {SEED: run["seed"]},
            )
            for run in content.get("runs", [])
        }
    except (AttributeError, KeyError, TypeError, ValueError):
        return {}


def sweep_name(directory: Path) -> str:
    """Return the name of the sweep stored in this directory, or an empty string."""
    return str(_read_json(directory / "sweep.json").get("name", ""))


def sweep_base(directory: Path) -> str:
    """Return the config that ``--base`` named for the sweep stored in this directory, or an empty string."""
    return str(_read_json(directory / "sweep.json").get("base", ""))


def read_run(path: Path) -> RunRecord | None:
    """Read the run in a work directory; None if the directory contains none."""
    entries, summary = _read_json(path / "config.json"), _read_json(path / "summary.json")
    config = entries.pop("config", None)
    try:
        known = flat(to_dict(from_dict(config)))  # with today's fields, even if the run is older than a field
        fields = {name: _plain(value) for name, value in (known | flat(config)).items()}
        fields |= fingerprints(entries.get("data"))
    except (AttributeError, TypeError):
        if not (path / METRICS).is_file():
            return None  # another program's config.json
        what = "is damaged" if (path / "config.json").exists() else "is missing"
        return RunRecord(path, {}, {}, [], {}, f"config.json {what}", "")
    run = RunRecord(path, fields, entries, [], summary, "", "")
    try:
        run = run._replace(lines=[line for line in read_lines(path) if _is_usable(line)])
    except OSError as error:
        return run._replace(summary={}, fault=f"{METRICS} cannot be read ({error.strerror})")
    if not (path / "summary.json").is_file():
        done, total = _count_rounds(run), fields.get("federation.rounds")
        reached = f"all {total} rounds, without its summary" if done == total else f"{done} of {total} rounds"
        return run._replace(fault=f"unfinished after {reached}")
    try:
        _summary_columns(run)
    except (AttributeError, KeyError, TypeError, ValueError):
        return run._replace(summary={}, fault="summary.json is damaged")
    return run


def fingerprints(data: Any) -> dict[str, str]:
    """Return the two fingerprints of a run from the ``data`` of ``config.json``."""
    known = {str(name): str(value) for name, value in data.items()} if isinstance(data, dict) else {}
    return {
        FINGERPRINT: " ".join(known[part] for part in PARTS if part in known),
        EVALUATION_FINGERPRINT: " ".join(known[name] for name in sorted(known) if name not in PARTS),
    }


def _plain(value: Any) -> Any:
    """Return a field's value if ``config.to_dict`` could have produced it, otherwise its text."""
    return value if isinstance(value, str | int | float | list | None) else str(value)


def _is_usable(line: dict[str, Any]) -> bool:
    """Return whether a line has the entries that the analysis needs, in the form in which ``train`` writes them."""
    if not isinstance(line["round"], int):
        return False
    if "event" in line:
        scored = isinstance(line.get("accuracy"), int | float) or "effective_rank" in line
        return scored and isinstance(line.get("protocol"), str)
    return "stage" in line and isinstance(line.get("loss"), int | float | None)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _count_rounds(run: RunRecord) -> int:
    return sum("event" not in line for line in run.lines)


def frame(runs: Sequence[RunRecord]) -> pd.DataFrame:
    """Make a frame with one row per run; its columns are those of ``load_results``."""
    rows = []
    for run in runs:
        seconds = [line["seconds"] for line in run.lines if isinstance(line.get("seconds"), int | float)]
        rows.append(
            {
                "path": str(run.path),
                "name": run.path.resolve().name,
                "finished": not run.fault,
                "fault": run.fault,
                "label": run.label,
                "config_file": str(run.about.get("config_file", "")),
                **join_lists(run.config),
                **{cost: float("nan") for cost in COSTS},
                "measured_bytes_per_client": float("nan"),
                "rounds": _count_rounds(run),
                "seconds": sum(seconds),
                **({} if run.fault else _summary_columns(run)),
            }
        )
    return pd.DataFrame(rows)


def _summary_columns(run: RunRecord) -> dict[str, float]:
    """Return the columns that come from the summary.

    Raises:
      AttributeError, KeyError, TypeError, ValueError: the summary is damaged.
    """
    summary = run.summary
    measured = summary["resources"]["measured"]
    ledgers = {name: ledger_costs(ledger, f"{name}.") for name, ledger in summary["strategies"].items()}
    found = {
        "rounds": float(summary["rounds"]),
        "seconds": float(summary["seconds"]),
        "measured_bytes_per_client": (measured["download_bytes"] + measured["upload_bytes"]) / measured["clients"],
        **ledger_costs(summary["resources"]),
        **ledgers.get(END_TO_END, {}),
    }
    for protocol, result in all_results(summary).items():
        found[f"accuracy.{protocol}"] = float(result["accuracy"])
        found[f"std.{protocol}"] = float(result.get("std", "nan"))
    for which, metrics in summary.get("label_free", {}).items():
        prefix = "" if which == "trained" else f"{which}."
        found |= {f"{prefix}label_free.{name}": float(value) for name, value in metrics.items()}
    fleet.participation_rows(summary)  # raises if the entry is damaged
    for encoder, attacked in summary.get("membership", {}).items():
        found[f"membership_auc.{encoder}"] = float(attacked["auc"])
    if promise := summary.get("privacy"):
        found["epsilon"] = float("inf" if promise["epsilon"] is None else promise["epsilon"])
        found["delta"] = float(promise["delta"])
        found["noise_multiplier"] = float(promise["noise_multiplier"])
        found["noise_over_clip"] = max(float(stage["noise_over_clip"]) for stage in promise["per_stage"])
    for baseline, results in summary["baselines"].items():
        found |= {f"{baseline}.{protocol}": float(result["accuracy"]) for protocol, result in results.items()}
    return found


def all_results(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trained encoder's results by protocol, those on ``evaluation.data`` by ``PROTOCOL@NAME``."""
    on_others = {
        protocol_on(protocol, name): result
        for name, by_protocol in summary.get("transfer", {}).items()
        for protocol, result in by_protocol.items()
    }
    return summary["evaluation"] | on_others


def ledger_costs(ledger: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return a ledger's totals by the names in ``COSTS``, each with ``prefix``; NaN if unknown."""
    values = (ledger.get(key) for key in ("total_bytes", *COSTS[1:]))
    return {prefix + cost: float("nan") if v is None else float(v) for cost, v in zip(COSTS, values, strict=True)}
