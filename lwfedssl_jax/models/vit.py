"""Vision transformer with stacked blocks, split into a frozen and a trainable part.

Pre-norm blocks, learned position embedding, tokens mean-pooled, no class token
(METHOD: arXiv 2401.11647 on ViT-Tiny). Layer 1 owns the patch and position embedding;
the final normalisation belongs to no layer and is trained in every stage.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lwfedssl_jax.config import ModelConfig
from lwfedssl_jax.tree import Tree

EVERY_STAGE = 0  # layer number of parameters that every stage trains


class Encoder(NamedTuple):
    """Pure functions of an encoder F.

    Attributes:
      init: ``key -> params`` with all L layers.
      layers: ``params -> tree`` of each parameter's layer number 1..L, or ``EVERY_STAGE``;
        a vector where a parameter is stacked over layers.
      frozen_forward: ``(frozen, images_BxHxWxC) -> x``, the layers before the trainable
        ones; the images themselves where nothing is frozen.
      trainable_forward: ``(trainable, x) -> features_BxD`` from what ``frozen_forward`` gave.
    """

    init: Callable[[jax.Array], Tree]
    layers: Callable[[Tree], Tree]
    frozen_forward: Callable[[Tree, jax.Array], jax.Array]
    trainable_forward: Callable[[Tree, jax.Array], jax.Array]


@jax.jit  # the name marks it for the operation count in resources.py; XLA inlines it
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """``(x - mean) / sqrt(var + 1e-6) * scale + bias`` over the last axis, statistics in float32 or wider."""
    wide = x.astype(np.promote_types(x.dtype, np.float32))
    # The variance in two passes: E[x^2] - E[x]^2 cancels where the mean is large.
    wide = jax.nn.standardize(wide, axis=-1, epsilon=1e-6, variance=wide.var(-1, keepdims=True))
    return wide.astype(x.dtype) * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)


class LayerNorm(nn.Module):
    """Layer normalisation with learned scale and bias, computed in ``dtype``."""

    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return layer_norm(x, scale.astype(self.dtype), bias.astype(self.dtype))


class Embedding(nn.Module):
    """Images to tokens: patch embedding as reshape and matrix product, plus positions."""

    patch_size: int
    width: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
        b, h, w, c = images_BxHxWxC.shape
        p = self.patch_size
        x = images_BxHxWxC.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, p * p * c)
        dense = nn.Dense(self.width, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=XAVIER, name="patch")
        position_PxD = self.param(
            "position", nn.initializers.normal(0.02), (h * w // p**2, self.width), self.param_dtype
        )
        return dense(x).reshape(b, -1, self.width) + position_PxD.astype(self.dtype)[None]


class Block(nn.Module):
    """Pre-norm transformer block: attention and a 4x MLP with exact GELU, both residual.

    Matrix products run on flattened tokens: the weight gradient of a rank-3 product is
    several times slower on a CPU.
    """

    heads: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BxPxD: jax.Array) -> jax.Array:
        b, p, d = x_BxPxD.shape
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = x_BxPxD.reshape(b * p, d)

        qkv = nn.Dense(3 * d, kernel_init=XAVIER, name="qkv", **types)(LayerNorm(name="norm1", **types)(x))
        q, k, v = qkv.reshape(b, p, 3, self.heads, d // self.heads).transpose(2, 0, 3, 1, 4)
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) * (d // self.heads) ** -0.5
        weights = nn.softmax(scores.astype(np.promote_types(self.dtype, np.float32))).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, v)
        mixed = mixed.transpose(0, 2, 1, 3).reshape(b * p, d)
        x = x + nn.Dense(d, kernel_init=XAVIER, name="proj", **types)(mixed)

        hidden = nn.Dense(4 * d, kernel_init=XAVIER, name="fc1", **types)(LayerNorm(name="norm2", **types)(x))
        x = x + nn.Dense(d, kernel_init=XAVIER, name="fc2", **types)(nn.gelu(hidden, approximate=False))
        return x.reshape(b, p, d)


XAVIER = nn.initializers.xavier_uniform()


def vit(config: ModelConfig, image_shape: tuple[int, int, int], dtype: DTypeLike, *, remat: bool = False) -> Encoder:
    """A vision transformer of the config's size for images of shape (H, W, C).

    Args:
      config: resolved sizes (no zeros).
      image_shape: height, width, channels.
      dtype: compute type; parameters are kept in it, or in float32 if that is wider.
      remat: recompute each trainable block's activations in the backward pass.
    """
    types: Any = {"dtype": dtype, "param_dtype": np.promote_types(dtype, jnp.float32)}
    embedding = Embedding(config.patch_size, config.width, **types)
    block = Block(config.heads, **types)
    norm = LayerNorm(**types)

    def init(key: jax.Array) -> Tree:
        image = jnp.zeros((1, *image_shape), dtype)
        tokens = jnp.zeros((1, image_shape[0] * image_shape[1] // config.patch_size**2, config.width), dtype)
        embedding_key, blocks_key, norm_key = jax.random.split(key, 3)
        return {
            "embedding": embedding.init(embedding_key, image)["params"],
            "blocks": jax.vmap(lambda k: block.init(k, tokens)["params"])(jax.random.split(blocks_key, config.depth)),
            "norm": norm.init(norm_key, tokens)["params"],
        }

    def layers(params: Tree) -> Tree:
        return {
            "embedding": jax.tree.map(lambda _: np.array(1), params["embedding"]),
            "blocks": jax.tree.map(lambda _: np.arange(1, config.depth + 1), params["blocks"]),
            "norm": jax.tree.map(lambda _: np.array(EVERY_STAGE), params["norm"]),
        }

    def apply(module: nn.Module, params: Tree, x: jax.Array) -> jax.Array:
        return cast(jax.Array, module.apply({"params": params}, x.astype(dtype)))

    def run_blocks(params_L: Tree, x: jax.Array, *, unroll: bool, remat: bool) -> jax.Array:
        def body(x: jax.Array, params: Tree) -> tuple[jax.Array, None]:
            return apply(block, params, x), None

        return jax.lax.scan(jax.checkpoint(body) if remat else body, x, params_L, unroll=unroll)[0]

    def frozen_forward(frozen: Tree, images: jax.Array) -> jax.Array:
        if not jax.tree.leaves(frozen):
            return images
        return run_blocks(frozen["blocks"], apply(embedding, frozen["embedding"], images), unroll=False, remat=False)

    def trainable_forward(trainable: Tree, x: jax.Array) -> jax.Array:
        if jax.tree.leaves(trainable["embedding"]):
            x = apply(embedding, trainable["embedding"], x)
        if jax.tree.leaves(trainable["blocks"]):
            # Unrolled, XLA keeps fewer copies of the activations; rematerialisation needs the loop,
            # because on unrolled code XLA merges the recomputation with the original.
            x = run_blocks(trainable["blocks"], x, unroll=not remat, remat=remat)
        return apply(norm, trainable["norm"], x).mean(axis=1)

    return Encoder(init, layers, frozen_forward, trainable_forward)
