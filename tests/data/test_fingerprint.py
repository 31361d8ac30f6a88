"""What tells data sets apart."""

from pathlib import Path

import numpy as np
import pytest

from lwfedssl_jax.data import fingerprint as fingerprint_module
from lwfedssl_jax.data.fingerprint import fingerprint
from lwfedssl_jax.data.sources import Dataset


def dataset(**changes: np.ndarray) -> Dataset:
    images, labels = np.arange(2 * 4 * 4, dtype=np.uint8).reshape(2, 4, 4, 1), np.array([0, 1], np.int32)
    return Dataset(images, labels, images[:1], labels[:1])._replace(**changes)


def test_each_part_has_a_digest_of_its_own() -> None:
    usual = fingerprint(dataset())
    assert set(usual) == {"images", "labels"}
    assert fingerprint(dataset()) == usual
    images, labels = dataset().train_images, dataset().train_labels
    for changes, differing in (
        ({"train_images": images[::-1]}, {"images"}),
        ({"test_images": images[1:]}, {"images"}),
        ({"train_images": images.reshape(2, 2, 8, 1)}, {"images"}),
        ({"train_labels": labels[::-1]}, {"labels"}),
        ({"test_labels": labels[1:]}, {"labels"}),
        ({"train_clients": labels}, {"clients"}),
    ):
        found = fingerprint(dataset(**changes))
        assert {name for name in {**usual, **found} if usual.get(name) != found.get(name)} == differing


def test_a_mapped_file_read_in_pieces_has_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    whole = fingerprint(dataset(train_images=images))
    monkeypatch.setattr(fingerprint_module, "AT_ONCE", 100)
    assert fingerprint(dataset(train_images=np.load(tmp_path / "images.npy", mmap_mode="r"))) == whole
