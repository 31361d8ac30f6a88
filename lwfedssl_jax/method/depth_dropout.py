"""Depth dropout: which layers a step, or a client in a round, runs (Guo et al., 2023)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lwfedssl_jax.config import MODELS, Config, ConfigError
from lwfedssl_jax.method.stages import Stage, stage_depths
from lwfedssl_jax.method.task import Broadcast, Route, Task
from lwfedssl_jax.models.encoder import Depth
from lwfedssl_jax.system import seeds

PER_STEP, PER_ROUND = "step", "round"


def check_depth_dropout(config: Config) -> None:
    """Refuse depth dropout where there is nothing to skip, or layers are not equal.

    Raises:
      ConfigError: there is a single stage, or the model's layers differ.
    """
    rate = config.additions.depth_dropout
    if rate and len(stage_depths(config)) == 1:
        raise ConfigError(
            f"additions.depth_dropout: {rate} skips layers that an earlier stage has trained, and strategy.name "
            f"{config.strategy.name} with strategy.layers_per_stage {config.strategy.layers_per_stage} has one stage; "
            "accepted: 0.0, or more stages"
        )
    if rate and not MODELS[config.model.name].equal_layers:
        raise ConfigError(
            f"additions.depth_dropout: {rate} needs equal layers (ModelSize.equal_layers), which {config.model.name} "
            "does not have; accepted: 0.0, or a vit"
        )


def skipped_by_step(key: jax.Array, rate: ArrayLike, droppable: Depth, layers: int) -> jax.Array:
    """Draw which of L ``layers`` a step skips: each of the first ``droppable`` ones with probability ``rate``.

    Args:
      key: of the step.
      rate: probability that a layer is skipped.
      droppable: how many of the encoder's first layers can be skipped.
      layers: L.
    """
    u_L = jax.random.uniform(jax.random.fold_in(key, seeds.StepTag.DEPTH_DROPOUT), (layers,), jnp.float32)
    return (u_L < rate) & (jnp.arange(layers) < droppable)


def skipped_by_round(key: jax.Array, rate: ArrayLike, droppable: Depth, layers: int) -> jax.Array:
    """Draw which of L ``layers`` a client does without in a round: each with probability ``rate``.

    Their number is ``rate * droppable``, rounded down or up at random, so that a device's memory can be planned.

    Args:
      key: of the client in this round.
      rate, droppable, layers: as for ``skipped_by_step``.
    """
    u = jax.random.uniform(jax.random.fold_in(key, seeds.ClientTag.DEPTH_DROPOUT), (layers + 1,), jnp.float32)
    number = jnp.floor(jnp.asarray(rate, jnp.float32) * jnp.asarray(droppable, jnp.float32) + u[layers]).astype(
        jnp.int32
    )
    u_L = jnp.where(jnp.arange(layers) < droppable, u[:layers], 2)
    return (jnp.argsort(jnp.argsort(u_L)) < number) & (u_L < 2)


def skipped_layers(task: Task, broadcast: Broadcast, client_key: jax.Array, step_key: jax.Array) -> jax.Array | None:
    """Return which of the encoder's L layers a client's step skips; None if depth dropout is off."""
    rate, droppable = task.hyper.depth_dropout, broadcast.droppable
    if task.drops_layers == PER_ROUND:
        return skipped_by_round(client_key, rate, droppable, task.layers)
    return skipped_by_step(step_key, rate, droppable, task.layers) if task.drops_layers else None


def kept_layers(skipped_L: jax.Array, first: Depth, depth: Depth) -> tuple[jax.Array, jax.Array]:
    """Return which of ``depth`` layers after the ``first`` ones are not skipped.

    Returns:
      Their numbers, counted from ``first``, in order and before all others; how many they are.
    """
    number_L = jnp.arange(len(skipped_L)) + first
    runs_L = (number_L < first + depth) & ~jnp.take(skipped_L, number_L, mode="clip")
    return jnp.argsort(~runs_L, stable=True).astype(jnp.int32), runs_L.sum(dtype=jnp.int32)


def routes(broadcast: Broadcast, skipped_L: jax.Array | None) -> tuple[Route, Route]:
    """Return which trainable and which frozen layers run: all, or those that are not skipped."""
    if skipped_L is None:
        return (broadcast.depth, None), (broadcast.frozen_depth, None)
    order, count = kept_layers(skipped_L, broadcast.frozen_depth, broadcast.depth)
    frozen_order, frozen_count = kept_layers(skipped_L, 0, broadcast.frozen_depth)
    return (count, order), (frozen_count, frozen_order)


def without_layers(broadcast: Broadcast, skipped_L: jax.Array) -> Broadcast:
    """Return the broadcast as a client sees it that does without layers: their rows are idle."""

    def leaf(present: jax.Array) -> jax.Array:
        if not present.ndim:
            return present
        number = broadcast.frozen_depth + jnp.arange(len(present))
        return present & ~jnp.take(skipped_L, number, mode="clip")

    return broadcast._replace(present=jax.tree.map(leaf, broadcast.present))


def held_layers(config: Config, stage: Stage, number: int, clients: list[int]) -> np.ndarray | None:
    """Return which layers the clients of a round hold, KxL, if depth dropout is drawn by round, else None."""
    additions, layers = config.additions, config.model.depth
    if not additions.depth_dropout or additions.depth_dropout_per != PER_ROUND:
        return None
    key = seeds.key(config.runtime.seed, seeds.KeyTag.ROUND, number)
    padded = np.zeros(max(config.cohort_size, len(clients)), np.uint32)  # one program for all cohorts
    padded[: len(clients)] = clients
    rate, droppable = np.float32(additions.depth_dropout), np.int32(stage.trained_before)
    return ~np.asarray(_skipped_by_clients(key, padded, rate, droppable, layers))[: len(clients)]


@functools.partial(jax.jit, static_argnums=4)
def _skipped_by_clients(
    key: jax.Array, clients_K: jax.Array, rate: jax.Array, droppable: jax.Array, layers: int
) -> jax.Array:
    return jax.vmap(lambda i: skipped_by_round(jax.random.fold_in(key, i), rate, droppable, layers))(clients_K)


def fewest_skipped(config: Config, stage: Stage) -> int:
    """Return how many layers every client does without in a stage, at least."""
    if config.additions.depth_dropout_per != PER_ROUND:
        return 0
    return int(np.float32(config.additions.depth_dropout) * np.float32(stage.trained_before))
