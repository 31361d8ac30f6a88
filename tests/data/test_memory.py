"""Data sets in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_config
from PIL import Image

import lwfedssl_jax as lw
from lwfedssl_jax.config import ConfigError, DataConfig, override
from lwfedssl_jax.data import cache, memory, sources
from lwfedssl_jax.data.folders import held_out

RNG = np.random.default_rng(0)
IMAGES, LABELS = RNG.integers(0, 255, (40, 6, 5, 3), np.uint8), np.arange(40) % 2


def load(size: int = 4, **fields: Any) -> sources.Dataset:
    config = DataConfig(name=memory.hold(lw.Data(**({"images": IMAGES} | fields))), image_size=size)
    return sources.find(config).load(config)


def test_a_fifth_of_each_class_is_held_out_as_of_a_folder() -> None:
    data = load(labels=LABELS, clients=["b", "a"] * 20, class_names=("even", "odd"))
    assert (len(data.train_images), len(data.test_images)) == (32, 8)
    assert np.bincount(data.test_labels).tolist() == [4, 4]
    chosen = np.flatnonzero(LABELS == 0)[held_out(20)]
    for image, i in zip(data.test_images[data.test_labels == 0], chosen, strict=True):
        np.testing.assert_array_equal(image, cache.fit(IMAGES[i], 4, 3))
    assert data.train_clients is not None
    assert (data.client_names, data.class_names) == (("a", "b"), ("even", "odd"))
    assert (data.train_clients == 1 - data.train_labels).all()


def test_splits_sizes_and_channels() -> None:
    given = load(labels=LABELS, test_images=IMAGES[:3], test_labels=[0, 1, 1], val_images=IMAGES[:2], val_labels=[1, 0])
    assert (len(given.train_images), given.test_labels.tolist()) == (40, [0, 1, 1])
    assert given.val_labels is not None
    assert given.val_labels.tolist() == [1, 0]
    unlabelled = load()
    assert (len(unlabelled.train_images), len(unlabelled.test_images), len(unlabelled.labelled)) == (40, 0, 0)
    gray = load(images=IMAGES[..., 0], labels=LABELS)
    assert gray.train_images.shape == (32, 4, 4, 1)
    mixed = load(images=[Image.fromarray(IMAGES[0]).convert("L"), IMAGES[0], Image.new("L", (9, 7))])
    assert mixed.train_images.shape == (3, 4, 4, 3)
    np.testing.assert_array_equal(mixed.train_images[1], cache.fit(IMAGES[0], 4, 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"images": []}, "images: none; accepted: at least one image"),
        ({"images": IMAGES / 255}, r"images\[0\]: float64 of shape \(6, 5, 3\); accepted: uint8 HxW"),
        ({"images": [IMAGES[0], IMAGES[0, 0, 0]]}, r"images\[1\]: uint8 of shape \(3,\); accepted: uint8 HxW"),
        ({"images": [Image.new("I;16", (4, 4))]}, r"images\[0\]: mode I;16; accepted: 8 bits per channel"),
        ({"labels": LABELS[1:]}, "labels: 39 for 40 images; accepted: one for each image"),
        ({"images": np.moveaxis(IMAGES, 3, 1)}, r"images\[0\]: uint8 of shape \(3, 6, 5\); .* channels last"),
        ({"images": ["a.png", "b.png"]}, "images: paths; accepted: arrays, or data.name folder:PATH"),
        ({"labels": LABELS + 0.5}, "labels: type float64; accepted: whole numbers"),
        ({"labels": ["cat", "dog"] * 20}, "labels: type <U3; accepted: whole numbers; .* np.unique"),
        ({"labels": LABELS, "class_names": ["even"]}, "class_names: 1 for labels up to 1; accepted: a name for each"),
        ({"labels": LABELS - 2}, "labels: a label -2; accepted: -1 to"),
        ({"test_images": IMAGES[:2]}, "test_labels: missing; accepted: a label for each of 2 images"),
        ({"test_images": IMAGES[:2], "test_labels": [0, -1]}, "test_labels: a label -1; accepted: 0 to"),
        ({"clients": [1]}, "clients: 1 for 40 images; accepted: one for each image"),
    ],
)
def test_what_is_no_data_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"^Data.{message}"):
        lw.Data(**({"images": IMAGES} | fields))


@pytest.mark.parametrize("data", [(IMAGES, LABELS), IMAGES])
def test_what_is_not_in_a_data_object_is_refused(data: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^data: found {type(data).__name__}; accepted: Data\(images, labels\)"):
        lw.train(small_config(), progress=False, data=data)


def test_a_run_on_data_in_memory_is_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fields = {"federation.rounds": 1, "model.depth": 1, "strategy.name": "end_to_end", "partition.kind": "natural"}
    config = override(small_config(), fields)
    data = lw.Data(IMAGES, LABELS, clients=np.arange(40) // 10)
    run = lw.train(config, progress=False, data=data)
    assert run.config.data.name.startswith("memory:")
    assert (
        lw.train(
            config, progress=False, data=lw.Data(IMAGES.copy(), list(LABELS), clients=np.arange(40) // 10)
        ).directory
        == run.directory
    )
    other = IMAGES.copy()
    other[0, 0, 0, 0] ^= 1
    name = memory.hold(lw.Data(other, LABELS, clients=np.arange(40) // 10))
    with pytest.raises(ConfigError, match=r"^--workdir: .* contains a run of another config: data.name is 'memory:"):
        lw.train(override(config, {"data.name": name}), run.directory, progress=False)
    named = [memory.hold(lw.Data(IMAGES, LABELS, class_names=names)) for names in ((), tuple("abcd"), tuple("abce"))]
    assert len(set(named)) == 3
    assert run.encoder()(IMAGES).shape == (40, 8)
    with pytest.raises(ConfigError, match=r"'memory:12345678' is not in this process; accepted: train\(config, data="):
        sources.find(DataConfig(name="memory:12345678"))
