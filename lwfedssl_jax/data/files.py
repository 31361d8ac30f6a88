"""Data sets in npz and idx files."""

import gzip
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from lwfedssl_jax.config import ConfigError, DataConfig
from lwfedssl_jax.data.cache import CLASSES, Example, Notify, Split, Undecoded, path_of, refuse, stamp

# The folder of Debian's package dataset-fashion-mnist.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip

NPZ_FORM = "MedMNIST's npz: uint8 train_images and test_images of NxHxW or NxHxWx3, integer labels of Nx1"


def open_npz(config: DataConfig, note: Notify) -> Undecoded:
    """Find an npz file of MedMNIST's format (arXiv 2110.14795), gray or RGB.

    ``val_*`` is for testing if there is no ``test_*``, and otherwise the split ``val``. Images are read one by one, so
    that they may be larger than the memory.

    Raises:
      ConfigError: there is no such file, or it does not have this format.
    """
    path = path_of(config)
    if not os.path.isfile(path):
        raise refuse(config, "is not a file", f"npz:FILE, {NPZ_FORM}")

    def splits() -> dict[str, Split]:
        try:
            with zipfile.ZipFile(path) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
                arrays = {"train": "train", "test": "test" if "test_images" in names else "val"}
                found = {name: _npz_split(config, path, archive, array) for name, array in arrays.items()}
                if {"test_images", "val_images"} <= names and _has_images(archive, "val"):
                    try:
                        found["val"] = _npz_split(config, path, archive, "val")
                    except ConfigError as error:
                        note(f"the validation split is left out: {error}")
                return found
        except ConfigError:
            raise
        except Exception as error:  # zipfile and NumPy raise many kinds if a byte is wrong
            raise _unreadable(config, error) from error

    return Undecoded(stamp(path), splits)


def _has_images(archive: zipfile.ZipFile, name: str) -> bool:
    with archive.open(f"{name}_images.npy") as file:
        shape, _ = _npy_header(file)
    return bool(shape and shape[0])


def _unreadable(config: DataConfig, error: Exception) -> ConfigError:
    return refuse(config, f"cannot be read ({' '.join(str(error).split()) or type(error).__name__})", NPZ_FORM)


def _npz_split(config: DataConfig, path: Path, archive: zipfile.ZipFile, name: str) -> Split:
    for array in (f"{name}_images", f"{name}_labels"):
        if f"{array}.npy" not in archive.namelist():
            raise refuse(config, f"has no array {array}", NPZ_FORM)
    with archive.open(f"{name}_images.npy") as file:
        shape, dtype = _npy_header(file)
    gray = len(shape) == 3
    if dtype != np.uint8 or not (gray or (len(shape) == 4 and shape[3] in (1, 3))) or min(shape) < 1:
        raise refuse(config, f"has {name}_images of shape {shape} and type {dtype}", NPZ_FORM)
    if math.prod(shape) > archive.getinfo(f"{name}_images.npy").file_size:  # before memory is taken for it
        raise EOFError(f"{name}_images ends before its shape {shape} does")
    labels = _npz_labels(config, archive, f"{name}_labels", shape[0])

    def read(i: int, image: np.ndarray) -> Example:
        return Example(image, int(labels[i]))

    def items() -> Iterator[np.ndarray]:
        try:
            yield from npz_images(path, f"{name}_images")
        except Exception as error:  # as above
            raise _unreadable(config, error) from error

    return Split(shape[0], items(), read, lambda i: f"{name}_images[{i}]")


def _npz_labels(config: DataConfig, archive: zipfile.ZipFile, name: str, images: int) -> np.ndarray:
    """The labels of the split, one for each of its ``images``."""
    with archive.open(f"{name}.npy") as file:
        shape, dtype = _npy_header(file)
    if not np.issubdtype(dtype, np.integer):
        raise refuse(config, f"has {name} of type {dtype}", NPZ_FORM)
    if len(shape) == 2 and shape[1] > 1:
        raise refuse(config, f"has {shape[1]} labels for each image", "one class for each image")
    if shape not in ((images,), (images, 1)):
        raise refuse(config, f"has {name} of shape {shape} for {images} images", NPZ_FORM)
    with archive.open(f"{name}.npy") as file:
        labels = np.lib.format.read_array(file, allow_pickle=False).reshape(-1)
    if wrong := [x for x in (int(labels.min()), int(labels.max())) if not 0 <= x < CLASSES]:
        raise refuse(config, f"has a label {wrong[0]} in {name}", f"labels from 0 to {CLASSES - 1}")
    return labels


