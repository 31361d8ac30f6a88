"""Protocols on features whose accuracy is known."""

import jax
import numpy as np
import pytest
from conftest import encoding, small_config

from lwfedssl_jax.config import ConfigError, EvaluationConfig
from lwfedssl_jax.data.sources import Dataset
from lwfedssl_jax.evaluation import frozen
from lwfedssl_jax.simulation import setup

LABELS = np.arange(300).astype(np.int32) % 3
IMAGES = np.zeros((300, 4, 4, 1), np.uint8)
DATA = Dataset(IMAGES[:200], LABELS[:200], IMAGES[200:], LABELS[200:])
NOISE = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)


def features(signal: float) -> np.ndarray:
    return NOISE + signal * np.eye(8, dtype=np.float32)[LABELS]


def evaluate(x: np.ndarray) -> dict:
    return frozen.evaluate(EvaluationConfig(labels_per_class=(5, 0), neighbours=10), DATA, x[:200], x[200:])


def test_separable_features_score_near_one_and_noise_scores_chance() -> None:
    good, bad = evaluate(features(20.0)), evaluate(features(0.0))
    assert list(good) == ["linear_probe_5", "linear_probe_all", "knn"]
    assert all(result["accuracy"] >= 0.99 for result in good.values())
    assert all(abs(result["accuracy"] - 1 / 3) < 0.12 for result in bad.values())


def test_more_labels_help_and_settings_stand_beside_the_number() -> None:
    results = evaluate(features(2.5))
    few, every = results["linear_probe_5"], results["linear_probe_all"]
    assert few["accuracy"] < every["accuracy"]
    assert few["std"] > 0
    assert (few["labels_per_class"], few["draws"]) == (5, 5)
    assert (every["labels_per_class"], every["draws"], every["std"]) == ("all", 1, 0)
    assert results["knn"]["neighbours"] == 10


def test_features_of_images_that_no_protocol_uses_do_not_matter() -> None:
    x, some = features(1.0), EvaluationConfig(labels_per_class=(5, 2), neighbours=0)
    used = frozen.used_images(some, DATA)
    assert 10 < len(used) < 200
    without = np.zeros_like(x[:200])
    without[used] = x[:200][used]
    assert frozen.evaluate(some, DATA, without, x[200:]) == frozen.evaluate(some, DATA, x[:200], x[200:])
    for config in (EvaluationConfig(labels_per_class=(5, 0), neighbours=0), EvaluationConfig(labels_per_class=())):
        np.testing.assert_array_equal(frozen.used_images(config, DATA), DATA.labelled)
    assert not len(frozen.used_images(EvaluationConfig(labels_per_class=(), neighbours=0), DATA))


def test_draws_are_the_same_for_every_run() -> None:
    assert evaluate(features(1.0)) == evaluate(features(1.0))


def test_features_are_those_of_the_first_layers_and_do_not_depend_on_the_batch() -> None:
    run = setup.prepare(small_config())
    params = setup.initial_params(run)
    images = run.dataset.train_images
    one = encoding(run)(params, images[:1], 1)
    np.testing.assert_allclose(encoding(run)(params, images, 1)[:1], one, atol=1e-5)
    later = jax.tree.map(lambda x: x, params)
    later["encoder"]["blocks"] = jax.tree.map(lambda x: x.at[1:].set(7.0), params["encoder"]["blocks"])
    np.testing.assert_array_equal(encoding(run)(later, images[:1], 1), one)
    assert np.abs(encoding(run)(later, images[:1], 2) - one).max() > 1e-3


class Mapped:
    """Images that may not be read all at once."""

    def __init__(self, images: np.ndarray) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, rows: slice) -> np.ndarray:
        assert rows.stop - rows.start <= frozen.BATCH
        return self._images[rows]


def test_images_are_encoded_batch_by_batch() -> None:
    run = setup.prepare(small_config())
    params = setup.initial_params(run)
    images = np.resize(run.dataset.train_images, (300, 8, 8, 3))
    np.testing.assert_array_equal(encoding(run)(params, Mapped(images), 1), encoding(run)(params, images, 1))


def test_training_images_without_a_label_change_nothing() -> None:
    x = features(1.0)
    labels = np.concatenate([[-1, -1], DATA.train_labels])
    more = DATA._replace(train_labels=labels, train_images=np.zeros((202, 4, 4, 1), np.uint8))
    config = EvaluationConfig(labels_per_class=(5, 0), neighbours=10)
    assert frozen.evaluate(config, more, np.concatenate([x[:2] + 9, x[:200]]), x[200:]) == evaluate(x)
    frozen.check_protocols(EvaluationConfig(labels_per_class=(66,), neighbours=200), more)
    with pytest.raises(ConfigError, match=r"evaluation\.neighbours: 201 .*accepted: 0 to 200"):
        frozen.check_protocols(EvaluationConfig(neighbours=201), more)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": LABELS[200:] + 5}, r"data\.name: class 5 has test images but no training images; accepted"),
        ({"train_labels": np.zeros(200, np.int32)}, r"data: all training images are of one class; accepted"),
    ],
)
def test_classes_the_data_lacks(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        frozen.check_protocols(EvaluationConfig(), DATA._replace(**changes))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (EvaluationConfig(labels_per_class=(67,)), r"evaluation\.labels_per_class: 67 .*accepted: 0 to 66"),
        (EvaluationConfig(neighbours=201), r"evaluation\.neighbours: 201 .*accepted: 0 to 200"),
    ],
)
def test_protocols_the_data_cannot_serve(config: EvaluationConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        frozen.check_protocols(config, DATA)
