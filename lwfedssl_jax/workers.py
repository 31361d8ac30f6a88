"""The processes that do a sweep's runs, one line of JSON for each thing that happens.

A worker keeps data sets and programs from run to run (``Shared``). It is a process of its own, so that a run
that crashes takes nothing with it, and so that cores and accelerators can be split.
"""

import contextlib
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.errors import foreseen
from lwfedssl_jax.sweep import SweepRun

LOGS = "logs"
PATIENCE = 120.0  # seconds for a worker of a sweep that was killed to save and end
Event = dict[str, Any]
Hear = Callable[[SweepRun, Event], None]


class Worker:
    """A worker as the sweep's process sees it.

    Attributes:
      at_work: the runs it has been given and has not ended.
      begun: those of them that it has begun.
      group: what runs of the last unit had in common (``Pool``).
    """

    def __init__(self, number: int, request: Event, environment: Mapping[str, str], events: "queue.Queue[Any]") -> None:
        self.at_work: list[SweepRun] = []
        self.begun: list[SweepRun] = []
        self.group: Any = None
        self.log = Path(request["path"]) / LOGS / f"worker{number}.log"
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": search_path(), **environment},
                start_new_session=True,  # Ctrl-C is the sweep's to pass on
            )
        self._say(request)
        threading.Thread(target=self._listen, args=(self._process.stdout, events), daemon=True).start()

    def give(self, runs: Sequence[SweepRun]) -> None:
        """Have it do these runs next."""
        self.at_work, self.begun = list(runs), []
        self._say([run.directory for run in runs])

    def stop(self) -> None:
        """Have it save and end."""
        self._process.terminate()

    def end(self) -> int:
        """No more runs; waits for it."""
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        return self._process.wait()

    def _say(self, content: Any) -> None:
        with contextlib.suppress(OSError):  # it has died: that is heard from its output
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(content) + "\n")
            self._process.stdin.flush()

    def _listen(self, output: IO[str], events: "queue.Queue[Any]") -> None:
        for line in output:
            events.put((self, json.loads(line)))
        events.put((self, {"event": "exit", "code": self._process.wait()}))


class Pool:
    """Does runs in several workers.

    Args:
      request: what each worker is told first: ``path`` of the sweep's directory, ``sweep``, ``cache``, ``together``.
      groups: each run's key; runs of one are best done by one worker.
      jobs: how many workers there are.
      hear: told what happens to each run (``event``: started, compiling, round, evaluation, finished or failed).
    """

    def __init__(self, request: Event, groups: Mapping[str, Any], jobs: int, hear: Hear) -> None:
        self._request, self._groups, self._hear = request, groups, hear
        self._events: queue.Queue[Any] = queue.Queue()
        self._jobs = jobs
        self._workers: dict[int, Worker] = {}
        self._suspects: set[str] = set()  # runs whose process has ended once while others ran beside them

    def run(self, runs: Sequence[SweepRun]) -> None:
        """All of them, in order as far as groups allow.

        Raises:
          KeyboardInterrupt: on Ctrl-C or SIGTERM, after all workers have saved and ended.
          OSError: workers do not start.
        """
        waiting = list(runs)
        self._places = places(min(self._jobs, len(waiting))) if waiting else []
        try:
            for number in range(len(self._places)):
                self._begin(number)
            while self._workers:
                with contextlib.suppress(queue.Empty):
                    worker, event = self._events.get(timeout=0.5)  # a signal is heard between waits
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

    def _handle(self, worker: Worker, event: Event, waiting: list[SweepRun]) -> None:
        number = next(n for n, w in self._workers.items() if w is worker)
        if event["event"] == "exit":
            del self._workers[number]
            worker.end()
            if not (worker.at_work or worker.group) and event["code"]:
                raise OSError(f"workers do not start; what they say is in {worker.log}")
            # Of several side by side nobody knows which was it: each is tried alone, once.
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
        elif event["event"] == "ready":
            unit = self._next_unit(worker, waiting, event["at_once"])
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
        """Runs for a worker, taken from those that wait: of its group, else of the first one."""
        of_group = lambda group: [run for run in waiting if self._groups[run.directory] == group]  # noqa: E731
        others = [other.group for other in self._workers.values() if other is not worker]
        if waiting and not of_group(worker.group):
            free = [run for run in waiting if self._groups[run.directory] not in others] or waiting
            worker.group = self._groups[free[0].directory]
        mine = of_group(worker.group)
        if alone := [run for run in mine if run.directory in self._suspects]:
            unit = alone[:1]
        else:
            groups = ({self._groups[run.directory] for run in waiting} | {*others}) - {None}
            sharers = max(1, len(self._places) // max(1, len(groups)))
            unit = mine[: math.ceil(len(mine) / sharers)] if at_once else mine[:1]
        for run in unit:
            waiting.remove(run)
        return unit


def search_path() -> str:
    """``PYTHONPATH`` that finds this package first, wherever it was found."""
    here = str(Path(__file__).parent.parent.absolute())
    return os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))


