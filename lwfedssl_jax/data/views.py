"""Two random views of each image, or one by RandAugment: pure functions under ``jit``.

Operations take one image (HxWxC floats in [0, 1]) and explicit parameters, which ``two_views`` and ``rand_augment``
draw. Sample i of a batch depends on the key and on i alone, so a padded batch gives the views of the unpadded one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

GRAY_WEIGHTS = (0.299, 0.587, 0.114)  # ITU-R 601, as in Pillow's "L"


class Recipe(NamedTuple):
    """The operations of ``two_views``, in their order; 0 leaves an operation out.

    Pairs named ``*_by_view`` hold a value for the first and one for the second view.
    """

    rotation: float = 0.0  # degrees to either side
    crop_area: tuple[float, float] = (1.0, 1.0)  # share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
    flip: float = 0.0  # probability
    jitter: float = 0.0  # probability of the four parts below
    brightness: float = 0.0  # factor within 1 -+ this
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0  # turns of the colour wheel, to either side
    grayscale: float = 0.0  # probability
    blur_by_view: tuple[float, float] = (0.0, 0.0)  # probability
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels
    solarize_by_view: tuple[float, float] = (0.0, 0.0)  # probability
    mean: float = 0.5  # normalisation, after everything else
    std: float = 0.25


RECIPES = {
    # MoCo-v3's (arXiv 2104.02057, after BYOL's): asymmetric blur and solarisation.
    "natural": Recipe(
        crop_area=(0.08, 1.0),
        flip=0.5,
        jitter=0.8,
        brightness=0.4,
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        grayscale=0.2,
        blur_by_view=(1.0, 0.1),
        solarize_by_view=(0.0, 0.2),
    ),
    # Digits: no operation that turns one into another (flips) or removes strokes (solarisation).
    "digits": Recipe(rotation=8.0, crop_area=(0.5, 1.0), jitter=1.0, brightness=0.4, contrast=0.4, mean=0.3, std=0.35),
    # Garments on black: MoCo-v3's for gray images, without operations that remove texture (blur, solarisation).
    "fashion": Recipe(crop_area=(0.3, 1.0), flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4, mean=0.286, std=0.353),
}


def two_views(key: jax.Array, images_BxHxWxC: jax.Array, recipe: Recipe, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Two independently augmented, normalised views of each image: ``view_2xBxHxWxC`` in ``dtype``.

    Args:
      key: a typed key; sample i uses ``fold_in(key, i)``.
      images_BxHxWxC: uint8.
      recipe: what to draw from.
      dtype: of the result.
    """
    wide = np.promote_types(dtype, np.float32)
    images = images_BxHxWxC.astype(wide) / 255
    blur_2, solarize_2 = jnp.array(recipe.blur_by_view, wide), jnp.array(recipe.solarize_by_view, wide)

    def sample(i: jax.Array, image: jax.Array) -> jax.Array:
        # All numbers of a sample in one draw: every draw is a long program to compile.
        draws_2xU = jax.random.uniform(jax.random.fold_in(key, i), (2, len(Draws._fields)), wide)

        def view(draws_U: jax.Array, blur: jax.Array, solarize: jax.Array) -> jax.Array:
            return _augment(image, recipe, Draws(*draws_U), blur, solarize)

        return jax.vmap(view)(draws_2xU, blur_2, solarize_2)

    view_Bx2xHxWxC = jax.vmap(sample)(jnp.arange(len(images)), images)
    return ((view_Bx2xHxWxC.swapaxes(0, 1) - recipe.mean) / recipe.std).astype(dtype)


def standardise(images_BxHxWxC: jax.Array, recipe: Recipe) -> jax.Array:
    """uint8 images, or floats in [0, 1], as ``two_views`` would return them without any augmentation, float32."""
    white = 1 if jnp.issubdtype(images_BxHxWxC.dtype, jnp.floating) else 255
    return (images_BxHxWxC.astype(jnp.float32) / white - recipe.mean) / recipe.std


class Draws(NamedTuple):
    """Uniform numbers in [0, 1) that decide one view."""

    angle: jax.Array
    area: jax.Array
    ratio: jax.Array
    top: jax.Array
    left: jax.Array
    flip: jax.Array
    jitter: jax.Array
    brightness: jax.Array
    contrast: jax.Array
    saturation: jax.Array
    hue: jax.Array
    grayscale: jax.Array
    blur: jax.Array
    sigma: jax.Array
    solarize: jax.Array


