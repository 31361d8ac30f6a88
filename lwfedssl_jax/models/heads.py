"""Projection and prediction heads H and Q: MLPs with batch normalisation inside."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lwfedssl_jax.models.dense import Dense
from lwfedssl_jax.tree import Tree


class Head(NamedTuple):
    """Pure functions of a head: ``init(key) -> params``, ``apply(params, x_BxD, mask_B) -> z_BxO``.

    A decoder takes tokens and their positions instead (decoder.py).
    """

    init: Callable[[jax.Array], Tree]
    apply: Callable[[Tree, jax.Array, jax.Array], jax.Array]


class MLP(nn.Module):
    """``layers`` linear maps with batch normalisation and ReLU between them.

    Batch statistics are those of the batch's unmasked rows, in training and ever: the head
    keeps no running averages.
    """

    layers: int
    hidden_dim: int
    output_dim: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BxD: jax.Array, mask_B: jax.Array) -> jax.Array:
        wide: dict[str, Any] = {"dtype": self.param_dtype, "param_dtype": self.param_dtype}
        x = x_BxD
        for _ in range(self.layers - 1):
            x = Dense(self.hidden_dim, self.dtype, self.param_dtype, use_bias=False)(x).astype(self.param_dtype)
            x = nn.BatchNorm(use_running_average=False, use_fast_variance=False, **wide)(x, mask=mask_B[:, None])
            x = nn.relu(x)
        return Dense(self.output_dim, self.dtype, self.param_dtype, use_bias=False)(x)


def mlp_head(layers: int, input_dim: int, hidden_dim: int, output_dim: int, dtype: DTypeLike) -> Head:
    """A head of ``layers`` linear maps: 3 for the projection H, 2 for the prediction Q."""
    mlp = MLP(layers, hidden_dim, output_dim, dtype, np.promote_types(dtype, jnp.float32))

    def init(key: jax.Array) -> Tree:
        return mlp.init(key, jnp.zeros((2, input_dim), mlp.param_dtype), jnp.ones(2, bool))["params"]

    def apply(params: Tree, x_BxD: jax.Array, mask_B: jax.Array) -> jax.Array:
        # Linen insists on running averages; they are made and dropped in the same call.
        z, _ = mlp.apply({"params": params}, x_BxD, mask_B, mutable=["batch_stats"])
        return z.astype(mlp.param_dtype)

    return Head(init, apply)
