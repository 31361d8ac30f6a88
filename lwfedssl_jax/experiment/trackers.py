"""Trackers that send a run's numbers to TensorBoard and Weights & Biases."""

import contextlib
import importlib.metadata
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from lwfedssl_jax.analysis.results import all_results
from lwfedssl_jax.analysis.style import traffic_by_round
from lwfedssl_jax.config import Config, ConfigError, choose, flat, join_lists, to_dict
from lwfedssl_jax.config.protocols import LABEL_FREE
from lwfedssl_jax.evaluation.label_free import LabelFree
from lwfedssl_jax.simulation.events import Described, Evaluated, Event, Finished, Hear, Note, RoundDone, Started
from lwfedssl_jax.workdir import WorkDir


class Tracker(NamedTuple):
    """A destination for a run's numbers.

    Attributes:
      log: ``(step, {name: value})``; steps never decrease, and a step may be logged several times with other names.
      finish: ``({name: value})`` of the whole run, or None if it ends before its last round; called last.
    """

    log: Callable[[int, dict[str, float]], None]
    finish: Callable[[dict[str, float] | None], None]


def tensorboard(config: Config, directory: Path) -> Tracker:
    """Write event files to ``directory/tensorboard``; those from before an interruption are replaced.

    Raises:
      OSError: the folder cannot be written.
    """
    from tensorboardX import summary

    # Not tensorboardX's SummaryWriter, whose thread dies if the disk is full, after which the next call never returns.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    folder = directory / "tensorboard"
    folder.mkdir(exist_ok=True)
    for file in folder.glob("events.*"):
        file.unlink()
    writer = EventsWriter(str(folder / "events"))
    # A running TensorBoard then discards what it has read from them.
    writer.write_event(Event(wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)))
    last = 0

    def write(step: int, *summaries: Any) -> None:
        for content in summaries:
            writer.write_event(Event(wall_time=time.time(), step=step, summary=content))
        writer.flush()

    def log(step: int, values: dict[str, float]) -> None:
        nonlocal last
        last = step
        write(step, *(summary.scalar(name, value) for name, value in values.items()))

    def finish(values: dict[str, float] | None) -> None:
        try:
            if values:
                values = {f"summary/{name}": value for name, value in values.items()}
                log(last, values)
                write(last, *summary.hparams(join_lists(flat(to_dict(config))), values))
        finally:
            writer.close()

    return Tracker(log, finish)


def wandb(config: Config, directory: Path) -> Tracker:
    """Log to one run of Weights & Biases, with files in ``directory/wandb``; a continued run keeps logging to it.

    Environment variables set the destination: ``WANDB_MODE``, ``WANDB_PROJECT`` (lwfedssl_jax), ``WANDB_ENTITY``.

    Raises:
      Exception: whatever wandb raises, such as when it is not logged in or not reachable.
    """
    import wandb

    known = directory / "wandb" / "run_id"
    known.parent.mkdir(exist_ok=True)
    if not known.exists():
        known.write_text(secrets.token_hex(4), encoding="utf-8")
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "lwfedssl_jax"),
        name=directory.absolute().name,
        id=known.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(directory),
        config=to_dict(config),
        reinit="create_new",  # a process may have several
        settings=wandb.Settings(
            silent=True, console="off", disable_git=True, finish_timeout=60, finish_timeout_raises=True
        ),
    )
    first = run.starting_step  # those before are there

    def log(step: int, values: dict[str, float]) -> None:
        if step >= first:
            run.log(values, step=step)

    def finish(values: dict[str, float] | None) -> None:
        run.summary.update(values or {})
        run.finish(exit_code=1 if values is None else 0)

    return Tracker(log, finish)


TRACKERS: dict[str, Callable[[Config, Path], Tracker]] = {"tensorboard": tensorboard, "wandb": wandb}
EXTRAS = {"wandb"}  # packages, of the same name, that an extra of the same name installs


