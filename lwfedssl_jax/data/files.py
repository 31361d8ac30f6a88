"""Data sets in files: folders of images, npz and idx files."""

import csv
import gzip
import itertools
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from lwfedssl_jax.config import ConfigError, DataConfig
from lwfedssl_jax.data.cache import CLASSES, Example, Notify, Split, Undecoded, first_of, refuse, stamp
from lwfedssl_jax.system import seeds

# The folder of Debian's package dataset-fashion-mnist.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"
)  # fmt: skip

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TEST_FOLDERS = ("test", "val", "validation")
TEST_SHARE = 0.2  # of each class, if the folder has no split
CLIENT_COLUMNS = ("client", "client_id", "user_id")

FOLDER_FORMS = "PATH/train/CLASS/* and PATH/test/CLASS/*, or PATH/CLASS/*, or without classes PATH/*"
NPZ_FORM = "MedMNIST's npz: uint8 train_images and test_images of NxHxW or NxHxWx3, integer labels of Nx1"


class File(NamedTuple):
    """An image of a folder, with the folder of its class and its client; None if it has none."""

    path: Path
    label: str | None
    client: str | None = None


def path_of(config: DataConfig) -> Path:
    """The PATH in ``data.name``."""
    return Path(os.path.expanduser(config.name.partition(":")[2])).absolute()


def open_folder(config: DataConfig, note: Notify) -> Undecoded:
    """Find the images of a folder by class; training images outside the class folders have no label.

    Of several folders for testing, the first of ``TEST_FOLDERS`` is used, and the next one is the split ``val``.
    Without ``train/``, a fifth of each class is for testing. A flat folder, without classes, has no test images, and
    the encoder is not evaluated. With a file ``clients.csv`` (columns ``file``, relative to the folder, and
    ``client``), training images belong to clients.

    Raises:
      ConfigError: there are no images, a folder cannot be read or is reached twice, a class has test images only or
        cannot be split, or ``clients.csv`` does not give the client of every training image.
    """
    root = path_of(config)
    if not os.path.isdir(root):
        raise refuse(config, "is not a folder", f"a folder with {FOLDER_FORMS}")
    others: list[str] = []
    if (root / "train").is_dir():
        tests = [root / name for name in TEST_FOLDERS if (root / name).is_dir()]
        train = _find_images(config, root / "train", others)
        test, val = ([*(_find_images(config, root, others) for root in tests[:2]), [], []])[:2]
        if not tests and any(file.label for file in train):
            raise refuse(config, "has a folder train but none for testing", f"{' or '.join(TEST_FOLDERS)} next to it")
    else:
        train, test, val = _find_images(config, root, others), [], []
    if others:
        note(f"{len(others):,} files of {root} do not have the suffix of an image and are left out: {first_of(others)}")
    if not train:
        raise refuse(config, "has no images for training", FOLDER_FORMS)
    classes = sorted({file.label for file in train if file.label})
    if not classes and not test:
        note(f"{root} has no class folders: the encoder is trained, but not evaluated")
    elif not (root / "train").is_dir():
        train, test = _hold_out(config, train)
    if classes and not (test and all(file.label for file in test)):
        raise refuse(config, "has test images without a class, or none", f"a class folder each, of {first_of(classes)}")
    if val and not {file.label for file in val} <= set(classes):
        note("the validation split is left out: it has images without a class, or of classes without training images")
        val = []
    if unknown := sorted({str(file.label) for file in test} - set(classes)):
        raise refuse(config, f"has test images of classes without training images: {first_of(unknown)}", "the same")
    train = _assign_clients(config, root, train, test)
    number = {label: i for i, label in enumerate(classes)}

    def read(_: int, file: File) -> Example:
        with Image.open(file.path) as image:
            image.load()
            return Example(image, number[file.label] if file.label else -1, file.client)

    def make_split(files: list[File]) -> Split:
        return Split(len(files), files, read, lambda i: str(files[i].path))

    parts = {"train": train, "test": test} | ({"val": val} if val else {})
    version = [[(*stamp(file.path), file.label, file.client) for file in files] for files in parts.values()]
    owners = tuple(sorted({file.client for file in train if file.client}))
    return Undecoded(
        version, lambda: {name: make_split(files) for name, files in parts.items()}, tuple(classes), owners
    )


