"""Data sets in files of the formats idx and npz."""

import gzip
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import load, refused

from lwfedssl_jax.config import ConfigError, DataConfig
from lwfedssl_jax.data import files, sources
from lwfedssl_jax.data.views import RECIPES

pytestmark = pytest.mark.usefixtures("cache_home")


# ---- idx


def write_idx(path: Path, values: np.ndarray) -> None:
    sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
    content = bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the one of Debian's package, with 20 training and 10 test images."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    for split, n in (("train", 20), ("t10k", 10)):
        images = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8) % 10)
    monkeypatch.setattr(files, "FASHION_MNIST", folder)
    return folder


def test_fashion_mnist_is_what_the_idx_files_hold(fashion_mnist: Path, tmp_path: Path) -> None:
    data = load("fashion_mnist", 28)
    expected = np.random.default_rng(20).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    np.testing.assert_array_equal(data.train_images, expected[..., None])
    assert data.test_images.shape == (10, 28, 28, 1)
    assert data.train_labels.tolist() == [i % 10 for i in range(20)]
    assert (data.train_labels.dtype, data.classes) == (np.int32, 10)
    assert data.train_clients is None
    assert load("fashion_mnist", 16).train_images.shape == (20, 16, 16, 1)
    assert RECIPES[sources.find(DataConfig(name="fashion_mnist")).views] is RECIPES["fashion"]
    other = tmp_path / "unpacked"
    shutil.copytree(fashion_mnist, other)
    for path in other.iterdir():  # as some archives have them
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    np.testing.assert_array_equal(load(f"fashion_mnist:{other}", 28).train_images, data.train_images)


def test_fashion_mnist_that_is_not_installed(fashion_mnist: Path) -> None:
    (fashion_mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    for name in ("fashion_mnist", f"fashion_mnist:{fashion_mnist}"):
        message = refused(name)
        assert message.startswith(f"data.name: {name!r} is not installed (no {fashion_mnist}/t10k-labels-idx1-ubyte.gz")
        assert "accepted: Debian's package" in message
        assert "tfds:fashion_mnist" in message


def zipped(content: bytes) -> bytes:
    """The same at any time, as names of tests must be in all processes that collect them."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("images-idx3", b"not gzip", "Not a gzipped file"),
        ("images-idx3", zipped(bytes(5000))[:-9], "end-of-stream"),
        ("images-idx3", zipped(bytes([0, 0, 8])), "does not begin like an idx3 file"),
        ("images-idx3", zipped(bytes([0, 0, 8, 1, 0, 0, 0, 0]) + bytes(20)), "does not begin like an idx3 file"),
        ("labels-idx1", zipped(bytes([0, 0, 8, 1, 0, 0, 0, 20]) + bytes(19)), "19 bytes for the shape (20,)"),
        ("labels-idx1", zipped(bytes([0, 0, 8, 1, 0, 0, 0, 20]) + bytes([10] * 20)), "a label 10"),
        ("images-idx3", np.zeros((19, 28, 28), np.uint8), "shape (19, 28, 28) for 20 labels"),
        ("images-idx3", np.zeros((20, 28, 27), np.uint8), "shape (20, 28, 27)"),
    ],
)
def test_fashion_mnist_that_is_damaged(fashion_mnist: Path, name: str, content: bytes | np.ndarray, why: str) -> None:
    path = fashion_mnist / f"train-{name}-ubyte.gz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_idx(path, content)
    message = refused("fashion_mnist")
    assert message.startswith(f"data.name: 'fashion_mnist' cannot be read, {path} is damaged (")
    assert why in message
    assert "accepted: the file of Debian's package" in message


@pytest.mark.skipif(not files.FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian() -> None:
    data = load("fashion_mnist", 28)
    assert (len(data.train_images), len(data.test_images)) == (60000, 10000)
    assert np.bincount(data.train_labels).tolist() == [6000] * 10
    assert data.train_images.mean() / 255 == pytest.approx(RECIPES["fashion"].mean, abs=1e-3)
    assert data.train_images.std() / 255 == pytest.approx(RECIPES["fashion"].std, abs=1e-3)


# ---- npz


def arrays(channels: tuple[int, ...] = (3,), **changes: Any) -> dict[str, Any]:
    """Of MedMNIST's form: 9 training, 4 validation and 6 test images of 5x5, three classes; None leaves one out."""
    content = {}
    for name, n in (("train", 9), ("val", 4), ("test", 6)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 5, 5, *channels), dtype=np.uint8)
        content |= {f"{name}_images": pixels, f"{name}_labels": np.arange(n, dtype=np.uint8)[:, None] % 3}
    return {name: value for name, value in (content | changes).items() if value is not None}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_npz_of_medmnist(tmp_path: Path, save: Callable[..., None], channels: tuple[int, ...]) -> None:
    content = arrays(channels)
    save(tmp_path / "med.npz", **content)
    data = load(f"npz:{tmp_path}/med.npz", 5)
    expected = np.broadcast_to(content["train_images"].reshape(9, 5, 5, -1), (9, 5, 5, 3))
    np.testing.assert_array_equal(data.train_images, expected)
    assert data.test_images.shape == (6, 5, 5, 3)
    expected = np.broadcast_to(content["val_images"].reshape(4, 5, 5, -1), (4, 5, 5, 3))
    np.testing.assert_array_equal(data.val_images, expected)  # type: ignore[arg-type]
    again = load(f"npz:{tmp_path}/med.npz", 5)  # from the cache
    np.testing.assert_array_equal(again.val_labels, [0, 1, 2, 0])  # type: ignore[arg-type]
    labelled = sources.with_labels_of(again, "val")
    np.testing.assert_array_equal(labelled.train_images, expected)
    assert labelled.train_labels.tolist() == [0, 1, 2, 0]
    assert sources.with_labels_of(again, "train") is again
    assert data.test_labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.train_labels.dtype == np.int32