def places(jobs: int) -> list[tuple[list[int], dict[str, str]]]:
    """The cores and environment of each of so many workers: all of the machine for one, else a share of it."""
    if jobs == 1:
        return [([], {})]
    gpus = visible_gpus()
    if gpus:
        share = (
            {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / math.ceil(jobs / len(gpus)):.3f}"} if jobs > len(gpus) else {}
        )
        return [([], {**share, "CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]}) for i in range(jobs)]
    cores = available_cores()
    each = max(1, len(cores) // jobs)
    # NumPy's and scikit-learn's threads, which are made before a worker has its cores, would wait for each other.
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    threads = {name: str(each) for name in names if name not in os.environ}
    return [([cores[(i * each + k) % len(cores)] for k in range(each)], threads) for i in range(jobs)]


def available_cores() -> list[int]:
    """The cores this process may use; without numbers where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def visible_gpus() -> list[str]:
    """NVIDIA's GPUs, as ``CUDA_VISIBLE_DEVICES`` takes them; asked without JAX, which would take them."""
    if (chosen := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [gpu for gpu in chosen.split(",") if gpu and gpu != "-1"]
    if os.environ.get("JAX_PLATFORMS") == "cpu" or not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout.splitlines()
    return [str(i) for i in range(len([line for line in listed if line.startswith("GPU ")]))]


def main() -> None:
    """A worker: the first line of its input is the request, each further one a list of directories."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever prints goes to the log

    def say(event: Event) -> None:
        try:
            out.write(json.dumps(event) + "\n")
        except BrokenPipeError:  # the sweep is gone: save and end
            signal.raise_signal(signal.SIGTERM)

    request = json.loads(sys.stdin.readline())
    if request["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, request["cores"])
    from lwfedssl_jax import devices
    from lwfedssl_jax.interrupts import Interrupts
    from lwfedssl_jax.simulate import Shared
    from lwfedssl_jax.sweep import load_sweep

    devices.set_up_cpu()
    devices.set_up_cache(request["cache"])
    import jax

    by_directory = {run.directory: run for run in load_sweep(request["sweep"]).runs}
    shared = Shared()
    with contextlib.suppress(KeyboardInterrupt), Interrupts() as interrupts:
        units: queue.Queue[list[str] | None] = queue.Queue()
        idle = threading.Event()
        threading.Thread(target=read_units, args=(units, idle), daemon=True).start()
        at_once = request["together"] != 1 and (request["together"] > 1 or jax.default_backend() != "cpu")
        while True:
            idle.set()
            say({"event": "ready", "at_once": at_once})
            if (unit := units.get()) is None:
                break
            for directory in (d for d in unit if d not in by_directory):
                say({"event": "started", "run": directory})
                say(
                    {"event": "failed", "run": directory, "why": "the sweep's file makes other runs than it did before"}
                )
            known = [by_directory[d] for d in unit if d in by_directory]
            do(Path(request["path"]), known, request["together"], shared, say)
            interrupts.check()


def read_units(units: "queue.Queue[list[str] | None]", idle: threading.Event) -> None:
    """Pass on what the sweep says; where it ends in the middle of a unit, it has been killed: save and end."""
    for line in sys.stdin:
        idle.clear()
        units.put(json.loads(line))
    units.put(None)
    if not idle.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def do(path: Path, runs: Sequence[SweepRun], together: int, shared: Any, say: Callable[[Event], None]) -> None:
    """Runs of one group, as many side by side as asked for, or as pay off (0)."""
    from lwfedssl_jax import experiment, simulate
    from lwfedssl_jax.workdir import WorkDir

    rest = list(runs)
    while rest:
        count = together or simulate.runs_at_once(rest[0].config)
        count = count if simulate.go_together(rest[0].config) else 1
        chunk, rest = rest[:count], rest[count:]
        members = []
        for run in chunk:
            say({"event": "started", "run": run.directory})
            try:
                workdir = WorkDir(path / run.directory, run.config, run.code, patience=PATIENCE)
            except ConfigError as error:
                say({"event": "failed", "run": run.directory, "why": str(error)})
                continue
            members.append((run, experiment.Member(run.config, workdir, telling(run, say))))
        if members:
            experiment.train_together([member for _, member in members], shared)
        for run, member in members:
            if member.error:
                traceback.print_exception(member.error)
                why = foreseen(member.error) or f"{type(member.error).__name__}: {' '.join(str(member.error).split())}"
                say({"event": "failed", "run": run.directory, "why": why})
            else:
                say({"event": "finished", "run": run.directory})


def telling(run: SweepRun, say: Callable[[Event], None]) -> Any:
    """A listener that passes on what a sweep shows."""
    from lwfedssl_jax.simulate import Listener

    class Telling(Listener):
        def note(self, what: str) -> None:
            print(f"{run.directory}: {what}", file=sys.stderr, flush=True)

        def compiling(self, what: str) -> None:
            say({"event": "compiling", "run": run.directory, "what": what})

        def round(self, line: dict[str, Any]) -> None:
            say({"event": "round", "run": run.directory, "round": line["round"], "stage": line["stage"]})

        def fine_tuning(self, what: str) -> None:
            say({"event": "compiling", "run": run.directory, "what": what})

        def evaluation(self, line: dict[str, Any]) -> None:
            content = {key: line[key] for key in ("round", "protocol", "accuracy")}
            say({"event": "evaluation", "run": run.directory, **content})

    return Telling()


if __name__ == "__main__":
    main()
