"""Vision transformer with stacked blocks, split into a frozen and a trainable part.

Pre-norm blocks, learned position embedding, tokens mean-pooled, no class token
(arXiv 2401.11647 on ViT-Tiny). Layer 1 owns the patch and position embedding;
the final normalisation belongs to no layer and is trained in every stage.

How many of the stacked blocks run is an argument, so one program serves all stages.
"""

import functools
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lwfedssl_jax.config import ModelConfig
from lwfedssl_jax.models.attention import attention
from lwfedssl_jax.models.dense import SAVED, XAVIER, Dense
from lwfedssl_jax.models.encoder import EVERY_STAGE, Depth, Encoder, Patches
from lwfedssl_jax.models.loops import chunk_samples, dynamic_scan, in_chunks, row
from lwfedssl_jax.tree import Tree


@jax.jit  # the name marks it for the operation count in costs/operations.py; XLA inlines it
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """``(x - mean) / sqrt(var + 1e-6) * scale + bias`` over the last axis."""
    x = x.astype(scale.dtype)
    # The variance in two passes: E[x^2] - E[x]^2 cancels where the mean is large.
    x = jax.nn.standardize(x, axis=-1, epsilon=1e-6, variance=x.var(-1, keepdims=True))
    return x * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)


class LayerNorm(nn.Module):
    """Layer normalisation with learned scale and bias."""

    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return layer_norm(x, scale, bias)


def patches_of(images_BxHxWxC: jax.Array, patch_size: int) -> jax.Array:
    """Cut images into square patches, row by row: BxPxF, F numbers of each."""
    b, h, w, c = images_BxHxWxC.shape
    p = patch_size
    x = images_BxHxWxC.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, -1, p * p * c)


