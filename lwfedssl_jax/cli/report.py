"""The command ``report``."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from lwfedssl_jax.analysis.report import write_report
from lwfedssl_jax.analysis.results import load_results
from lwfedssl_jax.analysis.settings import group_by_setting
from lwfedssl_jax.analysis.tables import settings_table
from lwfedssl_jax.analysis.terminal import rich_table
from lwfedssl_jax.cli.options import ReportOptions
from lwfedssl_jax.config import ConfigError


def run_report(options: ReportOptions) -> None:
    """Run the report that the options describe."""
    out = options.out or (options.directories[0] if len(options.directories) == 1 else Path("report"))
    try:
        write_and_print_report(options.directories, out)
    except OSError as error:
        raise ConfigError(
            f"--out: {out} cannot be written ({error.strerror or error}); accepted: a directory you can write to"
        ) from error


def write_and_print_report(directories: Sequence[Path], out: Path) -> None:
    """Write the page; print its table of settings, the runs that it leaves out, and its path."""
    found, written = load_results(*directories), write_report(directories, out)
    console = Console()
    runs, settings = group_by_setting(found)
    if settings:
        console.print(rich_table(settings_table(runs, settings).words))
    for name, why in zip(found["name"], found["fault"], strict=True):
        if why:
            console.print(f"left out: {name}: {why}", markup=False, highlight=False, soft_wrap=True)
    console.print(written, markup=False, highlight=False, soft_wrap=True)
