"""Metrics of features without labels."""

import itertools
import math

import numpy as np
import pytest
from conftest import REAL_VIEWS_OF, small_config

from lwfedssl_jax.data.sources import Dataset
from lwfedssl_jax.data.views import RECIPES
from lwfedssl_jax.evaluation import label_free
from lwfedssl_jax.simulation import setup

RNG = np.random.default_rng(0)


def test_effective_rank_is_the_number_of_equal_directions_and_ignores_scale() -> None:
    directions = np.linalg.qr(RNG.normal(size=(50, 8)))[0]
    for rank in (1, 3, 8):
        features = directions[:, :rank] @ np.linalg.qr(RNG.normal(size=(8, 8)))[0][:rank]
        assert label_free.effective_rank(features) == pytest.approx(rank, abs=1e-3)
        assert label_free.effective_rank(1000 * features) == pytest.approx(rank, abs=1e-3)
    unequal = np.diag([3.0, 1.0])
    assert label_free.effective_rank(unequal) == pytest.approx(
        math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), abs=1e-3
    )


def test_the_others_are_their_definitions() -> None:
    x, first, second = RNG.normal(size=(3, 6, 4))
    found = label_free.label_free(np.stack([x, first, second]))
    normal = [v / np.linalg.norm(v) for v in x]
    kernel = [math.exp(-2 * float(((a - b) ** 2).sum())) for a, b in itertools.combinations(normal, 2)]
    assert found["uniformity"] == pytest.approx(math.log(np.mean(kernel)))
    assert found["feature_std"] == pytest.approx(2 * np.mean([np.std([v[d] for v in normal]) for d in range(4)]))
    pairs = [(a / np.linalg.norm(a), b / np.linalg.norm(b)) for a, b in zip(first, second, strict=True)]
    assert found["alignment"] == pytest.approx(np.mean([((a - b) ** 2).sum() for a, b in pairs]))


def test_collapsed_features_are_seen_and_zeros_are_no_error() -> None:
    same = np.ones((3, 9, 5))
    found = label_free.label_free(same)
    assert found["effective_rank"] < label_free.COLLAPSED
    assert found["feature_std"] == pytest.approx(0, abs=1e-12)
    assert found["uniformity"] == pytest.approx(0, abs=1e-12)
    assert found["alignment"] == 0
    assert all(math.isfinite(value) for value in label_free.label_free(0 * same).values())
    assert label_free.label_free(RNG.normal(size=(3, 90, 5)))["effective_rank"] > label_free.COLLAPSED


def test_views_are_those_of_training_the_same_each_time_and_of_few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data = setup.prepare(small_config()).dataset
    recipe = RECIPES["digits"]
    monkeypatch.setattr(label_free, "BATCH", 8)
    monkeypatch.setattr(label_free, "views_of", REAL_VIEWS_OF)
    found = label_free.images_with_views(data, recipe, 0)
    assert found.shape == (3, len(data.test_images), 8, 8, 3)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[0], data.test_images)
    np.testing.assert_array_equal(label_free.images_with_views(data, recipe, 0), found)
    first, second = found[1:].astype(float)
    assert np.abs(first - second).mean() > 5
    assert (label_free.images_with_views(data, recipe, 1)[1] != found[1]).any()
    monkeypatch.setattr(label_free, "MOST_IMAGES", 5)
    some = label_free.images_with_views(data, recipe, 0)[0]
    np.testing.assert_array_equal(some, data.test_images[np.linspace(0, len(data.test_images) - 1, 5).astype(int)])
    flat = data._replace(test_images=data.test_images[:0], test_labels=data.test_labels[:0])
    assert isinstance(flat, Dataset)
    np.testing.assert_array_equal(label_free.images_with_views(flat, recipe, 0)[0, 0], data.train_images[0])
