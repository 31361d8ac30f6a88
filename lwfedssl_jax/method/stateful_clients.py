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
      trainable: its own model after local training.
      target: its target branch.
      scale: FedEMA's lambda; 0 until it is set.
    """

    known: jax.Array
    trainable: Tree
    target: Tree
    scale: jax.Array


# ``(broadcast, memory, divergence) -> (trainable, scale)`` of a client that has a memory.
StartRule = Callable[[Broadcast, Memory, float], tuple[Tree, jax.Array]]

FEDU_DIVERGENCE, FEDEMA_DIVERGENCE = 0.4, 0.7  # values of the papers


def distance(present: Tree, a: Tree, b: Tree) -> jax.Array:
    """Compute the mean of ``||a_l - b_l||`` over the encoders' weight matrices, layer by layer for stacked ones.

    The papers write ``||a - b||``; their thresholds are for this mean, which their code computes.
    """

    def norms(p: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        if x.ndim - p.ndim < 2:  # biases, gains
            return jnp.zeros(0, x.dtype)
        return jnp.sqrt(jnp.square(x - y).sum(tuple(range(p.ndim, x.ndim)))).ravel()

    by_leaf = jax.tree.map(norms, present["encoder"], a["encoder"], b["encoder"])
    return jnp.concatenate(jax.tree.leaves(by_leaf)).mean()


def fedu(broadcast: Broadcast, memory: Memory, divergence: float) -> tuple[Tree, jax.Array]:
    """FedU's divergence-aware predictor update (Zhuang et al., 2021, arXiv 2108.06492).

    A client takes the global predictor only if its encoder is nearer than ``divergence`` to the
    global one (``distance``); it always takes the rest of the global model.
    """
    near = distance(broadcast.present, broadcast.trainable, memory.trainable) < (divergence or FEDU_DIVERGENCE)
    prediction = tree.where(near, broadcast.trainable["prediction"], memory.trainable["prediction"])
    return broadcast.trainable | {"prediction": prediction}, memory.scale


def fedema(broadcast: Broadcast, memory: Memory, divergence: float) -> tuple[Tree, jax.Array]:
    """FedEMA (Zhuang et al., 2022, arXiv 2204.04385, eq. 3 to 6).

    ``w <- mu * w_local + (1 - mu) * w_global`` with ``mu = min(lambda * ||w_global - w_local||, 1)``; the
    autoscaler sets ``lambda = tau / ||w_global - w_local||`` when the client takes part for the second time.
    """
    apart = distance(broadcast.present, broadcast.trainable, memory.trainable)
    first = jnp.where(apart > 0, (divergence or FEDEMA_DIVERGENCE) / jnp.where(apart > 0, apart, 1), 0)
    scale = jnp.where(memory.scale > 0, memory.scale, first)
    mu = jnp.minimum(scale * apart, 1)
    return tree.ema(memory.trainable, broadcast.trainable, mu), scale


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

    def begin(task: Task, broadcast: Broadcast, memory: Memory | None) -> ClientState:
        fresh = fresh_client(task, broadcast.trainable)
        if memory is None:
            return fresh
        trainable, scale = rule(broadcast, memory, divergence)
        own = client_init(task, trainable)._replace(target=memory.target, kept=scale)
        return tree.where(memory.known, own, fresh)

    return ClientStart(begin, empty_memory(task, stage))


def fresh_client(task: Task, trainable: Tree) -> ClientState:
    """The state of a client that takes part for the first time."""
    return client_init(task, trainable)._replace(kept=jnp.zeros(()))


def to_memory(client: ClientState) -> Memory:
    """Return the part of the clients' states that they keep after a round; leaves may have a leading lane axis W."""
    return Memory(jnp.ones(client.kept.shape, bool), client.trainable, client.target, client.kept)


def empty_memory(task: Task, stage: Stage) -> Memory:
    """The memory of a client before its first round: zeros, on the host."""

    def shapes() -> Memory:
        return to_memory(fresh_client(task, tree.take(init_params(task, jax.random.key(0)), stage.rows)))

    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(shapes))
