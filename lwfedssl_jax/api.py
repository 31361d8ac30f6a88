"""The library from Python: a script or a notebook builds a config, trains it, and looks at what came out."""

import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from rich.console import Console

from lwfedssl_jax.analysis import run_plots
from lwfedssl_jax.config import Config, ConfigError, choose, load, override, resolve
from lwfedssl_jax.evaluation import export
from lwfedssl_jax.experiment import train as experiment
from lwfedssl_jax.experiment.checks import check
from lwfedssl_jax.experiment.progress import ConsoleProgress, NotebookProgress
from lwfedssl_jax.system import devices
from lwfedssl_jax.workdir import WorkDir
from lwfedssl_jax.workdir.directory import default_workdir

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
      directory: its work directory.
      config: resolved.
      summary: the content of ``summary.json``.
    """

    directory: Path
    config: Config
    summary: dict[str, Any]

    def __repr__(self) -> str:
        return f"Run({self.summary['strategy']}, {self.summary['rounds']} rounds, {str(self.directory)!r})"

    @property
    def metrics(self) -> "pd.DataFrame":
        """A row a round, with ``accuracy.PROTOCOL`` where it has been evaluated; round 0 is the untrained encoder."""
        import pandas as pd

        lines = self._lines()
        rounds = pd.DataFrame([line for line in lines if "event" not in line]).set_index("round")
        judged = [line for line in lines if "event" in line and "baseline" not in line]
        accuracies = pd.DataFrame(
            {"round": line["round"], f"accuracy.{line['protocol']}": line["accuracy"]} for line in judged
        )
        return rounds.join(accuracies.groupby("round").first(), how="outer") if judged else rounds

    @property
    def resources(self) -> "pd.DataFrame":
        """What one client spends over the whole run: a row a strategy, in bytes and multiply-adds of a sample."""
        import pandas as pd

        costs = ("total_bytes", "worst_case_total_bytes", "flops_paper_rule", "flops_executed", "peak_memory_bytes")
        ledgers = self.summary["strategies"]
        return pd.DataFrame([[ledger[cost] for cost in costs] for ledger in ledgers.values()], [*ledgers], [*costs])

    def plot(self, *others: "Run", protocol: str | None = None) -> "Figure":
        """Accuracy against traffic, of this run and of others beside it, by their directories' names.

        Args:
          others: runs that the protocol has judged too.
          protocol: such as ``knn``; by default the first of this run's.

        Raises:
          ConfigError: the protocol has not judged one of the runs.
        """
        runs = {run.directory.name: run for run in (self, *others)}
        if not self.summary["evaluation"]:
            raise ConfigError(f"protocol: none has judged {self.directory}; accepted: a run whose images have labels")
        protocol = protocol or next(iter(self.summary["evaluation"]))
        for run in runs.values():
            choose("protocol", protocol, run.summary["evaluation"])
        figure = run_plots.accuracy_against_traffic({name: [run._lines()] for name, run in runs.items()}, protocol)
        figure._repr_png_ = functools.partial(_png, figure)  # for notebooks that have not loaded pyplot
        return figure

    def encoder(self) -> export.TrainedEncoder:
        """``images -> features``; see ``load_encoder``."""
        return export.load_encoder(self.directory)

    def _lines(self) -> list[dict[str, Any]]:
        return WorkDir(self.directory, self.config).metrics()


def _png(figure: "Figure") -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def load_config(name: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The named config, or that of a Python file, with ``{"section.field": value}`` replaced, checked and complete.

    Raises:
      ConfigError: naming the field, the value and what is accepted.
    """
    config = resolve(override(load(name), overrides or {}))
    set_up()
    check(config)
    return config


def train(config: Config, directory: str | Path | None = None, progress: bool = True) -> Run:
    """Train, evaluate and write the work directory; an interrupted run continues, a finished one is only read.

    Args:
      config: as ``load_config`` gives it, or a ``Config`` of your own.
      directory: where the run lives; by default ``runs/STRATEGY-HASH``, one for each config.
      progress: show how it goes.

    Raises:
      ConfigError: bad input; see ``experiment.train`` for this and all else.
    """
    config = resolve(config)
    set_up()
    path = default_workdir(config.strategy.name, config) if directory is None else Path(directory)
    workdir = WorkDir(path, config)
    if workdir.summary is not None or not progress:
        return Run(path, config, experiment.train(config, workdir))
    console = Console(stderr=True)
    with NotebookProgress(console) if console.is_jupyter else ConsoleProgress(console) as hear:
        return Run(path, config, experiment.train(config, workdir, hear))


def set_up() -> None:
    """A device for each CPU core and a cache of compiled programs, unless JAX has started, or has a cache, already."""
    devices.set_up_cpu()
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        devices.set_up_cache(None)
