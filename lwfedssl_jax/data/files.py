"""Data sets in files: folders of images, npz and idx files."""

import csv
import gzip
import itertools
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from lwfedssl_jax.config import ConfigError, DataConfig
from lwfedssl_jax.data.cache import CLASSES, Example, Notify, Split, Undecoded, first_of, refuse, stamp
from lwfedssl_jax.system import seeds

# Where Debian's package dataset-fashion-mnist puts its files.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TEST_FOLDERS = ("test", "val", "validation")
TEST_SHARE = 0.2  # of each class, where the folder has no split
CLIENT_COLUMNS = ("client", "client_id", "user_id")

FOLDER_FORMS = "PATH/train/CLASS/* and PATH/test/CLASS/*, or PATH/CLASS/*, or without classes PATH/*"
NPZ_FORM = "MedMNIST's npz: uint8 train_images and test_images of NxHxW or NxHxWx3, integer labels of Nx1"


class File(NamedTuple):
    """An image of a folder: where it is, its class's folder, and whose it is."""

    path: Path
    label: str | None
    client: str | None = None


def path_of(config: DataConfig) -> Path:
    """The PATH of ``data.name``."""
    return Path(os.path.expanduser(config.name.partition(":")[2])).absolute()


def open_folder(config: DataConfig, note: Notify) -> Undecoded:
    """Images by class; those that lie beside the class folders of the training images have no label.

    Without ``train/``, a fifth of each class is for testing. A flat folder, without classes, has no test images, and
    nothing judges the encoder. With a file ``clients.csv`` (columns file, relative to
    the folder, and client), training images belong to clients.

    Raises:
      ConfigError: nothing there, a folder that cannot be read or is reached twice, a class with test images only, or
        one that cannot be split; ``clients.csv`` does not say of every training image whose it is.
    """
    root = path_of(config)
    if not os.path.isdir(root):
        raise refuse(config, "is not a folder", f"a folder with {FOLDER_FORMS}")
    others: list[str] = []
    if (root / "train").is_dir():
        tests = [root / name for name in TEST_FOLDERS if (root / name).is_dir()]
        train = _images(config, root / "train", others)
        test = _images(config, tests[0], others) if tests else []
        if not tests and any(file.label for file in train):
            raise refuse(config, "has a folder train and none for testing", f"{' or '.join(TEST_FOLDERS)} beside it")
    else:
        train, test = _images(config, root, others), []
    if others:
        note(f"{len(others):,} files of {root} do not end like images and are left out: {first_of(others)}")
    if not train:
        raise refuse(config, "has no images for training", FOLDER_FORMS)
    classes = sorted({file.label for file in train if file.label})
    if not classes and not test:
        note(f"{root} has no class folders: the encoder is trained, and not judged")
    elif not (root / "train").is_dir():
        train, test = _split(config, train)
    if classes and not (test and all(file.label for file in test)):
        raise refuse(config, "has test images without a class, or none", f"a class folder each, of {first_of(classes)}")
    if unknown := sorted({str(file.label) for file in test} - set(classes)):
        raise refuse(config, f"has test images of classes without training images: {first_of(unknown)}", "the same")
    train = _clients(config, root, train, test)

    number = {label: i for i, label in enumerate(classes)}

    def read(_: int, file: File) -> Example:
        with Image.open(file.path) as image:
            image.load()
            return Example(image, number[file.label] if file.label else -1, file.client)

    def splits() -> tuple[Split, Split]:
        def split(files: Sequence[File]) -> Split:
            return Split(len(files), files, read, lambda i: str(files[i].path))

        return split(train), split(test)

    version = [[(*stamp(file.path), file.label, file.client) for file in files] for files in (train, test)]
    return Undecoded(version, splits)


def _images(config: DataConfig, root: Path, others: list[str]) -> list[File]:
    """The images under a folder in order, hidden ones left out; ``others`` get files that do not end like one."""
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
        named = first_of([f"{error.filename} ({error.strerror})" for error in errors])
        raise refuse(config, f"has {len(errors):,} folders that cannot be read: {named}", "folders that you can read")
    return found


