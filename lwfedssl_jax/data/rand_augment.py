"""RandAugment, for fine-tuning (Cubuk et al., 2020)."""

import math
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lwfedssl_jax.data.views import Recipe, adjust_brightness, adjust_contrast, adjust_saturation, solarize, warp

# RandAugment (arXiv 1909.13719) with torchvision's operations, ranges and defaults.
OPERATIONS = (
    "identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast",
    "sharpness", "posterize", "solarize", "autocontrast", "equalize",
)  # fmt: skip
OPERATIONS_DRAWN = 2  # N
MAGNITUDE, LARGEST_MAGNITUDE = 9, 30  # M, and its largest value


def rand_augment(key: jax.Array, images_BxHxWxC: jax.Array, recipe: Recipe, dtype: DTypeLike) -> jax.Array:
    """Each image after ``OPERATIONS_DRAWN`` random operations, normalised: ``view_BxHxWxC`` in ``dtype``.

    Args:
      key: a typed key; sample i uses ``fold_in(key, i)``.
      images_BxHxWxC: uint8.
      recipe: only its normalisation is used.
      dtype: of the result.
    """
    wide = np.promote_types(dtype, np.float32)

    def sample(i: jax.Array, image: jax.Array) -> jax.Array:
        draws = jax.random.uniform(jax.random.fold_in(key, i), (OPERATIONS_DRAWN, 2), wide)

        def step(image: jax.Array, draw: jax.Array) -> tuple[jax.Array, None]:
            operation = (draw[0] * len(OPERATIONS)).astype(jnp.int32)
            return operate(image, operation, jnp.where(draw[1] < 0.5, -1, 1).astype(wide)), None

        # A loop, so that XLA keeps each operation's result: unrolled, it computes many pixels again and again.
        return jax.lax.scan(step, image, draws)[0]

    views = jax.vmap(sample)(jnp.arange(len(images_BxHxWxC)), images_BxHxWxC.astype(wide) / 255)
    return ((views - recipe.mean) / recipe.std).astype(dtype)


def operate(
    image: jax.Array, operation: jax.Array, sign: jax.Array, magnitude: float = MAGNITUDE / LARGEST_MAGNITUDE
) -> jax.Array:
    """Apply one of ``OPERATIONS``, by its number.

    Args:
      image: floats in [0, 1].
      operation: its index in ``OPERATIONS``.
      sign: -1 or 1, the direction of operations that have two.
      magnitude: as a share of the largest.
    """
    h, w = image.shape[:2]
    factor = 1 + 0.9 * magnitude * sign

    def only(name: str, value: float) -> jax.Array:
        return jnp.where(operation == OPERATIONS.index(name), value * sign, 0)

    def geometric(image: jax.Array) -> jax.Array:
        shear = only("shear_y", 0.3 * magnitude), only("shear_x", 0.3 * magnitude)
        # Whole pixels, which do not blur.
        shift = only("translate_y", int(150 / 331 * h * magnitude)), only("translate_x", int(150 / 331 * w * magnitude))
        return warp(image, only("rotate", math.radians(30 * magnitude)), shear, shift)

    branches: list[Callable[[jax.Array], jax.Array]] = [
        geometric,
        lambda x: adjust_brightness(x, factor),
        lambda x: adjust_saturation(x, factor),
        lambda x: adjust_contrast(x, factor),
        lambda x: adjust_sharpness(x, factor),
        lambda x: posterize(x, 8 - round(4 * magnitude)),
        lambda x: solarize(x, 1 - magnitude),
        autocontrast,
        equalize,
    ]
    # In a batch every branch runs on every image: identity and all geometric operations are one branch.
    first = len(OPERATIONS) - len(branches)
    return cast(jax.Array, jax.lax.switch(jnp.maximum(operation - first, 0), branches, image))


def adjust_sharpness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blend with the image smoothed by a 3x3 kernel of ones around a five, clipped; edges stay."""
    rows = image[:-2] + image[1:-1] + image[2:]
    box = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    inner = image[1:-1, 1:-1]
    smooth = image.at[1:-1, 1:-1].set((box + 4 * inner) / 13)
    return jnp.clip(factor * image + (1 - factor) * smooth, 0, 1)


def posterize(image: jax.Array, bits: int) -> jax.Array:
    """Only the highest bits of each of 256 levels kept."""
    step = 2 ** (8 - bits)
    return jnp.floor(jnp.round(image * 255) / step) * step / 255


def autocontrast(image: jax.Array) -> jax.Array:
    """Each channel stretched to the whole range."""
    low, high = image.min((0, 1), keepdims=True), image.max((0, 1), keepdims=True)
    flat = low == high
    return jnp.where(flat, image, (image - low) / jnp.where(flat, 1, high - low))


def equalize(image: jax.Array) -> jax.Array:
    """Each channel's levels spread so that all are about as frequent (Pillow's ``ImageOps.equalize``)."""

    def channel(plane_HxW: jax.Array) -> jax.Array:
        level = jnp.round(plane_HxW * 255).astype(jnp.int32)
        count = jnp.zeros(256, jnp.int32).at[level].add(1)
        step = (level.size - count[level.max()]) // 255
        safe = jnp.maximum(step, 1)
        table = jnp.minimum((jnp.cumsum(count) - count + safe // 2) // safe, 255)
        return jnp.where(step > 0, table[level].astype(image.dtype) / 255, plane_HxW)

    return jax.vmap(channel, in_axes=-1, out_axes=-1)(image)
