"""Matrix products of factors in a chosen type, summed in float32, and the linear layer made of them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

# How products of float32 factors are computed, by ``runtime.precision``. JAX's default is TF32 on GPUs.
PRODUCTS = {"float32": "highest", "tensorfloat32": "high", "bfloat16": "highest"}

XAVIER = nn.initializers.xavier_uniform()

PRODUCT = "product"
SAVED = jax.checkpoint_policies.save_only_these_names(PRODUCT)  # keeps what ``product`` marks, and recomputes the rest


def product(x: jax.Array) -> jax.Array:
    """Mark the result of a matrix product, as it is to be kept for the backward pass (``SAVED``)."""
    return checkpoint_name(x, PRODUCT)


def factor_type(precision: str) -> np.dtype:
    """Return the type to which ``runtime.precision`` rounds the factors and results of matrix products."""
    return jnp.dtype("float32" if precision == "tensorfloat32" else precision)


def is_narrow(dtype: DTypeLike) -> bool:
    """Whether a type is narrower than float32."""
    return bool(np.promote_types(dtype, np.float32) != dtype)


def contract(spec: str, dtype: DTypeLike, a: jax.Array, b: jax.Array) -> jax.Array:
    """``jnp.einsum(spec, a, b)`` with factors rounded to ``dtype``, a sum in float32 or wider, rounded to ``dtype``.

    Both products of the backward pass are rounded and summed alike: left to automatic
    differentiation they would mix types, and the matrix units would idle. Gradients of ``b``,
    such as weights, are not rounded if ``b`` is not. Every index of ``spec`` must be in two of
    its three terms.
    """
    if is_narrow(dtype):
        return _narrow_contract(spec, dtype, dtype, a.astype(dtype), b)
    return jnp.einsum(spec, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _narrow_contract(spec: str, dtype: DTypeLike, to: DTypeLike, a: jax.Array, b: jax.Array) -> jax.Array:
    """``contract`` with a result of type ``to``, as which a factor's gradient is asked for."""
    return _forward(spec, dtype, to, a, b)[0]


def _forward(
    spec: str, dtype: DTypeLike, to: DTypeLike, a: jax.Array, b: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # The product itself, not a call of ``_narrow_contract``: policies of ``jax.checkpoint`` do not see into that.
    y = jnp.einsum(spec, a.astype(dtype), b.astype(dtype), precision="default", preferred_element_type=jnp.float32)
    return y.astype(to), (a, b)


def _backward(
    spec: str, dtype: DTypeLike, to: DTypeLike, saved: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del to
    a, b = saved
    factors, result = spec.split("->")
    of_a, of_b = factors.split(",")
    return (
        _narrow_contract(f"{result},{of_b}->{of_a}", dtype, a.dtype, g, b),
        _narrow_contract(f"{of_a},{result}->{of_b}", dtype, b.dtype, a, g),
    )


_narrow_contract.defvjp(_forward, _backward)


class Dense(nn.Module):
    """``x_NxD @ kernel + bias`` in ``dtype``, the product by ``contract``."""

    features: int
    dtype: DTypeLike
    param_dtype: DTypeLike
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    use_bias: bool = True

    @nn.compact
    def __call__(self, x_NxD: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x_NxD.shape[-1], self.features), self.param_dtype)
        y = contract("nd,de->ne", self.dtype, x_NxD, kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y = y.astype(self.param_dtype) + bias[None]
        return product(y.astype(self.dtype))