def _split(config: DataConfig, files: list[File]) -> tuple[list[File], list[File]]:
    """A fifth of each class, at least one image, for testing: always the same ones."""
    train, test = [file for file in files if not file.label], []
    for label, members in itertools.groupby((file for file in files if file.label), lambda file: file.label):
        of_class = list(members)
        if len(of_class) < 2:
            raise refuse(config, f"has one image of class {label}", "two, one of them for testing, or a folder test")
        order = seeds.fixed_rng().permutation(len(of_class))
        held = max(1, round(TEST_SHARE * len(of_class)))
        test += [of_class[i] for i in np.sort(order[:held])]
        train += [of_class[i] for i in np.sort(order[held:])]
    return train, test


def _clients(config: DataConfig, root: Path, train: list[File], test: list[File]) -> list[File]:
    """The training images with their clients, where there is a ``clients.csv``."""
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
    """MedMNIST's format (arXiv 2110.14795), gray or RGB; ``val_*`` is used where there is no ``test_*``, else left out.

    Images are read one after the other, so that they may be more than fit the memory.

    Raises:
      ConfigError: no such file, or not of this format.
    """
    path = path_of(config)
    if not os.path.isfile(path):
        raise refuse(config, "is not a file", NPZ_FORM)

    def splits() -> tuple[Split, Split]:
        try:
            with zipfile.ZipFile(path) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
                held = "test" if "test_images" in names else "val"
                return _npz_split(config, path, archive, "train"), _npz_split(config, path, archive, held)
        except ConfigError:
            raise
        except Exception as error:  # zipfile and NumPy raise many kinds where a byte is wrong
            raise _unreadable(config, error) from error

    return Undecoded(stamp(path), splits)


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
    with archive.open(f"{name}_labels.npy") as file:
        shape_of_labels, dtype = _npy_header(file)
    if not np.issubdtype(dtype, np.integer):
        raise refuse(config, f"has {name}_labels of type {dtype}", NPZ_FORM)
    if len(shape_of_labels) == 2 and shape_of_labels[1] > 1:
        raise refuse(config, f"has {shape_of_labels[1]} labels for each image", "one class for each image")
    if shape_of_labels not in ((shape[0],), (shape[0], 1)):
        raise refuse(config, f"has {name}_labels of shape {shape_of_labels} for {shape[0]} images", NPZ_FORM)
    with archive.open(f"{name}_labels.npy") as file:
        labels = np.lib.format.read_array(file, allow_pickle=False).reshape(-1)
    if wrong := [x for x in (int(labels.min()), int(labels.max())) if not 0 <= x < CLASSES]:
        raise refuse(config, f"has a label {wrong[0]} in {name}_labels", f"labels from 0 to {CLASSES - 1}")

    def items() -> Iterator[np.ndarray]:
        try:
            with zipfile.ZipFile(path) as again, again.open(f"{name}_images.npy") as file:
                _npy_header(file)
                each = math.prod(shape[1:])
                for i in range(shape[0]):
                    content = file.read(each)
                    if len(content) < each:
                        raise EOFError(f"{name}_images ends at image {i}")
                    yield np.frombuffer(content, np.uint8).reshape(*shape[1:3], -1)
        except Exception as error:  # as above
            raise _unreadable(config, error) from error

    def read(i: int, image: np.ndarray) -> Example:
        return Example(image, int(labels[i]))

    return Split(shape[0], items(), read, lambda i: f"{name}_images[{i}]")


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of an array; leaves the file where its values begin, in C order.

    Raises:
      ValueError: there is none, or it is in Fortran's order.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran and len(shape) > 2:
        raise ValueError("an array is in Fortran's order; np.ascontiguousarray before it is saved")
    return shape, dtype


def open_fashion_mnist(config: DataConfig) -> Undecoded:
    """Zalando's 70,000 garments (28x28, one channel; arXiv 1708.07747), 10,000 of them for testing, from idx files.

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
            raise _damaged(config, images_file, f"shape {images.shape} where there are {len(labels)} labels of 28x28")
        if labels.max() > 9:
            raise _damaged(config, labels_file, f"it has a label {labels.max()}")

        def read(i: int, image: np.ndarray) -> Example:
            return Example(image[..., None], int(labels[i]))

        return Split(len(labels), images, read, lambda i: f"{images_file}[{i}]")

    return Undecoded([stamp(path) for pair in files for path in pair], lambda: (split(*files[0]), split(*files[1])))


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
    """The uint8 array of an idx file: two zeros, type 8, number of dimensions, big-endian sizes, bytes.

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
