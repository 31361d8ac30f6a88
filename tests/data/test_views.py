"""Every operation of the views against plain NumPy, SciPy or Pillow."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image, ImageEnhance, ImageOps

from lwfedssl_jax.data.rand_augment import OPERATIONS, autocontrast, equalize, operate, rand_augment
from lwfedssl_jax.data.views import (
    RECIPES,
    Draws,
    Recipe,
    adjust_brightness,
    adjust_contrast,
    adjust_hue,
    adjust_saturation,
    gaussian_blur,
    grayscale,
    random_box,
    resized_crop,
    rotate,
    solarize,
    two_views,
)

RNG = np.random.default_rng(0)
UINT8 = RNG.integers(0, 256, (12, 10, 3), dtype=np.uint8)
IMAGE = jnp.asarray(UINT8, jnp.float32) / 255
PILLOW = Image.fromarray(UINT8)
ROUNDING = 1.5 / 255  # Pillow rounds to whole levels


def close(ours: jax.Array, pillow: Image.Image, tolerance: float = ROUNDING) -> None:
    np.testing.assert_allclose(ours, np.asarray(pillow, np.float32) / 255, atol=tolerance)


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_brightness(factor: float) -> None:
    close(adjust_brightness(IMAGE, jnp.float32(factor)), ImageEnhance.Brightness(PILLOW).enhance(factor))


@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_contrast(factor: float) -> None:
    close(adjust_contrast(IMAGE, jnp.float32(factor)), ImageEnhance.Contrast(PILLOW).enhance(factor))


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.2])
def test_saturation(factor: float) -> None:
    close(adjust_saturation(IMAGE, jnp.float32(factor)), ImageEnhance.Color(PILLOW).enhance(factor))


@pytest.mark.parametrize("turns", [-0.1, 0.0, 0.04, 0.5])
def test_hue(turns: float) -> None:
    image = IMAGE.at[0, 0].set(0.5).at[0, 1].set(0.0)  # grays have no hue to turn
    ties = [[0.6, 0.6, 0.2], [0.2, 0.6, 0.6], [0.6, 0.2, 0.6], [0.2, 0.2, 0.6], [0.2, 0.6, 0.2], [0.6, 0.2, 0.2]]
    image = image.at[1, :6].set(jnp.array(ties, jnp.float32))
    expected = np.empty(image.shape)
    for at in np.ndindex(image.shape[:2]):
        h, s, v = colorsys.rgb_to_hsv(*np.asarray(image)[at].tolist())
        expected[at] = colorsys.hsv_to_rgb((h + turns) % 1, s, v)
    np.testing.assert_allclose(adjust_hue(image, jnp.float32(turns)), expected, atol=1e-5)


def test_hue_does_not_depend_on_equal_rounding() -> None:
    """A compiler may compute a channel and the maximum of all with different rounding, so none is searched for."""
    assert " eq " not in str(jax.make_jaxpr(adjust_hue)(IMAGE, jnp.float32(0.1)))


def test_grayscale() -> None:
    close(grayscale(IMAGE), PILLOW.convert("L").convert("RGB"))
    one_channel = IMAGE[..., :1]
    np.testing.assert_array_equal(grayscale(one_channel), one_channel)


def test_solarize() -> None:
    close(solarize(IMAGE), ImageOps.solarize(PILLOW, 128), 1e-6)


@pytest.mark.parametrize("sigma", [0.1, 0.8, 2.0])
def test_blur(sigma: float) -> None:
    blur = lambda x: scipy.ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="constant", truncate=20)  # noqa: E731
    inside = blur(np.ones(UINT8.shape))  # weights outside the image are left out
    expected = blur(np.asarray(IMAGE, np.float64)) / inside
    np.testing.assert_allclose(gaussian_blur(IMAGE, jnp.float32(sigma)), expected, atol=1e-5)


@pytest.mark.parametrize("box", [(0.0, 0.0, 12.0, 10.0), (2.0, 3.0, 6.0, 5.0), (1.3, 0.7, 9.1, 4.2)])
def test_resized_crop(box: tuple[float, float, float, float]) -> None:
    top, left, height, width = box
    ours = resized_crop(IMAGE, *map(jnp.float32, box))
    size, corners = (UINT8.shape[1], UINT8.shape[0]), (left, top, left + width, top + height)
    channels = [
        np.asarray(Image.fromarray(np.asarray(IMAGE[..., c])).resize(size, Image.Resampling.BILINEAR, corners))
        for c in range(3)
    ]
    np.testing.assert_allclose(ours, np.stack(channels, -1), atol=1e-3)


@pytest.mark.parametrize("degrees", [0.0, 15.0, -30.0])
def test_rotate(degrees: float) -> None:
    a = np.deg2rad(degrees)
    matrix = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    centre = (np.array(UINT8.shape[:2]) - 1) / 2
    expected = np.stack(
        [
            scipy.ndimage.affine_transform(
                np.asarray(IMAGE[..., c], np.float64), matrix, centre - matrix @ centre, order=1, mode="nearest"
            )
            for c in range(3)
        ],
        -1,
    )
    np.testing.assert_allclose(rotate(IMAGE, jnp.float32(a)), expected, atol=1e-4)


def test_flip_is_half_of_the_images_and_only_a_flip() -> None:
    images = jnp.asarray(RNG.integers(0, 256, (64, 6, 6, 3), dtype=np.uint8))
    views = two_views(jax.random.key(0), images, Recipe(flip=0.5, mean=0.0, std=1.0))
    plain = images.astype(jnp.float32) / 255
    same, flipped = (
        (jnp.abs(views - target[None]) < 1e-6).all(axis=(2, 3, 4)) for target in (plain, plain[:, :, ::-1])
    )
    assert (same | flipped).all()
    assert 0.3 < flipped.mean() < 0.7


def test_random_box_stays_inside_and_has_the_asked_area_and_ratio() -> None:
    u = Draws(*jnp.asarray(RNG.random((len(Draws._fields), 500)), jnp.float32))
    box = jax.vmap(lambda u: random_box(u, (32, 32), (0.2, 0.5), (3 / 4, 4 / 3)))(u)
    top, left, height, width = map(np.asarray, box)
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max(), (left + width).max()) <= 32 + 1e-3
    area, ratio = height * width / 32**2, width / height
    assert area.min() > 0.2 - 1e-3
    assert area.max() < 0.5 + 1e-3
    assert area.mean() == pytest.approx(0.35, abs=0.02)
    assert ratio.min() > 3 / 4 - 1e-3
    assert ratio.max() < 4 / 3 + 1e-3


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("channels", [1, 3])
def test_views(name: str, channels: int) -> None:
    """Two different views, reproducible, and the same for an image whatever batch it comes in."""
    images = jnp.asarray(RNG.integers(0, 256, (6, 8, 8, channels), dtype=np.uint8))
    make = jax.jit(two_views, static_argnums=(2, 3))
    views = make(jax.random.key(0), images, RECIPES[name], jnp.float32)
    assert views.shape == (2, 6, 8, 8, channels)
    assert np.isfinite(views).all()
    assert float(jnp.abs(views[0] - views[1]).max()) > 0.1
    np.testing.assert_array_equal(views, make(jax.random.key(0), images, RECIPES[name], jnp.float32))
    np.testing.assert_allclose(views[:, :4], make(jax.random.key(0), images[:4], RECIPES[name], jnp.float32), atol=1e-5)
    assert float(jnp.abs(views - make(jax.random.key(1), images, RECIPES[name], jnp.float32)).max()) > 0.1
    raw = views * RECIPES[name].std + RECIPES[name].mean
    assert float(raw.min()) > -1e-3
    assert float(raw.max()) < 1 + 1e-3


def test_views_differ_in_blur_and_solarisation_as_moco_v3_asks() -> None:
    """Only the first view is always blurred; only the second is ever solarised."""
    images = jnp.full((200, 8, 8, 3), 220, jnp.uint8).at[:, ::2].set(180)
    recipe = Recipe(blur_by_view=(1.0, 0.0), blur_sigma=(1.0, 1.0), solarize_by_view=(0.0, 0.2), mean=0.0, std=1.0)
    blurred, solarized = two_views(jax.random.key(0), images, recipe)
    sharp = images.astype(jnp.float32) / 255
    assert float(blurred.std()) < 0.5 * float(sharp.std())
    changed = (jnp.abs(solarized - sharp) > 1e-3).any(axis=(1, 2, 3))
    assert 0.1 < float(changed.mean()) < 0.3


OPERATE = jax.jit(operate)


def by_pillow(image: Image.Image, name: str, sign: int) -> Image.Image:
    """RandAugment's operations at magnitude 9 of 30, as torchvision has them."""
    w, h = image.size
    factor = 1 + 0.27 * sign
    affine = {
        "shear_x": (1, 0.09 * sign, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.09 * sign, 1, 0),
        "translate_x": (1, 0, sign * int(150 / 331 * w * 0.3), 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, sign * int(150 / 331 * h * 0.3)),
    }
    enhance = {
        "brightness": ImageEnhance.Brightness,
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "sharpness": ImageEnhance.Sharpness,
    }
    if name in affine:
        return image.transform(image.size, Image.Transform.AFFINE, affine[name], Image.Resampling.BILINEAR)
    if name in enhance:
        return enhance[name](image).enhance(factor)
    return {
        "identity": lambda: image,
        "rotate": lambda: image.rotate(9 * sign, Image.Resampling.BILINEAR),
        "posterize": lambda: ImageOps.posterize(image, 7),
        "solarize": lambda: ImageOps.solarize(image, 179),
        "autocontrast": lambda: ImageOps.autocontrast(image),
        "equalize": lambda: ImageOps.equalize(image),
    }[name]()


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment_operations(name: str, sign: int, channels: int) -> None:
    # Large enough for Pillow to equalize, and not using all levels.
    levels = np.round(RNG.beta(2, 5, (30, 26, channels)) * 220 + 20).astype(np.uint8)
    pillow = Image.fromarray(levels[..., 0] if channels == 1 else levels)
    image = jnp.asarray(levels, jnp.float32) / 255
    ours = OPERATE(image, jnp.int32(OPERATIONS.index(name)), jnp.float32(sign))
    assert (name == "identity" or (name, channels) == ("color", 1)) == np.allclose(ours, image, atol=1e-6)
    exact = name in ("identity", "posterize", "solarize", "equalize", "translate_x", "translate_y")
    close(ours if channels == 3 else ours[..., 0], by_pillow(pillow, name, sign), 1e-6 if exact else ROUNDING)


