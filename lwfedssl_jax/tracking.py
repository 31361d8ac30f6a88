"""A run's trackers hear what its work directory is told."""

import contextlib
from typing import Any

from lwfedssl_jax.config import Config
from lwfedssl_jax.report import traffic_by_round
from lwfedssl_jax.simulate import Listener, Run
from lwfedssl_jax.stages import Stage
from lwfedssl_jax.trackers import TRACKERS, Tracker
from lwfedssl_jax.workdir import WorkDir


class Tracking(Listener):
    """Passes on all it hears; a context manager that owns ``runtime.trackers``.

    Trackers are opened when the run starts, and given what ``metrics.jsonl`` holds already. One that fails is left
    out from there on, and the listener told.

    Args:
      config: resolved and checked.
      workdir: the run's; without one nothing is tracked.
      listener: hears everything too.
    """

    def __init__(self, config: Config, workdir: WorkDir | None, listener: Listener) -> None:
        self._config, self._workdir, self._listener = config, workdir, listener
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
                self._say_failed(name, error)

    def start(self, run: Run, finished_rounds: int) -> None:
        self._listener.start(run, finished_rounds)
        if not (self._workdir and self._config.runtime.trackers):
            return
        for name in dict.fromkeys(self._config.runtime.trackers):
            try:
                self._trackers[name] = TRACKERS[name](self._config, self._workdir.path)
            except Exception as error:  # of any kind: no run is to end for its trackers
                self._say_failed(name, error)
        for line in self._workdir.metrics():
            self._log(line)

    def round(self, line: dict[str, Any]) -> None:
        self._listener.round(line)
        self._log(line)

    def evaluation(self, line: dict[str, Any]) -> None:
        self._listener.evaluation(line)
        self._log(line)

    def finished(self, summary: dict[str, Any]) -> None:
        self._listener.finished(summary)
        self._summary = summary_values(summary) if self._trackers else None

    def loading(self, what: str) -> None:
        self._listener.loading(what)

    def note(self, what: str) -> None:
        self._listener.note(what)

    def compiling(self, what: str) -> None:
        self._listener.compiling(what)

    def stage(self, stage: Stage) -> None:
        self._listener.stage(stage)

    def steps(self, round_number: int, done: int, total: int) -> None:
        self._listener.steps(round_number, done, total)

    def fine_tuning(self, what: str) -> None:
        self._listener.fine_tuning(what)

    def _log(self, line: dict[str, Any]) -> None:
        self._step = max(self._step, line["round"])  # training from scratch, a round 0, is judged last
        values = line_values(line)
        if "event" not in line:
            self._traffic += traffic_by_round([line])[line["round"]]
            values["round/traffic_mib"] = self._traffic
        for name, tracker in [*self._trackers.items()]:
            try:
                tracker.log(self._step, values)
            except Exception as error:
                self._say_failed(name, error)
                del self._trackers[name]
                with contextlib.suppress(Exception):  # it has been said
                    tracker.finish(None)

    def _say_failed(self, name: str, error: Exception) -> None:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        self._listener.note(f"runtime.trackers: {name} failed and is left out from here on ({what})")


def line_values(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line of ``metrics.jsonl`` by the names they have in trackers."""
    if "event" in line:
        return {f"{line.get('baseline', 'evaluation')}/{line['protocol']}": line["accuracy"]}
    return {f"round/{name}": value for name, value in line.items() if name != "round" and value is not None}


def summary_values(summary: dict[str, Any]) -> dict[str, float]:
    """What one compares runs by: accuracies, seconds of training, and what one client spends."""
    judged = {"accuracy": summary["evaluation"], **summary["baselines"]}
    accuracies = {
        f"{of}/{name}": result["accuracy"] for of, results in judged.items() for name, result in results.items()
    }
    costs = ("total_bytes", "flops_paper_rule", "flops_executed", "peak_memory_bytes")
    spent = {name: value for name in costs if (value := summary["resources"][name]) is not None}
    return accuracies | {"seconds": summary["seconds"], **spent}
