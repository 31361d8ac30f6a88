"""Where images come from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from lwfedssl_jax.config import ConfigError, DataConfig
from lwfedssl_jax.data import sources
from lwfedssl_jax.data.views import RECIPES, standardise, two_views
from lwfedssl_jax.method.checks import check_method
from lwfedssl_jax.method.task import make_task


def digits(size: int = 16) -> sources.Dataset:
    return sources.find(DataConfig()).load(DataConfig(image_size=size))


@pytest.mark.parametrize("name", ["tfds:x", "npz:/x", "folder:/x", "fashion_mnist:/x"])
def test_what_must_be_known_is_known_before_the_data_is_read(name: str) -> None:
    config = small_config(data__name=name)
    check_method(config)
    assert make_task(config).image_shape == (8, 8, 1 if name.startswith("fashion") else 3)


def test_digits_are_all_there_once_with_a_fixed_split() -> None:
    data = digits()
    assert data.train_images.shape == (1437, 16, 16, 1)
    assert data.test_images.shape == (360, 16, 16, 1)
    assert data.train_images.dtype == np.uint8
    assert data.train_images.max() == 255
    assert np.bincount(data.test_labels).min() >= 34
    every = np.concatenate([digits(8).train_images, digits(8).test_images]).reshape(1797, -1)
    from sklearn.datasets import load_digits

    original = load_digits()
    assert sorted(map(bytes, every)) == sorted(map(bytes, np.round(original.data * 255 / 16).astype(np.uint8)))
    again = digits()
    np.testing.assert_array_equal(data.train_images, again.train_images)


def test_synthetic_has_the_asked_size_and_is_reproducible() -> None:
    config = DataConfig(name="synthetic", image_size=12, synthetic_examples=300, synthetic_classes=4)
    data = sources.find(config).load(config)
    assert data.train_images.shape == (300, 12, 12, 3)
    assert data.test_images.shape == (75, 12, 12, 3)
    assert data.classes == 4
    assert np.bincount(data.train_labels).tolist() == [75] * 4
    np.testing.assert_array_equal(data.train_images, sources.find(config).load(config).train_images)


def test_synthetic_classes_survive_the_views() -> None:
    """A classifier of the plain images still knows most of the augmented ones; of shuffled labels it does not."""
    config = DataConfig(name="synthetic", image_size=16)
    source, data = sources.find(config), sources.find(config).load(config)
    recipe = RECIPES[source.views]
    views = jax.jit(lambda key, x: two_views(key, x, recipe))(jax.random.key(0), jnp.asarray(data.train_images))
    flat = lambda x: np.asarray(x).mean(-1).reshape(len(x), -1)  # noqa: E731
    classifier = KNeighborsClassifier(5).fit(flat(views[0]), data.train_labels)
    accuracy = classifier.score(flat(standardise(jnp.asarray(data.test_images), recipe)), data.test_labels)
    assert accuracy > 0.8
    # ... and they are not so plain that the untransformed pixels alone decide across views.
    assert float(jnp.abs(views[0] - views[1]).mean()) > 0.1


@pytest.mark.parametrize("name", ["cifar", "digits:x", "fashion_mnist:", "tfds", "tfds:", "npz", "folder:", ""])
def test_unknown_source(name: str) -> None:
    with pytest.raises(ConfigError) as error:
        sources.find(DataConfig(name=name))
    assert str(error.value) == (
        f"data.name: unknown {name!r}; accepted: digits, synthetic, fashion_mnist, fashion_mnist:PATH, tfds:NAME, "
        "npz:PATH, folder:PATH"
    )


def test_other_data_come_in_the_channels_of_the_clients() -> None:
    colour = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    gray = sources.with_channels(colour, 1)
    expected = np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in colour])
    assert np.abs(gray[..., 0].astype(int) - expected).max() <= 1
    np.testing.assert_array_equal(sources.with_channels(gray, 3), np.concatenate([gray] * 3, -1))
    assert sources.with_channels(colour, 3) is colour
    like = sources.load_like(DataConfig("synthetic", image_size=10), "digits")
    assert like.train_images.shape == (1437, 10, 10, 3)
    assert sources.load_like(DataConfig("digits", image_size=10), "synthetic").test_images.shape == (500, 10, 10, 1)
