"""The command ``train``."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lwfedssl_jax.analysis import terminal
from lwfedssl_jax.cli.options import TrainOptions
from lwfedssl_jax.config import Config, code_digest, named, resolve
from lwfedssl_jax.experiment import train as experiment
from lwfedssl_jax.experiment.progress import ConsoleProgress
from lwfedssl_jax.system import devices
from lwfedssl_jax.system.errors import report_error
from lwfedssl_jax.workdir.directory import WorkDir, default_workdir


def run_train(options: TrainOptions, arguments: list[str]) -> None:
    """Run ``train`` in this process, which may be one of several."""
    config = resolve(options.config)
    devices.set_up_cpu()
    devices.set_up_cache(options.compilation_cache)
    devices.connect(options.coordinator, options.processes, options.process)
    devices.check_platform()
    try:
        if devices.is_first_process():
            run_and_print(config, arguments, options.workdir)
        else:
            experiment.train(config, workdir=None)
    except (Exception, KeyboardInterrupt) as error:
        if devices.is_one_of_several():
            devices.leave(report_error(error))
        raise


def run_and_print(config: Config, arguments: Sequence[str], path: Path | None) -> None:
    """Train, with progress on standard error, and print the summary on standard output."""
    # A user's own file may contain more than a config, such as an objective.
    name, code = named(arguments[0]), code_digest(arguments[0])
    path = path or default_workdir(name, config, code)
    workdir, out = WorkDir(path, config, code, command=arguments), Console()
    if workdir.summary is not None:
        experiment.train(config, workdir)
        out.print(f"{path} holds this run, finished; this is its summary (--workdir DIR starts another)")
        out.print(terminal.summary_tables(dict(workdir.summary)))
        return
    began = time.monotonic()
    with ConsoleProgress(Console(stderr=True)) as progress:
        summary = experiment.train(config, workdir, progress)
    out.print(terminal.summary_tables(summary))
    out.print(
        f"{summary['seconds']:.0f} s of training, {time.monotonic() - began:.0f} s since this command began; "
        f"metrics, plots and encoder are in {path}"
    )
