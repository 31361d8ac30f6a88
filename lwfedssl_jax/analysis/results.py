"""Runs read back from their work directories: frames, settings, means over seeds, paired comparisons."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lwfedssl_jax.config import ConfigError, flat, from_dict, to_dict
from lwfedssl_jax.costs import fleet
from lwfedssl_jax.workdir.metrics import METRICS, read_lines

if TYPE_CHECKING:
    import pandas as pd


SEED, STRATEGY, END_TO_END = "runtime.seed", "strategy.name", "end_to_end"
COSTS = ("traffic_bytes", "flops_paper_rule", "flops_executed", "peak_memory_bytes")


class RunRecord(NamedTuple):
    """What a work directory holds, as far as it can be read.

    Attributes:
      path: the directory, which may not be there for a run of a sweep.
      config: ``{"section.field": value}``, lists as in JSON.
      about: the rest of ``config.json``: versions, device, lanes, the command.
      lines: the whole lines of ``metrics.jsonl``.
      summary: of a finished run; else empty.
      fault: why the run is not finished; empty where it is.
      label: its setting's name in the sweep, if it is of one.
    """

    path: Path
    config: dict[str, Any]
    about: dict[str, Any]
    lines: list[dict[str, Any]]
    summary: dict[str, Any]
    fault: str
    label: str


def load_results(*directories: str | Path) -> "pd.DataFrame":
    """One row for each run under the directories, at any depth, finished or not.

    Returns:
      ``path``, ``name``, ``finished``, ``fault`` (why not), ``label`` (in a sweep), ``config_file`` (hash of the
      user's own), every config field as ``section.field`` (lists as words with spaces between), ``accuracy.PROTOCOL``
      with ``std.PROTOCOL`` over its draws, ``untrained.PROTOCOL`` and ``scratch.PROTOCOL``, in [0, 1];
      ``traffic_bytes`` (a client's, both directions, by the ledger), ``measured_bytes_per_client``,
      ``flops_paper_rule``, ``flops_executed`` (of a sample), ``peak_memory_bytes``, and the same of end_to_end with
      this config as ``end_to_end.traffic_bytes`` and so on; ``rounds`` and ``seconds`` so far. NaN where not known.

    Raises:
      ConfigError: a directory does not exist, cannot be read or holds no run.
    """
    return frame(find_runs(directories))


def load_metrics(*directories: str | Path) -> "pd.DataFrame":
    """One row for each line of ``metrics.jsonl`` of the runs under the directories, with the run's ``path``.

    Raises:
      ConfigError: as ``load_results``.
    """
    import pandas as pd

    return pd.DataFrame([{"path": str(run.path)} | line for run in find_runs(directories) for line in run.lines])


def find_runs(directories: Sequence[str | Path]) -> list[RunRecord]:
    """The runs under the directories, each once: by its place, a sweep's in its order, of these the listed ones alone.

    Raises:
      ConfigError: as ``load_results``.
    """
    runs: dict[Path, RunRecord] = {}
    for directory in map(Path, directories):
        if not directory.is_dir():
            raise ConfigError(f"DIR: {directory} is no directory; accepted: a run's work directory, or one above it")
        found = list(_runs_under(directory))
        if not found:
            raise ConfigError(f"DIR: {directory} holds no run; accepted: a run's work directory, or one above it")
        for run in found:
            runs.setdefault(run.path.resolve(), run)
    return list(runs.values())


def _runs_under(directory: Path) -> Iterator[RunRecord]:
    listed: dict[Path, tuple[str, str, dict[str, Any]]] = {}
    paths = []
    try:
        for place, folders, files in os.walk(directory, onerror=_raise):
            folders.sort()
            if "sweep.json" in files and (sweep := _sweep(Path(place))):
                listed |= sweep
                folders.clear()  # what an earlier form of the sweep has left there counts no longer
            elif "config.json" in files and (run := read_run(Path(place))):
                paths.append(run.path)
                folders.clear()
        for path in [*listed, *(p for p in paths if p not in listed)]:
            label, failed, overrides = listed.get(path, ("", "", {}))
            found = read_run(path) or RunRecord(path, overrides, {}, [], {}, "not begun", "")
            yield found._replace(label=label, fault=(found.fault and failed) or found.fault)
    except OSError as error:
        raise ConfigError(
            f"DIR: {error.filename} cannot be read ({error.strerror}); accepted: a directory you can read"
        ) from error


def _raise(error: OSError) -> None:
    raise error


def _sweep(place: Path) -> dict[Path, tuple[str, str, dict[str, Any]]]:
    """Label, why it failed, and overrides of a sweep's runs; none where ``sweep.json`` is damaged."""
    content = _json(place / "sweep.json")
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
    """The name of the sweep whose directory it is; empty where it is none's."""
    return str(_json(directory / "sweep.json").get("name", ""))


def read_run(path: Path) -> RunRecord | None:
    """The run in a work directory; None where the directory holds none."""
    entries, summary = _json(path / "config.json"), _json(path / "summary.json")
    config = entries.pop("config", None)
    try:
        known = flat(to_dict(from_dict(config)))  # with today's fields, also where the run is older than they are
        fields = {name: _plain(value) for name, value in (known | flat(config)).items()}
    except (AttributeError, TypeError):
        if not (path / METRICS).is_file():
            return None  # another program's config.json
        return RunRecord(path, {}, {}, [], {}, "config.json is damaged", "")
    run = RunRecord(path, fields, entries, [], summary, "", "")
    try:
        run = run._replace(lines=[line for line in read_lines(path) if _is_usable(line)])
    except OSError as error:
        return run._replace(summary={}, fault=f"{METRICS} cannot be read ({error.strerror})")
    if not (path / "summary.json").is_file():
        done, of = _rounds(run), fields.get("federation.rounds")
        so_far = f"after all {of} rounds, without its summary" if done == of else f"after {done} of {of} rounds"
        return run._replace(fault=f"unfinished {so_far}")
    try:
        _summarised(run)
    except (AttributeError, KeyError, TypeError, ValueError):
        return run._replace(summary={}, fault="summary.json is damaged")
    return run


def _plain(value: Any) -> Any:
    """A field's value as ``config.to_dict`` gives it; what is none becomes words."""
    return value if isinstance(value, str | int | float | list | None) else str(value)


def _is_usable(line: dict[str, Any]) -> bool:
    """Whether a line is as ``train`` writes it, as far as anybody here relies on it."""
    if not isinstance(line["round"], int):
        return False
    if "event" in line:
        return isinstance(line.get("accuracy"), int | float) and isinstance(line.get("protocol"), str)
    return "stage" in line and isinstance(line.get("loss"), int | float | None)


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _rounds(run: RunRecord) -> int:
    return sum("event" not in line for line in run.lines)


def frame(runs: Sequence[RunRecord]) -> "pd.DataFrame":
    """See ``load_results``."""
    import pandas as pd

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
                **{k: " ".join(map(str, v)) if isinstance(v, list | tuple) else v for k, v in run.config.items()},
                **{cost: float("nan") for cost in COSTS},
                "measured_bytes_per_client": float("nan"),
                "rounds": _rounds(run),
                "seconds": sum(seconds),
                **({} if run.fault else _summarised(run)),
            }
        )
    return pd.DataFrame(rows)


def _summarised(run: RunRecord) -> dict[str, float]:
    """The columns that come from the summary; raises whatever a damaged one makes of it."""
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
    for protocol, result in summary["evaluation"].items():
        found[f"accuracy.{protocol}"] = float(result["accuracy"])
        found[f"std.{protocol}"] = float(result.get("std", "nan"))
    fleet.participation_rows(summary)
    for baseline, results in summary["baselines"].items():
        found |= {f"{baseline}.{protocol}": float(result["accuracy"]) for protocol, result in results.items()}
    return found


def ledger_costs(ledger: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """A ledger's totals under the names of ``COSTS``; NaN where not known."""
    values = (ledger.get(key) for key in ("total_bytes", *COSTS[1:]))
    return {prefix + cost: float("nan") if v is None else float(v) for cost, v in zip(COSTS, values, strict=True)}
