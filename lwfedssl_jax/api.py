"""The Python API, for scripts and notebooks: load a config, train it, look at the results."""

import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import pandas as pd
from rich.console import Console

from lwfedssl_jax.analysis import run_plots
from lwfedssl_jax.config import Config, ConfigError, choose, code_digest, load, override, resolve
from lwfedssl_jax.data.memory import Data, hold
from lwfedssl_jax.evaluation import export
from lwfedssl_jax.experiment import train as experiment
from lwfedssl_jax.experiment.checks import check
from lwfedssl_jax.experiment.progress import ConsoleProgress, NotebookProgress
from lwfedssl_jax.system import devices
from lwfedssl_jax.system.files import with_home
from lwfedssl_jax.workdir import WorkDir
from lwfedssl_jax.workdir.directory import default_workdir
from lwfedssl_jax.workdir.metrics import read_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure


CODE: dict[Config, str] = {}  # of the configs that load_config has returned (code_digest)


@dataclass(frozen=True)
class Run:
    """A finished run, as ``train`` returns it.

    Attributes:
      directory: the work directory.
      config: the config that was run, resolved.
      summary: the content of ``summary.json`` (``workdir.schema.Summary``).
    """

    directory: Path
    config: Config
    summary: dict[str, Any]

    def __repr__(self) -> str:
        return f"Run({self.summary['strategy']}, {self.summary['rounds']} rounds, {str(self.directory)!r})"

    @property
    def metrics(self) -> pd.DataFrame:
        """Measurements of each round, as a data frame.

        Returns:
          One row per round, indexed by ``round``; round 0 is the untrained encoder. The columns are the fields of
          ``workdir.schema.RoundLine`` (loss, bytes and seconds of the round, ...), and ``accuracy.PROTOCOL``, from 0
          to 1, which is NaN in rounds after which the encoder was not evaluated.
        """
        lines = read_lines(self.directory)
        rounds = pd.DataFrame([line for line in lines if "event" not in line]).set_index("round")
        evaluations = [line for line in lines if "accuracy" in line and "baseline" not in line]
        accuracies = pd.DataFrame(
            {"round": line["round"], f"accuracy.{line['protocol']}": line["accuracy"]} for line in evaluations
        )
        return rounds.join(accuracies.groupby("round").first(), how="outer") if evaluations else rounds

    @property
    def resources(self) -> pd.DataFrame:
        """Costs of one client over the whole run under each strategy, as a data frame.

        Returns:
          One row per strategy that can run with the config. The columns are ``total_bytes`` and
          ``worst_case_total_bytes`` of traffic; ``flops_paper_rule`` and ``flops_executed``, multiply-adds per sample;
          ``peak_memory_bytes`` of one training step.
        """
        costs = ("total_bytes", "worst_case_total_bytes", "flops_paper_rule", "flops_executed", "peak_memory_bytes")
        ledgers = self.summary["strategies"]
        return pd.DataFrame([[ledger[cost] for cost in costs] for ledger in ledgers.values()], [*ledgers], [*costs])

    def plot(self, *others: "Run", protocol: str | None = None) -> "Figure":
        """Plot accuracy against traffic, for this run and others, labelled with the names of their directories.

        Args:
          others: more runs that were evaluated with the same protocol.
          protocol: an evaluation protocol, such as ``knn``; by default the first one in this run's summary.

        Returns:
          A figure, which a notebook shows and ``savefig`` writes.

        Raises:
          ConfigError: one of the runs was not evaluated with the protocol.
        """
        runs = {run.directory.name: run for run in (self, *others)}
        if not self.summary["evaluation"]:
            raise ConfigError(f"protocol: {self.directory} was not evaluated; accepted: a run whose images have labels")
        protocol = protocol or next(iter(self.summary["evaluation"]))
        for run in runs.values():
            choose("protocol", protocol, run.summary["evaluation"])
        figure = run_plots.accuracy_against_traffic(
            {name: [read_lines(run.directory)] for name, run in runs.items()}, protocol
        )
        figure._repr_png_ = functools.partial(_png, figure)  # for notebooks that have not loaded pyplot
        return figure

    def encoder(self) -> export.TrainedEncoder:
        """Load the trained encoder, a function from images to features; see ``load_encoder``."""
        return export.load_encoder(self.directory)


def _png(figure: "Figure") -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def load_config(name: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """Load a config, replace some of its fields, and check it.

    Args:
      name: a name that ``python run.py list`` shows, or a path to a Python file that defines ``config``.
      overrides: new values by field, ``{"section.field": value}``.

    Returns:
      The config, resolved: fields that the config leaves open are filled in.

    Raises:
      ConfigError: the config does not exist or cannot be trained; the message names the field, its value and what is
        accepted.
    """
    config = resolve(override(load(name), overrides or {}))
    set_up()
    check(config)
    CODE[config] = code_digest(name)
    return config


def train(config: Config, directory: str | Path | None = None, progress: bool = True, data: Data | None = None) -> Run:
    """Train, evaluate and write the work directory; an interrupted run continues, a finished one is only read.

    Args:
      config: from ``load_config``, or a ``Config`` of your own. A run of the former is known also by the text of the
        config's own files.
      directory: the work directory; by default ``runs/STRATEGY-HASH``, one per config.
      progress: whether to show progress on standard error, or in the notebook.
      data: a data set in memory, in place of ``data.name``; it is a part of what identifies the run.

    Raises:
      ConfigError: the config cannot be trained, the data are not valid, or the directory contains another run.
      FloatingPointError: training diverged.
      KeyboardInterrupt: on Ctrl-C, after the last finished round has been saved.
      OSError: something cannot be written; what was saved before is intact.
    """
    config = resolve(config)
    code = CODE.get(config, "")
    config = override(config, {"data.name": hold(data)}) if data is not None else config
    set_up()
    path = default_workdir(config.strategy.name, config, code) if directory is None else with_home(directory)
    workdir = WorkDir(path, config, code)
    if workdir.summary is not None or not progress:
        return Run(path, config, experiment.train(config, workdir))
    console = Console(stderr=True)
    with NotebookProgress(console) if console.is_jupyter else ConsoleProgress(console) as hear:
        return Run(path, config, experiment.train(config, workdir, hear))


def set_up() -> None:
    """Give JAX one device per CPU core, unless it has started, and a compilation cache, unless it has one."""
    devices.set_up_cpu()
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        devices.set_up_cache(None)
    devices.check_platform()
