"""The worker process of a sweep, which executes runs one unit after the other."""

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.simulation.events import Hear
from lwfedssl_jax.sweep.grid import SweepRun
from lwfedssl_jax.sweep.pool import Message
from lwfedssl_jax.system.errors import user_message

SHUTDOWN_SECONDS = 120.0  # seconds that a worker has to save and exit if its sweep was killed


def serve() -> None:
    """Run a worker: the first line of its input is the request, each further line a list of directories."""
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # everything that is printed goes to the log

    def say(event: Message) -> None:
        try:
            out.write(json.dumps(event) + "\n")
        except BrokenPipeError:  # the sweep's process is gone: save and exit
            signal.raise_signal(signal.SIGTERM)

    request = json.loads(sys.stdin.readline())
    if request["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, request["cores"])
    from lwfedssl_jax.simulation.setup import Cache
    from lwfedssl_jax.sweep.directory import digest_of
    from lwfedssl_jax.sweep.grid import load_sweep
    from lwfedssl_jax.system import devices
    from lwfedssl_jax.system.interrupts import Interrupts

    devices.set_up_cpu()
    devices.set_up_cache(request["cache"])
    try:
        devices.check_platform()
    except ConfigError as error:
        return say({"event": "refused", "why": str(error)})
    import jax

    by_digest = {digest_of(run.directory): run for run in load_sweep(request["sweep"], base=request["base"]).runs}
    shared = Cache()
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
            for directory in (d for d in unit if digest_of(d) not in by_digest):
                say({"event": "started", "run": directory})
                say(
                    {"event": "failed", "run": directory, "why": "the sweep's file makes other runs than it did before"}
                )
            known = [by_digest[digest_of(d)]._replace(directory=d) for d in unit if digest_of(d) in by_digest]
            run_unit(Path(request["path"]), known, request["together"], shared, say)
            interrupts.check()


def read_units(units: "queue.Queue[list[str] | None]", idle: threading.Event) -> None:
    """Pass on the sweep's lines; if they end in the middle of a unit, the sweep was killed: save and exit."""
    for line in sys.stdin:
        idle.clear()
        units.put(json.loads(line))
    units.put(None)
    if not idle.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def run_unit(path: Path, runs: Sequence[SweepRun], together: int, shared: Any, say: Callable[[Message], None]) -> None:
    """Execute runs of one group, with the requested number in parallel, or as many as pay off (0)."""
    from lwfedssl_jax.experiment.active import ActiveRun
    from lwfedssl_jax.experiment.train import train_together
    from lwfedssl_jax.simulation import setup
    from lwfedssl_jax.workdir import WorkDir

    rest = list(runs)
    while rest:
        count = together or setup.stack_size(rest[0].config)
        count = count if setup.can_stack(rest[0].config) else 1
        chunk, rest = rest[:count], rest[count:]
        members = []
        for run in chunk:
            say({"event": "started", "run": run.directory})
            try:
                workdir = WorkDir(path / run.directory, run.config, run.code, patience=SHUTDOWN_SECONDS)
            except ConfigError as error:
                say({"event": "failed", "run": run.directory, "why": str(error)})
                continue
            members.append((run, ActiveRun(run.config, workdir, [listener(run, say)])))
        if members:
            train_together([member for _, member in members], shared)
        for run, member in members:
            if member.error:
                traceback.print_exception(member.error)
                why = (
                    user_message(member.error)
                    or f"{type(member.error).__name__}: {' '.join(str(member.error).split())}"
                )
                say({"event": "failed", "run": run.directory, "why": why})
            else:
                say({"event": "finished", "run": run.directory})


def listener(run: SweepRun, say: Callable[[Message], None]) -> Hear:
    """Make a listener that passes on the events that a sweep shows; notes go to the log."""
    from lwfedssl_jax.simulation import events

    def hear(event: events.Event) -> None:
        if isinstance(event, events.Note):
            print(f"{run.directory}: {event.text}", file=sys.stderr, flush=True)
        if isinstance(event, events.Compiling | events.RoundDone | events.FineTuning | events.Evaluated):
            say({"event": type(event).__name__, "run": run.directory, **event._asdict()})

    return hear


if __name__ == "__main__":
    serve()