def npz_images(path: Path, name: str) -> Iterator[np.ndarray]:
    """The images of an array one by one, each HxWxC uint8.

    Raises:
      EOFError: the array ends before its shape does.
    """
    with zipfile.ZipFile(path) as archive, archive.open(f"{name}.npy") as file:
        shape, _ = _npy_header(file)
        size = math.prod(shape[1:])
        for i in range(shape[0]):
            content = file.read(size)
            if len(content) < size:
                raise EOFError(f"{name} ends at image {i}")
            yield np.frombuffer(content, np.uint8).reshape(*shape[1:3], -1)


def image_arrays(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of images, NxHxW or NxHxWxC uint8, of an npz file.

    Raises:
      OSError, ValueError: it is no npz file.
    """
    found: dict[str, tuple[int, ...]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in (name for name in archive.namelist() if name.endswith(".npy")):
                with archive.open(name) as file:
                    shape, dtype = _npy_header(file)
                if dtype == np.uint8 and (len(shape) == 3 or (len(shape) == 4 and shape[3] in (1, 3))):
                    found[name.removesuffix(".npy")] = shape
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(str(error)) from error
    return found


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the shape and type of an array, up to where its values begin, in C order.

    Raises:
      ValueError: there is no array, or it is in Fortran order.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran and len(shape) > 2:
        raise ValueError("an array is in Fortran order; np.ascontiguousarray before it is saved")
    return shape, dtype


def open_fashion_mnist(config: DataConfig) -> Undecoded:
    """Find Zalando's 70,000 garments (28x28, one channel; arXiv 1708.07747), 10,000 for testing, as idx files.

    Raises:
      ConfigError: a file is missing or damaged.
    """
    folder = path_of(config) if ":" in config.name else FASHION_MNIST
    files = [
        [_idx_file(config, folder, f"{split}-{name}-ubyte") for name in ("images-idx3", "labels-idx1")]
        for split in ("train", "t10k")
    ]

    def split(images_file: Path, labels_file: Path) -> Split:
        images, labels = read_idx(config, images_file, 3), read_idx(config, labels_file, 1)
        if images.shape != (len(labels), 28, 28) or not len(labels):
            raise _damaged(config, images_file, f"shape {images.shape} for {len(labels)} labels of 28x28 images")
        if labels.max() > 9:
            raise _damaged(config, labels_file, f"it has a label {labels.max()}")

        def read(i: int, image: np.ndarray) -> Example:
            return Example(image[..., None], int(labels[i]))

        return Split(len(labels), images, read, lambda i: f"{images_file}[{i}]")

    version = [stamp(path) for pair in files for path in pair]
    return Undecoded(version, lambda: {"train": split(*files[0]), "test": split(*files[1])}, GARMENTS)


def _idx_file(config: DataConfig, folder: Path, name: str) -> Path:
    found = [path for path in (folder / f"{name}.gz", folder / name) if os.path.isfile(path)]
    if not found:
        raise refuse(
            config,
            f"is not installed (no {folder / name}.gz)",
            "Debian's package dataset-fashion-mnist (apt-get install dataset-fashion-mnist), fashion_mnist:PATH of its "
            "idx files, or tfds:fashion_mnist, which downloads it",
        )
    return found[0]


def read_idx(config: DataConfig, path: Path, dimensions: int) -> np.ndarray:
    """Read the uint8 array of an idx file: two zeros, type 8, number of dimensions, big-endian sizes, bytes.

    Raises:
      ConfigError: the file is damaged.
    """
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(config, path, str(error)) from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes([0, 0, 8, dimensions]):
        raise _damaged(config, path, f"it does not begin like an idx{dimensions} file of bytes")
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    if len(content) != start + math.prod(shape):
        raise _damaged(config, path, f"it has {len(content) - start} bytes for the shape {tuple(shape)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _damaged(config: DataConfig, path: Path, why: str) -> ConfigError:
    return refuse(
        config, f"cannot be read, {path} is damaged ({why})", "the file of Debian's package dataset-fashion-mnist"
    )