def _augment(
    image: jax.Array,
    r: Recipe,
    u: Draws,
    blur_probability: jax.Array,
    solarize_probability: jax.Array,
) -> jax.Array:
    """One random view of one image."""

    def around(centre: float, reach: float, u: jax.Array) -> jax.Array:
        return centre - reach + 2 * reach * u  # within ``reach`` of ``centre``

    if r.rotation:
        image = rotate(image, jnp.deg2rad(around(0, r.rotation, u.angle)))
    if r.crop_area != (1.0, 1.0):
        image = resized_crop(image, *random_box(u, image.shape[:2], r.crop_area, r.crop_ratio))
    if r.flip:
        image = jnp.where(u.flip < r.flip, image[:, ::-1], image)
    if r.jitter:
        jittered = adjust_brightness(image, around(1, r.brightness, u.brightness))
        jittered = adjust_contrast(jittered, around(1, r.contrast, u.contrast))
        if image.shape[-1] == 3:
            jittered = adjust_saturation(jittered, around(1, r.saturation, u.saturation))
            jittered = adjust_hue(jittered, around(0, r.hue, u.hue))
        image = jnp.where(u.jitter < r.jitter, jittered, image)
    if r.grayscale:
        image = jnp.where(u.grayscale < r.grayscale, grayscale(image), image)
    if any(r.blur_by_view):
        sigma = r.blur_sigma[0] + (r.blur_sigma[1] - r.blur_sigma[0]) * u.sigma
        image = jnp.where(u.blur < blur_probability, gaussian_blur(image, sigma), image)
    if any(r.solarize_by_view):
        image = jnp.where(u.solarize < solarize_probability, solarize(image), image)
    return image


def random_box(
    u: Draws, size: tuple[int, ...], area: tuple[float, float], ratio: tuple[float, float]
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Top, left, height and width of a random crop, in pixels (not rounded).

    Area and position are uniform, the ratio width / height is log-uniform; sides longer than the image are cut to it.
    """
    h, w = size
    pixels = h * w * (area[0] + u.area * (area[1] - area[0]))
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** u.ratio
    height, width = jnp.minimum(jnp.sqrt(pixels / aspect), h), jnp.minimum(jnp.sqrt(pixels * aspect), w)
    return u.top * (h - height), u.left * (w - width), height, width


def resized_crop(image: jax.Array, top: jax.Array, left: jax.Array, height: jax.Array, width: jax.Array) -> jax.Array:
    """The box resized to the image's own size, bilinear with antialiasing (Pillow's ``resize(box=...)``)."""
    scale = jnp.array(image.shape[:2], image.dtype) / jnp.stack([height, width])
    shift = -jnp.stack([top, left]) * scale
    return jax.image.scale_and_translate(image, image.shape, (0, 1), scale, shift, method="linear", antialias=True)


def rotate(image: jax.Array, radians: jax.Array) -> jax.Array:
    """Rotation about the centre, bilinear, edges repeated."""
    h, w = image.shape[:2]
    y, x = jnp.indices((h, w)).astype(image.dtype)
    y, x = y - (h - 1) / 2, x - (w - 1) / 2
    sin, cos = jnp.sin(radians), jnp.cos(radians)
    return _bilinear(image, cos * y + sin * x + (h - 1) / 2, cos * x - sin * y + (w - 1) / 2)


def warp(
    image: jax.Array, radians: jax.Array, shear: tuple[jax.Array, jax.Array], shift: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """Rotation about the centre, shear about the top left corner and shift; bilinear, with black from outside.

    Meant for one of the three at a time. Without any of them the image stays the same, bit for bit.

    Args:
      image: HxWxC.
      radians: counterclockwise.
      shear: rows per column, columns per row.
      shift: of the place that a pixel is taken from, in pixels, vertical and horizontal.
    """
    h, w = image.shape[:2]
    y, x = jnp.indices((h, w)).astype(image.dtype) + 0.5
    sin, cos = jnp.sin(radians), jnp.cos(radians)
    from_y = cos * y + (shear[0] + sin) * x + (shift[0] + h / 2 - (cos * h / 2 + sin * w / 2))
    from_x = cos * x + (shear[1] - sin) * y + (shift[1] + w / 2 - (cos * w / 2 - sin * h / 2))
    inside = (from_y >= 0) & (from_y < h) & (from_x >= 0) & (from_x < w)
    return jnp.where(inside[..., None], _bilinear(image, from_y - 0.5, from_x - 0.5), 0)


def _bilinear(image: jax.Array, y_HxW: jax.Array, x_HxW: jax.Array) -> jax.Array:
    """The image interpolated at fractional positions, edges repeated."""
    h, w, c = image.shape
    y, x = jnp.clip(y_HxW, 0, h - 1), jnp.clip(x_HxW, 0, w - 1)
    top, left = jnp.floor(y), jnp.floor(x)
    corner = (top * w + left).astype(jnp.int32)
    right, down = (left < w - 1).astype(jnp.int32), (top < h - 1).astype(jnp.int32) * w
    pixels = image.reshape(h * w, c)

    def take(at: jax.Array) -> jax.Array:
        return pixels.at[at].get(mode="promise_in_bounds")

    part_y, part_x = (y - top)[..., None], (x - left)[..., None]
    upper = take(corner) * (1 - part_x) + take(corner + right) * part_x
    lower = take(corner + down) * (1 - part_x) + take(corner + down + right) * part_x
    return upper * (1 - part_y) + lower * part_y


def adjust_brightness(image: jax.Array, factor: jax.Array) -> jax.Array:
    """``factor * image``, clipped."""
    return jnp.clip(factor * image, 0, 1)


def adjust_contrast(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blend with the mean of the gray image, clipped."""
    return jnp.clip(factor * image + (1 - factor) * grayscale(image).mean(), 0, 1)


