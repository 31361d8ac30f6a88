"""The decoder of a masked autoencoder: from the tokens of visible patches to the pixels of all patches."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lwfedssl_jax.models.dense import XAVIER, Dense
from lwfedssl_jax.models.heads import Head
from lwfedssl_jax.models.vit import Block, LayerNorm
from lwfedssl_jax.tree import Tree


class DecoderSize(NamedTuple):
    """Sizes of a decoder.

    Attributes:
      patches, numbers: of an image's patches, P, and of the numbers of each, F.
      width, depth, heads: of its transformer blocks.
    """

    patches: int
    numbers: int
    width: int
    depth: int
    heads: int


class Decoder(nn.Module):
    """Transformer blocks over the tokens of visible patches and a learned token in the place of every other patch.

    As in He et al., 2022 (arXiv 2111.06377), but with learned positions, as in the encoder.
    """

    size: DecoderSize
    dtype: DTypeLike
    param_dtype: DTypeLike
    remat: bool = False

    @nn.compact
    def __call__(self, tokens_BxVxD: jax.Array, position_BxV: jax.Array) -> jax.Array:
        size, (b, v, d) = self.size, tokens_BxVxD.shape
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": XAVIER}
        small = nn.initializers.normal(0.02)
        token_E = self.param("mask_token", small, (size.width,), self.param_dtype)
        position_PxE = self.param("position", small, (size.patches, size.width), self.param_dtype)
        visible = Dense(size.width, name="embed", **types)(tokens_BxVxD.reshape(b * v, d)).reshape(b, v, size.width)
        visible = visible.astype(self.param_dtype)
        x = jnp.broadcast_to(token_E, (b, size.patches, size.width))
        x = x.at[jnp.arange(b)[:, None], position_BxV].set(visible) + position_PxE[None]
        x = x.astype(self.dtype)
        block = nn.remat(Block) if self.remat else Block
        for i in range(size.depth):
            x = block(size.heads, self.dtype, self.param_dtype, name=f"block{i + 1}")(x)
        x = LayerNorm(self.param_dtype, name="norm")(x).reshape(b * size.patches, size.width)
        pixels = Dense(size.numbers, name="pixels", **types)(x).astype(self.param_dtype)
        return pixels.reshape(b, size.patches, size.numbers)


def decoder_head(size: DecoderSize, feature_dim: int, dtype: DTypeLike, *, remat: bool = False) -> Head:
    """A decoder as a head: ``apply(params, tokens_BxVxD, position_BxV) -> numbers_BxPxF``.

    Args:
      size: of the decoder.
      feature_dim: D, of the tokens.
      dtype: of what matrix products take and give, and of tokens between blocks.
      remat: keep only each block's input for the backward pass and recompute the rest.
    """
    decoder = Decoder(size, dtype, np.promote_types(dtype, jnp.float32), remat)

    def init(key: jax.Array) -> Tree:
        return decoder.init(key, jnp.zeros((1, 1, feature_dim), decoder.param_dtype), jnp.zeros((1, 1), int))["params"]

    def apply(params: Tree, tokens_BxVxD: jax.Array, position_BxV: jax.Array) -> jax.Array:
        return decoder.apply({"params": params}, tokens_BxVxD, position_BxV)  # type: ignore[return-value]

    return Head(init, apply)