def test_a_flat_image_stays_as_it_is_under_autocontrast_and_equalize() -> None:
    flat = jnp.full((20, 20, 3), 0.4)
    np.testing.assert_array_equal(autocontrast(flat), flat)
    np.testing.assert_array_equal(equalize(flat), flat)


@pytest.mark.parametrize("channels", [1, 3])
def test_rand_augment(channels: int) -> None:
    """Reproducible, the same for an image whatever batch it comes in, within the range, different for each image."""
    images = jnp.tile(jnp.asarray(RNG.integers(0, 256, (1, 8, 8, channels), dtype=np.uint8)), (40, 1, 1, 1))
    recipe = Recipe(mean=0.5, std=0.25)
    make = jax.jit(rand_augment, static_argnums=(2, 3))
    views = make(jax.random.key(0), images, recipe, jnp.float32)
    assert views.shape == images.shape
    np.testing.assert_array_equal(views, make(jax.random.key(0), images, recipe, jnp.float32))
    np.testing.assert_allclose(views[:5], make(jax.random.key(0), images[:5], recipe, jnp.float32), atol=1e-5)
    assert float(jnp.abs(views - make(jax.random.key(1), images, recipe, jnp.float32)).max()) > 0.1
    assert len(np.unique(np.asarray(views).reshape(40, -1), axis=0)) > 25
    raw = views * 0.25 + 0.5
    assert float(raw.min()) > -1e-6
    assert float(raw.max()) < 1 + 1e-6