def adjust_saturation(image: jax.Array, factor: jax.Array) -> jax.Array:
    """Blend with the gray image, clipped."""
    return jnp.clip(factor * image + (1 - factor) * grayscale(image), 0, 1)


def adjust_hue(image: jax.Array, turns: jax.Array) -> jax.Array:
    """Hue shifted by ``turns`` of the colour wheel, saturation and value of HSV kept."""
    value, low = image.max(-1), image.min(-1)
    chroma = value - low
    safe = jnp.where(chroma > 0, chroma, 1)
    r, g, b = image[..., 0], image[..., 1], image[..., 2]
    # Compared with each other, not with their maximum: the compiler may compute that from copies rounded differently.
    of_green_or_blue = jnp.where(g >= b, 2 + (b - r) / safe, 4 + (r - g) / safe)
    sextant = jnp.where((r >= g) & (r >= b), (g - b) / safe, of_green_or_blue)
    hue = sextant / 6 + turns

    # To RGB: each channel is `value - chroma * clip(min(k, 4 - k), 0, 1)`, k its distance on the wheel in sextants.
    offset = jnp.array([5, 3, 1], image.dtype) / 6
    turn = hue[..., None] + offset[None, None]
    k = 6 * (turn - jnp.floor(turn))  # floor: `%` is many times slower on a CPU
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(k, 4 - k), 0, 1)


def grayscale(image: jax.Array) -> jax.Array:
    """ITU-R 601 luma in all channels; images of one channel stay as they are."""
    if image.shape[-1] != 3:
        return image
    luma = (image @ jnp.array(GRAY_WEIGHTS, image.dtype))[..., None]
    return jnp.broadcast_to(luma, image.shape)


def gaussian_blur(image: jax.Array, sigma: jax.Array) -> jax.Array:
    """Gaussian blur of standard deviation ``sigma`` pixels; weights outside the image are left out."""

    def weights(n: int) -> jax.Array:
        i = jnp.arange(n, dtype=image.dtype)
        w = jnp.exp(-0.5 * ((i[:, None] - i[None, :]) / sigma) ** 2)
        return w / w.sum(1, keepdims=True)

    h, w, _ = image.shape
    return jnp.einsum("ij,jkc->ikc", weights(h), jnp.einsum("kl,jlc->jkc", weights(w), image))


def solarize(image: jax.Array, threshold: float = 128 / 255) -> jax.Array:
    """Pixels of at least this intensity inverted."""
    return jnp.where(image >= threshold, 1 - image, image)
