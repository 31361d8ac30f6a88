"""The pool of worker processes of a sweep."""

import contextlib
import json
import math
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.sweep.cores import core_slots, search_path
from lwfedssl_jax.sweep.grid import SweepRun

LOGS = "logs"

Message = dict[str, Any]
HearRun = Callable[[SweepRun, Message], None]


class Worker:
    """A worker process, as seen from the process of the sweep.

    Attributes:
      at_work: the runs that it was given and that have not ended.
      begun: those of these that it has begun.
      group: the key of the runs that it was given last (``Pool``).
    """

    def __init__(
        self, number: int, request: Message, environment: Mapping[str, str], events: "queue.Queue[Any]"
    ) -> None:
        self.at_work: list[SweepRun] = []
        self.begun: list[SweepRun] = []
        self.group: Any = None
        self.log = Path(request["path"]) / LOGS / f"worker{number}{request['log']}.log"
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lwfedssl_jax.sweep.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                encoding="utf-8",
                env={**os.environ, "PYTHONPATH": search_path(), **environment},
                start_new_session=True,  # the sweep passes Ctrl-C on
            )
        self._say(request)
        threading.Thread(target=self._listen, args=(self._process.stdout, events), daemon=True).start()

    def give(self, runs: Sequence[SweepRun]) -> None:
        """Give the worker these runs to do next."""
        self.at_work, self.begun = list(runs), []
        self._say([run.directory for run in runs])

    def stop(self) -> None:
        """Ask the worker to save and exit."""
        self._process.terminate()

    def end(self) -> int:
        """Tell the worker that there are no more runs, and wait for it to exit."""
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        return self._process.wait()

    def _say(self, content: Any) -> None:
        with contextlib.suppress(OSError):  # it has died, which is noticed from its output
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()

    def _listen(self, output: IO[str], events: "queue.Queue[Any]") -> None:
        for line in output:
            events.put((self, json.loads(line)))
        events.put((self, {"event": "exit", "code": self._process.wait()}))


class Pool:
    """Executes runs in several workers.

    Args:
      request: what each worker receives first: ``path`` of the sweep's directory, ``sweep``, ``cache``, ``together``,
        ``log`` (what the names of its logs end in).
      groups: each run's key; runs of one are best done by one worker.
      jobs: how many workers there are.
      hear: called with what happens to each run (``event``: started, compiling, round, evaluation, finished, failed).
      claim: asked before a run is given to a worker whether it may be; if not, it is left out.
    """

    def __init__(
        self,
        request: Message,
        groups: Mapping[str, Any],
        jobs: int,
        hear: HearRun,
        claim: Callable[[SweepRun], bool] = lambda run: True,
    ) -> None:
        self._request, self._groups, self._hear, self._claim = request, groups, hear, claim
        self._events: queue.Queue[Any] = queue.Queue()
        self._jobs = jobs
        self._workers: dict[int, Worker] = {}
        self._suspects: set[str] = set()  # runs whose process ended once while others ran in it

    def run(self, runs: Sequence[SweepRun]) -> None:
        """Execute all runs, in order as far as groups allow.

        Raises:
          ConfigError: workers cannot run with the environment's settings.
          KeyboardInterrupt: on Ctrl-C or SIGTERM, after all workers have saved and ended.
          OSError: workers do not start.
        """
        waiting = list(runs)
        self._places = core_slots(min(self._jobs, len(waiting))) if waiting else []
        try:
            for number in range(len(self._places)):
                self._begin(number)
            while self._workers:
                with contextlib.suppress(queue.Empty):
                    worker, event = self._events.get(timeout=0.5)  # signals are handled between waits
                    self._handle(worker, event, waiting)
        except BaseException:
            for worker in self._workers.values():
                worker.stop()
            raise
        finally:
            for worker in self._workers.values():
                worker.end()

    def _begin(self, number: int) -> None:
        cores, environment = self._places[number]
        self._workers[number] = Worker(number, {**self._request, "cores": cores}, environment, self._events)

    def _handle(self, worker: Worker, event: Message, waiting: list[SweepRun]) -> None:
        number = next(n for n, w in self._workers.items() if w is worker)
        if event["event"] == "exit":
            del self._workers[number]
            worker.end()
            if not (worker.at_work or worker.group) and event["code"]:
                raise OSError(f"the workers did not start; their output is in {worker.log}")
            # If several ran together, it is unknown which one caused this: each is tried alone, once.
            blamed = worker.begun or worker.at_work[:1]
            if len(blamed) > 1:
                self._suspects |= {run.directory for run in blamed}
                blamed = []
            for run in blamed:
                why = f"its process ended with exit code {event['code']}; see {worker.log}"
                self._hear(run, {"event": "failed", "why": why})
            waiting[:0] = [run for run in worker.at_work if run not in blamed]
            if waiting:
                self._begin(number)
        elif event["event"] == "refused":
            raise ConfigError(event["why"])
        elif event["event"] == "ready":
            unit: list[SweepRun] = []
            while waiting and not unit:
                unit = [run for run in self._next_unit(worker, waiting, event["at_once"]) if self._claim(run)]
            if unit:
                worker.give(unit)
            else:
                worker.end()
        else:
            run = next(run for run in worker.at_work if run.directory == event["run"])
            if event["event"] == "started":
                worker.begun.append(run)
            if event["event"] in ("finished", "failed"):
                worker.at_work.remove(run)
                worker.begun.remove(run)
            self._hear(run, event)

    def _next_unit(self, worker: Worker, waiting: list[SweepRun], at_once: bool) -> list[SweepRun]:
        """Take waiting runs for a worker: of its group, or otherwise of the first group."""

        def members(group: Any) -> list[SweepRun]:
            return [run for run in waiting if self._groups[run.directory] == group]

        others = [other.group for other in self._workers.values() if other is not worker]
        if waiting and not members(worker.group):
            free = [run for run in waiting if self._groups[run.directory] not in others] or waiting
            worker.group = self._groups[free[0].directory]
        candidates = members(worker.group)
        if alone := [run for run in candidates if run.directory in self._suspects]:
            unit = alone[:1]
        else:
            groups = ({self._groups[run.directory] for run in waiting} | {*others}) - {None}
            sharers = max(1, len(self._places) // max(1, len(groups)))
            unit = candidates[: math.ceil(len(candidates) / sharers)] if at_once else candidates[:1]
        for run in unit:
            waiting.remove(run)
        return unit
