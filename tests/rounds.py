"""Single rounds over a few clients of unequal sizes, and comparisons of their parameters."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
from conftest import run_round

from lwfedssl_jax import tree
from lwfedssl_jax.config import Config, override
from lwfedssl_jax.data.partition import Population
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.task import Broadcast
from lwfedssl_jax.simulation import program, setup
from lwfedssl_jax.simulation.simulator import Simulator

SIZES = [8, 2, 6, 5]  # unequal, two samples, a short last batch, one too short to learn from


def prepare(config: Config, devices: int = 1) -> setup.Prepared:
    """A run over clients of ``SIZES`` examples."""
    run = setup.prepare(override(config, {"optimizer.batch_size": 4}), jax.devices()[:devices])
    return run._replace(clients=Population.disjoint(np.arange(sum(SIZES)), np.array(SIZES)))


def fast_round(
    run: setup.Prepared, stage: Stage, params: tree.Tree, number: int, cache: setup.Cache | None = None
) -> tuple[tree.Tree, dict]:
    simulator = Simulator([run], cache=cache)
    after, _, line = run_round(simulator, stage, simulator.stack.place(params), None, number)
    return jax.device_get(after), line


def parts(stage: Stage, params: tree.Tree) -> Broadcast:
    """What the server sends of ``params``."""
    return program.make_broadcast(stage, params, stage.rows, stage.depths)


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """float64, with the type promotion that flax's batch normalisation needs there."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def max_difference(a: tree.Tree, b: tree.Tree) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)))
