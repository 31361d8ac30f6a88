"""The state of one run, from its config to its summary."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.costs import fleet
from lwfedssl_jax.evaluation import frozen, label_free
from lwfedssl_jax.experiment.checks import check
from lwfedssl_jax.experiment.datasets import RunData, load_run_data
from lwfedssl_jax.experiment.ledgers import compiled_ledger
from lwfedssl_jax.method.pacing import paced_stages
from lwfedssl_jax.method.programs import program_config
from lwfedssl_jax.simulation.events import Event, Hear, Note
from lwfedssl_jax.simulation.setup import Cache, Prepared, prepare, with_noise
from lwfedssl_jax.simulation.state import RoundState, state_to_save
from lwfedssl_jax.system.devices import from_first
from lwfedssl_jax.system.interrupts import Interrupts
from lwfedssl_jax.tree import Tree
from lwfedssl_jax.workdir import WorkDir


@dataclass
class ActiveRun:
    """A run that may still be waiting, in progress, finished or failed.

    Attributes:
      config: resolved.
      workdir: belongs to this config; None in every process except the first of several.
      listeners: hear of progress.
      prepared: the config and what is derived from it, with the lanes that are used; set by ``load``.
      data: what the encoder is evaluated on; set by ``load``.
      encode: computes the encoder's features; set by ``load``.
      done: how many rounds were finished when it was loaded.
      saved: the content of the checkpoint after these rounds, until training continues from it.
      losses: of these rounds, until training continues from them.
      summary: the content of ``summary.json``, once the run is finished; empty without a work directory.
      error: why it ended early.
    """

    config: Config
    workdir: WorkDir | None
    listeners: list[Hear] = field(default_factory=list)
    prepared: Prepared = field(init=False)
    data: RunData = field(init=False)
    encode: frozen.Encode = field(init=False)
    done: int = 0
    saved: Tree = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    summary: dict[str, Any] | None = None
    error: Exception | None = None

    @property
    def is_active(self) -> bool:
        """Whether the run has neither finished nor failed."""
        return self.summary is None and self.error is None

    @functools.cached_property
    def images_with_views(self) -> np.ndarray:
        """Images and two views of each, for label-free metrics."""
        return label_free.images_with_views(self.prepared.dataset, self.prepared.task.recipe, self.config.runtime.seed)

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """Store an error in this run instead of raising it, so that other runs go on."""
        try:
            yield
        except Exception as error:
            self.error = error

    def hear(self, event: Event) -> None:
        """Pass an event on to all listeners."""
        for listener in self.listeners:
            listener(event)

    def load(self, cache: Cache, interrupts: Interrupts) -> None:
        """Lock the work directory, load what the run needs, and find out how many rounds are finished.

        Raises:
          ConfigError: see ``experiment.train.train``.
        """
        if self.workdir:
            self.workdir.take()
        check(self.config)
        run = prepare(self.config, hear=self.hear, cache=cache)
        self.data = load_run_data(self.config, self.hear, cache)
        self.check_data(self.data.fingerprint)
        interrupts.check()
        if self.config.fleet.devices:
            run = on_fleet(run, self.hear, cache)
            interrupts.check()
        task, key = run.task, ("encode", program_config(self.config))
        self.encode = cache.get(key, lambda: frozen.make_encode(task.encoder, task.recipe, task.dtype))
        found, faults = self.workdir.restore() if self.workdir else (None, {})
        for rounds, why in faults.items():
            self.hear(Note(f"checkpoint {rounds} is damaged: {why}"))
        self.done = int(from_first(np.int32(found.rounds if found else 0)))
        self.saved = found.state if found else {}
        self.losses = [float(loss) for loss in self.of_rounds("loss")[: self.done]]
        self.prepared = run._replace(stages=paced_stages(self.config, run.stages, self.losses))

    def check_data(self, data: Mapping[str, str]) -> None:
        """Refuse data that are not those that the run in the work directory was begun on.

        Raises:
          ConfigError: in all processes.
        """
        fault: ConfigError | None = None
        try:
            if self.workdir:
                self.workdir.check_data(data)
        except ConfigError as error:
            fault = error
        if from_first(np.array(fault is not None)):
            raise fault or ConfigError("--workdir: it contains a run that was begun on other data; accepted: the same")

    def of_rounds(self, name: str) -> np.ndarray:
        """Return a number of each round's line, NaN if there is none; the same in all processes."""
        values = np.full(self.config.federation.rounds, np.nan)
        for line in self.workdir.metrics() if self.workdir else ():
            if "event" not in line and line.get(name) is not None:
                values[line["round"] - 1] = line[name]
        return np.asarray(from_first(values))

    def save(self, rounds: int, params: Tree, state: RoundState | None) -> None:
        """Write a checkpoint after ``rounds`` rounds."""
        if self.workdir and rounds:
            ends = [stage.last_round for stage in self.prepared.stages]
            self.workdir.save(rounds, state_to_save(params, state), ends)


def on_fleet(run: Prepared, hear: Hear, cache: Cache) -> Prepared:
    """Return a prepared run with its clients assigned to the devices of its fleet.

    Raises:
      ConfigError: there is a stage in which no client with examples can take part.
    """
    per_stage = compiled_ledger(run.config, hear, cache)["per_stage"]
    enough = run.clients.sizes >= run.task.objective.fewest
    on_devices = fleet.fleet_of_clients(run.config, per_stage, np.where(enough, run.clients.sizes, 0))
    hear(Note(fleet.fleet_line(fleet.summary(on_devices, run.clients.sizes), len(per_stage))))
    return with_noise(run._replace(fleet=on_devices), hear)
