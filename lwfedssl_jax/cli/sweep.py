"""The command ``sweep``."""

from typing import Any

import jax
from rich.console import Console

from lwfedssl_jax.cli.options import SweepOptions
from lwfedssl_jax.cli.report import write_and_print_report
from lwfedssl_jax.cli.status import shown_status
from lwfedssl_jax.method.programs import program_config
from lwfedssl_jax.simulation.setup import Cache
from lwfedssl_jax.sweep.directory import SweepDirectory
from lwfedssl_jax.sweep.estimate import estimate, round_costs
from lwfedssl_jax.sweep.grid import SweepRun, load_sweep
from lwfedssl_jax.sweep.pool import Pool
from lwfedssl_jax.sweep.progress import SweepProgress, estimates_table
from lwfedssl_jax.system import devices
from lwfedssl_jax.system.errors import FailedRunsError, first_of


def run_sweep(options: SweepOptions) -> None:
    """Run a sweep in worker processes, with progress on standard error, and write its report."""
    devices.set_up_cpu()
    if not options.dry_run:
        jax.config.update("jax_platforms", "cpu")  # the accelerators are left to the workers
    asked = load_sweep(options.sweep_name, base=options.base)
    path = options.workdir or asked.default_directory
    directory = SweepDirectory(path, asked)
    runs = directory.runs
    devices.set_up_cache(options.compilation_cache)
    finished = {run.directory for run in runs if directory.is_finished(run)}
    shared, progress = Cache(), Console(stderr=True)
    if options.dry_run:
        with shown_status("tracing, and timing a step of each kind of run", progress):
            estimates = estimate(runs, shared)
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

            request = {
                "path": str(path), "sweep": options.sweep_name, "base": options.base,
                "cache": options.compilation_cache, "together": options.together,
            }  # fmt: skip
            groups = {run.directory: program_config(run.config) for run in runs}
            Pool(request, groups, options.jobs, hear).run([run for run in runs if run.directory not in finished])
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
