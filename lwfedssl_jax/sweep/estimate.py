"""Estimates how long a sweep would take."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax

from lwfedssl_jax.config import Config
from lwfedssl_jax.costs import memory
from lwfedssl_jax.experiment.ledgers import round_operations, traced_ledger
from lwfedssl_jax.method.programs import ledger_config
from lwfedssl_jax.simulation.setup import Cache, prepare
from lwfedssl_jax.sweep.grid import SweepRun


class Estimate(NamedTuple):
    """The estimated work and time of a run.

    Attributes:
      operations: multiply-adds of the local training of all clients in all rounds.
      seconds: of this training, on all lanes of this machine, at the measured speed of one client's step.
    """

    operations: float
    seconds: float


def estimate(runs: Sequence[SweepRun], cache: Cache) -> list[Estimate]:
    """Estimate each run; reads the data, and compiles and times one step for each distinct program of a last stage.

    Clients whose devices cannot afford a stage are counted as if they could.
    """
    found = []
    for run in runs:
        config, plain = run.config, ledger_config(run.config)
        cost = traced_ledger(config, cache)["flops_executed"]
        ready = prepare(config, cache=cache)  # for the clients' sizes; nothing is compiled
        drawn = config.cohort_size / config.partition.clients * (1 - config.federation.dropout)
        operations = cost * float(ready.clients.sizes.sum()) * drawn
        rate = cache.get(("rate", plain), functools.partial(memory.step_rate, plain))
        at_once = ready.mesh.size if jax.default_backend() == "cpu" else ready.lanes
        found.append(Estimate(operations, operations / rate / at_once))
    return found


def round_costs(config: Config, cache: Cache) -> list[float]:
    """Return each round's work, to compare runs on one data set: multiply-adds per sample, times the share drawn."""
    share = config.cohort_size / config.partition.clients
    if config.partition.kind == "shared":
        share = float(config.cohort_size * config.partition.examples_per_client)
    return [share * operations for operations in round_operations(config, cache)]
