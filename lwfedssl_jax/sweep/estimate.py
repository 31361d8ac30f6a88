"""Estimates how long a sweep would take."""

import functools
import time
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax
import numpy as np

from lwfedssl_jax.config import Config, override
from lwfedssl_jax.costs import memory, stored
from lwfedssl_jax.evaluation import frozen
from lwfedssl_jax.experiment.evaluations import is_evaluated
from lwfedssl_jax.experiment.ledgers import round_operations, traced_ledger
from lwfedssl_jax.method.programs import ledger_config, program_config
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.simulation.setup import Cache, Prepared, prepare
from lwfedssl_jax.sweep.grid import SweepRun

# What a process spends before a run's first round, and on its ledgers, as multiples of the time in which one client's
# step compiles. On 2 CPU cores they were 2.8 to 11.6 and 2.9 to 4.6, for SimCLR and MoCo-v3 on a ViT and for ResNet-18.
START, LEDGERS = 6.0, 4.0
FORWARD = 1 / 6  # of a step's operations per image: two views, and about three times a forward pass for each


class Estimate(NamedTuple):
    """The estimated work and time of a run.

    Attributes:
      operations: multiply-adds of the local training of all clients in all rounds.
      training: seconds of this, on all lanes of this machine, at the measured speed of one client's step.
      evaluation: seconds of all linear probes and kNN, with features at the measured speed; without fine-tuning.
      compiling: seconds of loading, compiling and ledgers, of the first run of those that share them.
    """

    operations: float
    training: float
    evaluation: float
    compiling: float

    @property
    def seconds(self) -> float:
        """The sum of all seconds."""
        return self.training + self.evaluation + self.compiling


def estimate(runs: Sequence[SweepRun], cache: Cache, finished: Collection[str] = ()) -> list[Estimate]:
    """Estimate each run; reads the data, and compiles and times one step for each distinct program of a last stage.

    Clients whose devices cannot afford a stage are counted as if they could.

    Args:
      runs: of a sweep.
      cache: shared by them.
      finished: directories of runs that compile nothing any more.
    """
    found, compiled = list[Estimate](), set[Config]()
    for run in runs:
        config, plain = run.config, ledger_config(run.config)
        cost = traced_ledger(config, cache)["flops_executed"]
        ready = prepare(config, cache=cache)  # for the clients' sizes; nothing is compiled
        drawn = config.cohort_size / config.partition.clients * (1 - config.federation.dropout)
        operations = cost * float(ready.clients.sizes.sum()) * drawn
        speed = cache.get(("speed", plain), functools.partial(memory.step_speed, plain))
        at_once = ready.mesh.size if jax.default_backend() == "cpu" else ready.lanes
        shared = {program_config(config): START}
        if stored.read(plain) is None:
            shared[override(plain, {"strategy.name": ""})] = LEDGERS
        compiling = 0.0
        if run.directory not in finished:
            compiling = speed.compile_seconds * sum(shared[key] for key in shared.keys() - compiled)
            compiled |= shared.keys()
        evaluation = evaluation_seconds(ready, cost / config.federation.rounds, speed.rate, cache)
        found.append(Estimate(operations, operations / speed.rate / at_once, evaluation, compiling))
    return found


def evaluation_seconds(ready: Prepared, operations: float, rate: float, cache: Cache) -> float:
    """Estimate the seconds of all evaluations of a run.

    Args:
      ready: the run.
      operations: multiply-adds per image of a round's training.
      rate: multiply-adds per second.
      cache: shared with other runs.
    """
    config, dataset = ready.config.evaluation, ready.dataset
    if not len(dataset.labelled):
        return 0.0
    images = len(frozen.used_images(config, dataset)) + len(dataset.test_images)
    features = FORWARD * operations / ready.config.federation.local_epochs * images / rate
    key = "probes", ready.config.data, config, ready.task.encoder.feature_dim
    probes = cache.get(key, lambda: probe_seconds(ready))
    return (1 + evaluations(ready.stages, config.every)) * (features + probes)


def evaluations(stages: Sequence[Stage], every: int) -> int:
    """Return after how many rounds a run evaluates its encoder."""
    rounds = ((stage, number) for stage in stages for number in range(stage.first_round + 1, stage.last_round + 1))
    return sum(is_evaluated(stage, every, number) for stage, number in rounds)


def probe_seconds(ready: Prepared) -> float:
    """Measure the seconds of the linear probes and kNN of one evaluation, on random features."""
    rng, width, dataset = np.random.default_rng(0), ready.task.encoder.feature_dim, ready.dataset
    train, test = (
        rng.standard_normal((len(x), width), np.float32) for x in (dataset.train_images, dataset.test_images)
    )
    began = time.perf_counter()
    frozen.evaluate(ready.config.evaluation, dataset, train, test)
    return time.perf_counter() - began


def round_costs(config: Config, cache: Cache) -> list[float]:
    """Return each round's work, to compare runs on one data set: multiply-adds per sample, times the share drawn."""
    share = config.cohort_size / config.partition.clients
    if config.partition.kind == "shared":
        share = float(config.cohort_size * config.partition.examples_per_client)
    return [share * operations for operations in round_operations(config, cache)]
