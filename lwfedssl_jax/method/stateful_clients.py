"""Clients that keep their own model between rounds, and how they combine it with the global model.

Both baselines are for end-to-end training with a target branch and a prediction head. What a
client keeps is stored on the host, and only for clients that have taken part.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax import tree
from lwfedssl_jax.config import Config, ConfigError, choose
from lwfedssl_jax.method.client import FROM_BROADCAST, ClientStart, client_init
from lwfedssl_jax.method.objectives import OBJECTIVES
from lwfedssl_jax.method.stages import Stage, stage_depths
from lwfedssl_jax.method.task import Broadcast, ClientState, Task, init_params
from lwfedssl_jax.tree import Tree


class Memory(NamedTuple):
    """What a client keeps from its last round.

    Attributes:
      known: False before its first round; all other fields are then ignored.
      round: number of its last round.
      trainable: its own model after local training.
      target: its target branch.
      moved: how far its training moved the encoder (``distance``).
      scale: FedEMA's lambda; 0 until it is set.
    """

    known: jax.Array
    round: jax.Array
    trainable: Tree
    target: Tree
    moved: jax.Array
    scale: jax.Array


class Kept(NamedTuple):
    """What a client holds in a round for its memory: the round, the encoder that it began with, and the scale."""

    round: jax.Array
    began_with: Tree
    scale: jax.Array


# ``(broadcast, memory, divergence, round) -> (trainable, target, scale)`` of a client that has a memory.
StartRule = Callable[[Broadcast, Memory, float, jax.Array], tuple[Tree, Tree, jax.Array]]

FEDU_DIVERGENCE, FEDEMA_DIVERGENCE = 0.4, 0.7  # values of the papers


def distance(rows: Tree, a: Tree, b: Tree) -> jax.Array:
    """Compute the mean of ``||a_l - b_l||`` over an encoder's weight matrices, layer by layer for stacked ones.

    Args:
      rows: the encoder's part of ``Stage.rows``, which says what is stacked.
      a, b: weights of the encoder.
    """

    def norms(row: np.ndarray, x: jax.Array, y: jax.Array) -> jax.Array:
        if x.ndim - row.ndim < 2:  # biases, gains
            return jnp.zeros(0, x.dtype)
        return jnp.sqrt(jnp.square(x - y).sum(tuple(range(row.ndim, x.ndim)))).ravel()

    return jnp.concatenate(jax.tree.leaves(jax.tree.map(norms, rows, a, b))).mean()


def fedu(broadcast: Broadcast, memory: Memory, divergence: float, number: jax.Array) -> tuple[Tree, Tree, jax.Array]:
    """FedU's divergence-aware predictor update (Zhuang et al., 2021, arXiv 2108.06492).

    A client takes the global predictor only if its last training moved its encoder by less than ``divergence``
    (``Memory.moved``); it always takes the rest of the global model, and keeps its target branch.
    """
    del number
    near = memory.moved < (divergence or FEDU_DIVERGENCE)
    prediction = tree.where(near, broadcast.trainable["prediction"], memory.trainable["prediction"])
    return broadcast.trainable | {"prediction": prediction}, memory.target, memory.scale


def fedema(broadcast: Broadcast, memory: Memory, divergence: float, number: jax.Array) -> tuple[Tree, Tree, jax.Array]:
    """FedEMA (Zhuang et al., 2022, arXiv 2204.04385, eq. 3 to 6), as in the authors' code.

    ``w <- mu * w_local + (1 - mu) * w_global`` with ``mu = min(lambda * d, 1)``, where the client's last training moved
    its encoder by d (``Memory.moved``); the autoscaler sets ``lambda = tau / d`` by its first training. A client that
    did not take part in the round before begins with the global model in both branches.
    """
    first = jnp.where(
        memory.moved > 0, (divergence or FEDEMA_DIVERGENCE) / jnp.where(memory.moved > 0, memory.moved, 1), 0
    )
    scale = jnp.where(memory.scale > 0, memory.scale, first)
    mixed = tree.ema(memory.trainable, broadcast.trainable, jnp.minimum(scale * memory.moved, 1))
    received = {name: broadcast.trainable[name] for name in memory.target}
    continues = memory.round + 1 == number
    trainable, target = tree.where(continues, (mixed, memory.target), (broadcast.trainable, received))
    return trainable, target, scale


STARTS: dict[str, StartRule | None] = {"global": None, "fedu": fedu, "fedema": fedema}


def check_client_start(config: Config) -> None:
    """Refuse a ``federation.client_start`` that cannot work.

    Raises:
      ConfigError: ``federation.client_start`` is unknown, or is incompatible with the strategy, the objective or
        several processes.
    """
    name = config.federation.client_start
    if choose("federation.client_start", name, STARTS) is None:
        return
    if len(stage_depths(config)) > 1:
        raise ConfigError(
            f"federation.client_start: {name} keeps whole models on clients and needs a single stage, found "
            f"strategy.name {config.strategy.name}; accepted: global, or strategy.name end_to_end"
        )
    having = [objective for objective, o in OBJECTIVES.items() if o.has_target and o.has_prediction]
    if config.objective.name not in having:
        raise ConfigError(
            f"federation.client_start: {name} needs a target branch and a prediction head, which objective.name "
            f"{config.objective.name} does not have; accepted: global, or objective.name {' or '.join(having)}"
        )
    if jax.process_count() > 1:
        raise ConfigError(f"federation.client_start: {name} runs in one process; accepted: global, or one process")


def make_client_start(config: Config, task: Task, stage: Stage) -> ClientStart:
    """Return the start that ``federation.client_start`` names, for the run's single stage."""
    rule, divergence = STARTS[config.federation.client_start], config.federation.divergence
    if rule is None:
        return FROM_BROADCAST

    def begin(task: Task, broadcast: Broadcast, memory: Memory | None, number: jax.Array) -> ClientState:
        fresh = fresh_client(task, broadcast.trainable, number)
        if memory is None:
            return fresh
        trainable, target, scale = rule(broadcast, memory, divergence, number)
        kept = Kept(number, trainable["encoder"], scale)
        return tree.where(memory.known, client_init(task, trainable)._replace(target=target, kept=kept), fresh)

    return ClientStart(begin, empty_memory(task, stage))


def fresh_client(task: Task, trainable: Tree, number: jax.Array) -> ClientState:
    """The state of a client that takes part for the first time, in a round by its number."""
    return client_init(task, trainable)._replace(kept=Kept(number, trainable["encoder"], jnp.zeros(())))


def to_memory(stage: Stage, client: ClientState) -> Memory:
    """Return what a client keeps after a round of the run's single stage."""
    kept = client.kept
    moved = distance(stage.rows["encoder"], kept.began_with, client.trainable["encoder"])
    return Memory(jnp.ones((), bool), kept.round, client.trainable, client.target, moved, kept.scale)


def empty_memory(task: Task, stage: Stage) -> Memory:
    """The memory of a client before its first round: zeros, on the host."""

    def shapes() -> Memory:
        trainable = tree.take(init_params(task, jax.random.key(0)), stage.rows)
        return to_memory(stage, fresh_client(task, trainable, jnp.zeros((), jnp.int32)))

    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(shapes))