def _find_images(config: DataConfig, root: Path, others: list[str]) -> list[File]:
    """The images under a folder in order, except for hidden ones; other files are added to ``others``."""
    found: list[File] = []
    reached: set[str] = set()
    errors: list[OSError] = []
    for folder, inner, names in os.walk(root, onerror=errors.append, followlinks=True):
        if (real := os.path.realpath(folder)) in reached:
            raise refuse(config, f"has a folder that is reached twice, by a link: {folder}", "each folder once")
        reached.add(real)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        parts = Path(folder).relative_to(root).parts
        for name in sorted(name for name in names if not name.startswith(".")):
            if name.lower().endswith(SUFFIXES):
                found.append(File(Path(folder) / name, parts[0] if parts else None))
            elif name != "clients.csv":
                others.append(str(Path(folder) / name))
    if errors:
        listed = first_of([f"{error.filename} ({error.strerror})" for error in errors])
        raise refuse(config, f"has {len(errors):,} folders that cannot be read: {listed}", "folders that you can read")
    return found


def _hold_out(config: DataConfig, files: list[File]) -> tuple[list[File], list[File]]:
    """Training and test images: a fifth of each class, but at least one, always the same ones, is for testing."""
    train, test = [file for file in files if not file.label], []
    for label, members in itertools.groupby((file for file in files if file.label), lambda file: file.label):
        images = list(members)
        if len(images) < 2:
            raise refuse(config, f"has one image of class {label}", "two, one of them for testing, or a folder test")
        order = seeds.fixed_rng(seeds.RngTag.TEST_SPLIT).permutation(len(images))
        held_out = max(1, round(TEST_SHARE * len(images)))
        test += [images[i] for i in np.sort(order[:held_out])]
        train += [images[i] for i in np.sort(order[held_out:])]
    return train, test


def _assign_clients(config: DataConfig, root: Path, train: list[File], test: list[File]) -> list[File]:
    """The training images with their clients, if there is a ``clients.csv``."""
    path, asked = root / "clients.csv", config.client_column
    if not os.path.isfile(path):
        if asked:
            raise refuse(config, f"has no clients.csv for data.client_column {asked!r}", f"a file {path}")
        return train
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            columns, rows = list(table.fieldnames or []), list(table)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise refuse(config, f"has a clients.csv that cannot be read ({error})", "comma-separated UTF-8") from error
    column = next((name for name in ([asked] if asked else CLIENT_COLUMNS) if name in columns), None)
    if "file" not in columns or column is None:
        raise refuse(config, f"has a clients.csv with columns {', '.join(columns)}", f"file, {asked or 'client'}")
    owners: dict[str, str] = {}
    for row in rows:
        name, owner = PurePosixPath(row["file"] or "").as_posix(), row[column] or ""
        if owners.setdefault(name, owner) != owner:
            raise refuse(config, f"has a clients.csv that gives {name} to {owners[name]!r} and to {owner!r}",
                         "one client for each image")  # fmt: skip
    names = {file.path.relative_to(root).as_posix() for file in train + test}
    if unknown := [name for name in owners if name not in names]:
        raise refuse(config, f"has a clients.csv with {len(unknown):,} files that are not there: {first_of(unknown)}",
                     f"paths of images, relative to {root}")  # fmt: skip
    files = [file._replace(client=owners.get(file.path.relative_to(root).as_posix())) for file in train]
    if missing := [str(file.path) for file in files if not file.client]:
        raise refuse(config, f"has {len(missing):,} training images without a client in clients.csv: "
                     f"{first_of(missing)}", "a client for each")  # fmt: skip
    return files


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
            yield from _npz_images(path, f"{name}_images")
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


def _npz_images(path: Path, name: str) -> Iterator[np.ndarray]:
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
