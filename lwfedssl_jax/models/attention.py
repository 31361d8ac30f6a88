"""Attention, ``softmax(q k^T / sqrt(H)) v``: by cuDNN where it can, and otherwise as two matrix products."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lwfedssl_jax.models.dense import contract, product


def attention(qkv_BxPx3xNxH: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The values of P tokens, mixed by attention with N heads of H features: BxPx(NH).

    Args:
      qkv_BxPx3xNxH: queries, keys and values.
      dtype: of the matrix products' factors and of their results; softmax is computed in float32 or wider.
    """
    b, p, _, n, h = qkv_BxPx3xNxH.shape
    if _may_be_fused.get() and has_fused_attention(np.dtype(dtype), p, h):
        q, k, v = (qkv_BxPx3xNxH[:, :, i] for i in range(3))
        return fused(q, k, v).reshape(b, p, n * h)  # the backward pass computes it again
    wide = np.promote_types(dtype, jnp.float32)
    q, k, v = qkv_BxPx3xNxH.transpose(2, 0, 3, 1, 4)
    scores = product(contract("bhqd,bhkd->bhqk", dtype, q * h**-0.5, k)).astype(wide)
    # Softmax that divides last, where there are fewest numbers to divide.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    mixed = product(contract("bhqk,bhkd->bhqd", dtype, weights, v)).astype(wide) / weights.sum(-1, keepdims=True)
    return mixed.transpose(0, 2, 1, 3).reshape(b, p, n * h)


_may_be_fused = contextvars.ContextVar("may_be_fused", default=True)


@contextlib.contextmanager
def as_products() -> Iterator[None]:
    """Trace attention as matrix products on every device, so that operations can be counted."""
    token = _may_be_fused.set(False)
    try:
        yield
    finally:
        _may_be_fused.reset(token)


fused = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


@functools.cache
def has_fused_attention(dtype: np.dtype, tokens: int, features: int) -> bool:
    """Whether a kernel that keeps no scores in memory runs on this device: cuDNN's, on GPUs, in bfloat16."""
    if jax.default_backend() != "gpu" or dtype != jnp.bfloat16:
        return False
    try:
        with jax.ensure_compile_time_eval():
            x = jnp.ones((1, tokens, 1, features), dtype)
            y, pullback = jax.vjp(fused, x, x, x)
            jax.block_until_ready(pullback(y))
    except (RuntimeError, ValueError):  # no cuDNN, or none for this device or these sizes
        return False
    return True