class Embedding(nn.Module):
    """Images, or some of their patches, to tokens: patch embedding as reshape and matrix product, plus positions."""

    patch_size: int
    width: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    patches: int

    @nn.compact
    def __call__(self, images: jax.Array | Patches) -> jax.Array:
        position_PxD = self.param(
            "position", nn.initializers.normal(0.02), (self.patches, self.width), self.param_dtype
        )
        if isinstance(images, Patches):
            values_BxVxF, position = images.values, position_PxD[images.positions]
        else:
            values_BxVxF, position = patches_of(images, self.patch_size), position_PxD[None]
        dense = Dense(self.width, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=XAVIER, name="patch")
        b, v, f = values_BxVxF.shape
        x = dense(values_BxVxF.reshape(b * v, f)).reshape(b, v, self.width).astype(self.param_dtype) + position
        return x.astype(self.dtype)


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
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": XAVIER}
        norm = functools.partial(LayerNorm, self.param_dtype)
        x = x_BxPxD.reshape(b * p, d)

        qkv = Dense(3 * d, name="qkv", **types)(norm(name="norm1")(x))
        mixed = attention(qkv.reshape(b, p, 3, self.heads, d // self.heads), self.dtype).reshape(b * p, d)
        x = x + Dense(d, name="proj", **types)(mixed)

        hidden = Dense(4 * d, name="fc1", **types)(norm(name="norm2")(x))
        x = x + Dense(d, name="fc2", **types)(gelu(hidden.astype(self.param_dtype)))
        return x.reshape(b, p, d)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, ``x * Phi(x)``; flax's goes through erfc, twice the work on a CPU."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


class Vit(NamedTuple):
    """The parts of a vision transformer; one block for all layers, whose parameters are stacked."""

    embedding: Embedding
    block: Block
    norm: LayerNorm


def vit(config: ModelConfig, image_shape: tuple[int, int, int], dtype: DTypeLike, *, remat: bool = False) -> Encoder:
    """A vision transformer of the config's size for images of shape (H, W, C).

    Args:
      config: resolved sizes (no zeros).
      image_shape: height, width, channels.
      dtype: of what matrix products take and give, of tokens between blocks, and so of what is kept for the backward
        pass; normalisation, softmax and everything else is computed in float32 or wider.
      remat: keep only each trainable block's input for the backward pass and recompute the
        rest; otherwise all matrix products are kept, except for those of a fused attention, and what lies between is
        recomputed.
    """
    wide = np.promote_types(dtype, jnp.float32)
    tokens = image_shape[0] * image_shape[1] // config.patch_size**2
    embedding = Embedding(config.patch_size, config.width, dtype, wide, tokens)
    block, norm = Block(config.heads, dtype, wide), LayerNorm(wide)
    policy = None if remat else SAVED
    run_block = jax.checkpoint(functools.partial(_apply, block), policy=policy)
    chunk = chunk_samples(tokens * 4 * config.width)
    run_blocks = dynamic_scan(lambda params, x: in_chunks(functools.partial(run_block, params), x, chunk))

    def frozen_forward(
        frozen: Tree, images: jax.Array | Patches, depth: Depth, order: jax.Array | None = None
    ) -> jax.Array | Patches:
        weights = frozen["encoder"]
        if not jax.tree.leaves(weights):
            return images

        def run_layers(x: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, depth, lambda i, x: _apply(block, row(weights["blocks"], i, order), x), x)

        return in_chunks(run_layers, _apply(embedding, weights["embedding"], images), chunk)

    def trainable_tokens(
        trainable: Tree, x: Any, mask_B: jax.Array, depth: Depth, order: jax.Array | None = None
    ) -> tuple[jax.Array, Tree]:
        del mask_B  # samples do not see each other
        weights = trainable["encoder"]
        if jax.tree.leaves(weights["embedding"]):
            x = _apply(embedding, weights["embedding"], x)
        if jax.tree.leaves(weights["blocks"]):
            x = run_blocks(weights["blocks"], x, depth, order)
        return _apply(norm, weights["norm"], x), {}

    def trainable_forward(
        trainable: Tree, x: Any, mask_B: jax.Array, depth: Depth, order: jax.Array | None = None
    ) -> tuple[jax.Array, Tree]:
        tokens, statistics = trainable_tokens(trainable, x, mask_B, depth, order)
        return tokens.mean(axis=1), statistics

    init = functools.partial(init_vit, Vit(embedding, block, norm), config.depth, image_shape)
    return Encoder(
        init=init,
        layers=functools.partial(vit_layers, config.depth),
        frozen_forward=frozen_forward,
        trainable_forward=trainable_forward,
        feature_dim=config.width,
        patch_size=config.patch_size,
        trainable_tokens=trainable_tokens,
    )


def init_vit(modules: Vit, depth: int, image_shape: tuple[int, int, int], key: jax.Array) -> Tree:
    """Fresh parameters of ``depth`` layers."""
    wide, (height, width, _), patch = modules.norm.param_dtype, image_shape, modules.embedding.patch_size
    image = jnp.zeros((1, *image_shape), wide)
    tokens = jnp.zeros((1, height * width // patch**2, modules.embedding.width), modules.block.dtype)
    embedding_key, blocks_key, norm_key = jax.random.split(key, 3)

    def init_block(key: jax.Array) -> Tree:
        return modules.block.init(key, tokens)["params"]

    weights = {
        "embedding": modules.embedding.init(embedding_key, image)["params"],
        "blocks": jax.vmap(init_block)(jax.random.split(blocks_key, depth)),
        "norm": modules.norm.init(norm_key, tokens)["params"],
    }
    return {"encoder": weights, "statistics": {}}


def vit_layers(depth: int, params: Tree) -> Tree:
    """The layer number of each parameter; those of blocks are stacked."""
    numbers = {"embedding": np.array(1), "blocks": np.arange(1, depth + 1), "norm": np.array(EVERY_STAGE)}
    weights = {part: jax.tree.map(lambda _, n=n: n, params["encoder"][part]) for part, n in numbers.items()}
    return {"encoder": weights, "statistics": {}}


def _apply(module: nn.Module, params: Tree, x: Any) -> jax.Array:
    return cast(jax.Array, module.apply({"params": params}, x))
