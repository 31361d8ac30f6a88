"""The command ``sweep``."""

import collections
import os
import socket
import time
from typing import Any

import jax
from rich.console import Console

from lwfedssl_jax.cli.options import SweepOptions
from lwfedssl_jax.cli.report import write_and_print_report
from lwfedssl_jax.cli.status import shown_status
from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.method.programs import program_config
from lwfedssl_jax.simulation.setup import Cache
from lwfedssl_jax.sweep.directory import SweepDirectory
from lwfedssl_jax.sweep.estimate import estimate, round_costs
from lwfedssl_jax.sweep.grid import SweepRun, load_sweep
from lwfedssl_jax.sweep.pool import Pool
from lwfedssl_jax.sweep.progress import SweepProgress, estimates_table
from lwfedssl_jax.system import devices
from lwfedssl_jax.system.errors import FailedRunsError, first_of

SECONDS_TO_LOOK = 5.0  # between looks at a claim of another process


def shard_of(options: SweepOptions) -> tuple[int, int]:
    """Return the number of the shard, from 1, and of how many.

    Raises:
      ConfigError: the option is not I/N, with I from 1 to N.
    """
    number, _, count = (options.shard or "1/1").partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ConfigError(f"--shard: {options.shard!r} is not valid; accepted: I/N, with I from 1 to N, such as 1/3")
    return int(number), int(count)


def say_what_is_left(directory: SweepDirectory, console: Console) -> bool:
    """Say who is training runs of the sweep; return whether nobody is, so that this process writes the report."""
    left = [run for run in directory.runs if not directory.is_finished(run)]
    holders = collections.Counter(holder for run in left if (holder := directory.holder(run)))
    for holder, number in holders.items():
        text = f"{holder} is training {number} of {len(directory.runs)} runs; the last process writes the report"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    return not holders


def run_sweep(options: SweepOptions) -> None:
    """Run a sweep in worker processes, with progress on standard error, and write its report."""
    devices.set_up_cpu()
    if not options.dry_run:
        jax.config.update("jax_platforms", "cpu")  # the accelerators are left to the workers
    asked = load_sweep(options.sweep_name, base=options.base)
    path = options.workdir or asked.default_directory
    directory = SweepDirectory(path, asked, shard_of(options))
    runs = directory.share
    devices.set_up_cache(options.compilation_cache)
    finished = {run.directory for run in runs if directory.is_finished(run)}
    shared, progress = Cache(), Console(stderr=True)
    if options.dry_run:
        with shown_status("tracing, and timing a step of each kind of run", progress):
            estimates = estimate(runs, shared, finished)
        Console().print(estimates_table(runs, estimates, finished))
        return
    if directory.others:
        kept = (
            f"{len(directory.others)} runs in {path} are not in this sweep any more; they stay, but not in its report"
        )
        progress.print(f"{kept}: {first_of(directory.others)}", markup=False, highlight=False, soft_wrap=True)
    directory.take()
    failed: dict[str, str] = {}
    try:
        with shown_status("tracing", progress):
            costs = {run.directory: round_costs(run.config, shared) for run in runs}
        with SweepProgress(progress, runs, costs, finished) as table:

            def hear(run: SweepRun, event: dict[str, Any]) -> None:
                table.hear(run, event)
                if event["event"] == "failed":
                    failed[f"{run.label}, seed {run.seed}"] = event["why"]
                    directory.fail(run.directory, event["why"])
                if event["event"] in ("finished", "failed"):
                    directory.give_back(run)

            request = {
                "path": str(path), "sweep": options.sweep_name, "base": options.base,
                "cache": options.compilation_cache, "together": options.together,
                "log": f"-{socket.gethostname()}-{os.getpid()}" if options.shard else "",
            }  # fmt: skip
            groups = {run.directory: program_config(run.config) for run in runs}
            with directory.claims:
                before, left = None, directory.unclaimed()
                while (left and left != before) or (directory.alone and directory.is_waiting()):
                    if left and left != before:
                        Pool(request, groups, options.jobs, hear, directory.claim).run(left)
                    else:  # a claim of a process that is gone, such as of a container, lapses by time
                        time.sleep(SECONDS_TO_LOOK)
                    before, left = left, directory.unclaimed()
        if say_what_is_left(directory, progress):
            with directory.alone_writing():
                write_and_print_report([path], path)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; the same command continues the sweep") from None
    finally:
        directory.close()
    if failed:
        reasons: dict[str, list[str]] = {}
        for run, why in failed.items():
            reasons.setdefault(why, []).append(run)
        text = "; ".join(f"{why} ({' | '.join(of_why)})" for why, of_why in reasons.items())
        raise FailedRunsError(f"{len(failed)} of {len(runs)} runs failed; the same command repeats them: {text}")