def check_trackers(config: Config) -> None:
    """Refuse trackers that do not exist or are not installed.

    Raises:
      ConfigError: naming what is accepted.
    """
    for name in config.runtime.trackers:
        choose("runtime.trackers", name, TRACKERS)
        if name in EXTRAS:
            try:
                importlib.metadata.version(name)  # not its module: wandb makes folders of that name
            except importlib.metadata.PackageNotFoundError:
                raise ConfigError(
                    f'runtime.trackers: {name} is not installed; accepted: pip install "lwfedssl_jax[{name}]", or '
                    f"{', '.join(t for t in TRACKERS if t not in EXTRAS)}"
                ) from None


class Tracking:
    """Passes the events of a run on to the trackers of ``runtime.trackers``; a context manager that owns them.

    Trackers are opened when the run starts, and are given what ``metrics.jsonl`` already contains. A tracker that
    fails is switched off from then on, with a note.

    Args:
      config: resolved and checked.
      workdir: the run's.
      hear: called with notes.
    """

    def __init__(self, config: Config, workdir: WorkDir, hear: Hear) -> None:
        self._config, self._workdir, self._hear = config, workdir, hear
        self._trackers: dict[str, Tracker] = {}
        self._summary: dict[str, float] | None = None
        self._step, self._traffic = 0, 0.0

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(self, *_: object) -> None:
        for name, tracker in self._trackers.items():
            try:
                tracker.finish(self._summary)
            except Exception as error:
                self._note_failure(name, error)

    def __call__(self, event: Event) -> None:
        """Receive an event of the run."""
        match event:
            case Started():
                self._open()
            case RoundDone(line) | Evaluated(line) | Described(line):
                self._log(line)
            case Finished(summary):
                self._summary = summary_values(summary) if self._trackers else None

    def _open(self) -> None:
        for name in dict.fromkeys(self._config.runtime.trackers):
            try:
                self._trackers[name] = TRACKERS[name](self._config, self._workdir.path)
            except Exception as error:  # of any kind: a tracker must not end a run
                self._note_failure(name, error)
        for line in self._workdir.metrics():
            self._log(dict(line))

    def _log(self, line: dict[str, Any]) -> None:
        self._step = max(self._step, line["round"])  # training from scratch, logged as round 0, is evaluated last
        values = line_values(line)
        if "event" not in line:
            self._traffic += traffic_by_round([line])[line["round"]]
            values["round/traffic_mib"] = self._traffic
        for name, tracker in [*self._trackers.items()]:
            try:
                tracker.log(self._step, values)
            except Exception as error:
                self._note_failure(name, error)
                del self._trackers[name]
                with contextlib.suppress(Exception):  # the failure has been reported
                    tracker.finish(None)

    def _note_failure(self, name: str, error: Exception) -> None:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        self._hear(Note(f"runtime.trackers: {name} failed and is switched off from here on ({what})"))


def line_values(line: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of ``metrics.jsonl`` by their names in trackers."""
    if line.get("protocol") == LABEL_FREE:
        prefix = f"{line['baseline']}/" if "baseline" in line else ""
        return {f"{prefix}{LABEL_FREE}/{name}": line[name] for name in get_type_hints(LabelFree)}
    if "event" in line:
        return {f"{line.get('baseline', 'evaluation')}/{line['protocol']}": line["accuracy"]}
    return {
        f"round/{name}": value for name, value in line.items() if name != "round" and isinstance(value, int | float)
    }


def summary_values(summary: dict[str, Any]) -> dict[str, float]:
    """Return the numbers by which runs are compared: accuracies, training time, and costs of one client."""
    scores = {"accuracy": all_results(summary), **summary["baselines"]}
    accuracies = {
        f"{of}/{name}": result["accuracy"] for of, results in scores.items() for name, result in results.items()
    }
    costs = ("total_bytes", "flops_paper_rule", "flops_executed", "peak_memory_bytes")
    spent = {name: value for name in costs if (value := summary["resources"][name]) is not None}
    return accuracies | {"seconds": summary["seconds"], **spent}
