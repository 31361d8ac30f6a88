"""Depth dropout: which layers a step runs (Guo et al., 2023)."""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from lwfedssl_jax.method.task import Broadcast, Route, Task
from lwfedssl_jax.models.encoder import Depth
from lwfedssl_jax.system import seeds


def kept_layers(
    key: jax.Array, rate: ArrayLike, droppable: Depth, first: Depth, depth: Depth, layers: int
) -> tuple[jax.Array, jax.Array]:
    """Draw which of ``depth`` layers the forward passes of a step run (Guo et al., 2023).

    Args:
      key: of the step.
      rate: probability that a layer is skipped.
      droppable: how many of the encoder's first layers can be skipped.
      first: number of the encoder's layers before these.
      depth: number of these layers.
      layers: L.

    Returns:
      Numbers of the layers that run, counted from ``first``, in order and before all others; how
      many they are.
    """
    skipped_L = jax.random.uniform(jax.random.fold_in(key, seeds.StepTag.DEPTH_DROPOUT), (layers,), jnp.float32) < rate
    number_L = jnp.arange(layers) + first
    runs_L = (number_L < first + depth) & ~(jnp.take(skipped_L, number_L, mode="clip") & (number_L < droppable))
    return jnp.argsort(~runs_L, stable=True).astype(jnp.int32), runs_L.sum(dtype=jnp.int32)


def routes(task: Task, broadcast: Broadcast, key: jax.Array) -> tuple[Route, Route]:
    """Return which trainable and which frozen layers a step runs: all, or those that depth dropout keeps."""
    if not task.drops_layers:
        return (broadcast.depth, None), (broadcast.frozen_depth, None)
    kept = functools.partial(kept_layers, key, task.hyper.depth_dropout, broadcast.droppable, layers=task.layers)
    order, count = kept(broadcast.frozen_depth, broadcast.depth)
    frozen_order, frozen_count = kept(0, broadcast.frozen_depth)
    return (count, order), (frozen_count, frozen_order)