def test_npz_without_test_images_is_tested_on_val_and_an_empty_val_is_none(tmp_path: Path) -> None:
    empty = {"val_images": np.zeros((0, 5, 5), np.uint8), "val_labels": np.zeros((0, 1), np.uint8)}
    np.savez(tmp_path / "empty.npz", **arrays(**empty))
    assert load(f"npz:{tmp_path}/empty.npz").val_images is None
    np.savez(tmp_path / "med.npz", **arrays(test_images=None, test_labels=None))
    data = load(f"npz:{tmp_path}/med.npz")
    assert len(data.test_images) == 4
    assert data.val_images is None
    with pytest.raises(ConfigError, match=r"evaluation.labelled_split: val does not exist .*; accepted: train"):
        sources.with_labels_of(data, "val")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"train_images": None}, "has no array train_images"),
        ({"test_labels": None}, "has no array test_labels"),
        ({"test_images": None, "val_images": None}, "has no array val_images"),
        ({"train_labels": np.zeros((9, 14), np.uint8)}, "has 14 labels for each image"),
        ({"train_labels": np.zeros((8, 1), np.uint8)}, "has train_labels of shape (8, 1) for 9 images"),
        ({"train_labels": np.zeros((9, 1), np.float32)}, "has train_labels of type float32"),
        ({"train_labels": np.full(9, -1)}, "has a label -1 in train_labels; accepted: labels from 0 to 1048575"),
        ({"train_labels": np.arange(9) + 2**20 - 8}, "has a label 1048576 in train_labels; accepted: labels from 0"),
        ({"test_labels": np.full(6, 2**64 - 1, np.uint64)}, "has a label 18446744073709551615 in test_labels"),
        ({"train_labels": np.array([{}] * 9)}, "has train_labels of type object"),
        ({"train_images": np.array([{}] * 9)}, "has train_images of shape (9,) and type object"),
        ({"train_images": np.zeros((9, 5, 5), np.float32)}, "has train_images of shape (9, 5, 5) and type float32"),
        ({"train_images": np.zeros((9, 5, 5, 5), np.uint8)}, "has train_images of shape (9, 5, 5, 5) and type uint8"),
        ({"train_images": np.zeros((0, 5, 5), np.uint8)}, "has train_images of shape (0, 5, 5)"),
        ({"train_images": np.asfortranarray(np.zeros((9, 5, 5), np.uint8))}, "cannot be read (an array is in Fortran"),
    ],
)
def test_bad_npz(tmp_path: Path, changes: dict[str, Any], why: str, cache_home: Path) -> None:
    np.savez(tmp_path / "med.npz", **arrays(**changes))
    name = f"npz:{tmp_path}/med.npz"
    assert refused(name).startswith(f"data.name: {name!r} {why}")
    assert not list(cache_home.glob("*"))


def test_npz_that_is_no_npz_or_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "med.npz"
    name = f"npz:{path}"
    assert refused(name).startswith(f"data.name: {name!r} is not a file; accepted: npz:FILE, MedMNIST's npz")
    path.write_bytes(b"PK")
    assert refused(name).startswith(f"data.name: {name!r} cannot be read (File is not a zip file)")
    np.savez(tmp_path / "whole.npz", **arrays())
    with zipfile.ZipFile(tmp_path / "whole.npz") as whole, zipfile.ZipFile(path, "w") as cut:
        for member in whole.namelist():
            content = whole.read(member)
            cut.writestr(member, content[:-1] if member == "train_images.npy" else content)
    assert "cannot be read (train_images ends at image 8)" in refused(name)
    content = bytearray((tmp_path / "whole.npz").read_bytes())
    content[content.index(b"train_images.npy") + 200] ^= 255
    path.write_bytes(content)
    assert "cannot be read (Bad CRC-32 for file 'train_images.npy')" in refused(name)
    with zipfile.ZipFile(tmp_path / "whole.npz") as whole, zipfile.ZipFile(path, "w") as huge:
        for member in whole.namelist():
            huge.writestr(
                member, whole.read(member).replace(b"(9, 5, 5, 3), }" + b" " * 9, b"(9999999999, 5, 5, 3), }")
            )
    assert "cannot be read (train_images ends before its shape (9999999999, 5, 5, 3) does)" in refused(name)


def test_any_byte_of_an_npz_may_be_wrong(tmp_path: Path) -> None:
    """In the headers, where a byte decides what is read; what Python's zipfile does not look at makes no error."""
    path = tmp_path / "med.npz"
    np.savez(path, **arrays())
    whole, seen = path.read_bytes(), set()
    config, rng = DataConfig(name=f"npz:{path}", image_size=5), np.random.default_rng(0)
    ends = [i for i in range(len(whole)) if whole[i : i + 2] == b"PK"]
    for at in rng.choice([i for end in ends for i in range(end, min(end + 180, len(whole)))], 250):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ int(rng.integers(1, 256))]) + whole[at + 1 :])
        try:
            for split in files.open_npz(config, sources.ignore_text).splits().values():
                assert len(list(split.items)) == split.size
        except ConfigError as error:
            seen.add((type(error.__cause__), "\n" in str(error)))
    assert {(zipfile.BadZipFile, False), (NotImplementedError, False)} < seen
    assert not any(several_lines for _, several_lines in seen)
