"""Data sets that are folders of images."""

import csv
import itertools
import os
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image

from lwfedssl_jax.config import DataConfig
from lwfedssl_jax.data.cache import Example, Notify, Split, Undecoded, path_of, refuse, stamp
from lwfedssl_jax.system import seeds
from lwfedssl_jax.system.errors import first_of

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TEST_SHARE = 0.2  # of each class, if the folder has no split
CLIENT_COLUMNS = ("client", "client_id", "user_id")

# Names of folders that are splits, in any case, and what others add to them.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
}
ADDED = {"set", "data", "dataset", "split", "image", "images", "img", "imgs", "file", "files", "folder"}

FOLDER_FORMS = "PATH/train/CLASS/* and PATH/test/CLASS/*, or PATH/CLASS/*, or without classes PATH/*"


class File(NamedTuple):
    """An image of a folder, with the folder of its class and its client; None if it has none."""

    path: Path
    label: str | None
    client: str | None = None


class Parts(NamedTuple):
    """Where a folder has its splits: none of them if its folders are classes."""

    train: Path | None = None
    test: Path | None = None
    val: Path | None = None


def split_of(name: str) -> str | None:
    """The split, train, test or val, whose folder has this name in any case; None if no split has."""
    return SPLITS.get(name.casefold())


def looks_like_split(name: str) -> bool:
    """Whether a name is a split's with something added, such as ``train2017``, ``Test-Set`` or ``images_val``."""
    words = re.findall("[a-z]+", name.casefold())
    rest = [w for word in words if (w := word.removesuffix("set") or word) not in ADDED]
    return len(rest) == 1 and split_of(rest[0]) is not None


def find_parts(config: DataConfig, root: Path, note: Notify) -> Parts:
    """Find the splits of a folder.

    Without a folder for testing, that for validation is for testing.

    Raises:
      ConfigError: folders look like splits, but are not those of ``FOLDER_FORMS``.
    """
    names, accepted = _folders_in(root), f"{FOLDER_FORMS}; train, test and val may be {', '.join(SPLITS)}, in any case"
    splits = {split: [name for name in names if split_of(name) == split] for split in Parts._fields}
    if unfit := [name for name in names if looks_like_split(name) and not split_of(name)]:
        raise refuse(config, f"has folders that look like splits: {first_of(unfit)}", accepted)
    for split, found in splits.items():
        if len(found) > 1:
            raise refuse(config, f"has several folders for {split}: {first_of(found)}", f"one; {accepted}")
    train, test, val = (root / found[0] if found else None for found in splits.values())
    if not train:
        if test or val:
            raise refuse(config, f"has a folder {(test or val or root).name} but none for training", accepted)
        for name in names:
            if inner := [f"{name}/{inner}" for inner in _folders_in(root / name) if split_of(inner)]:
                inside = f"folder:{root / name}, or " if len(names) == 1 else ""
                raise refuse(config, f"has splits inside its folders: {first_of(inner)}", inside + accepted)
        return Parts()
    if others := [name for name in names if not split_of(name)]:
        note(f"folders of {root} beside its splits are left out: {first_of(others)}")
    return Parts(train, test or val, val if test else None)


def _folders_in(root: Path) -> list[str]:
    """Names of the folders in a folder, in order, except for hidden ones; none if it cannot be read."""
    try:
        return sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:  # found again, and reported, with the images
        return []


def open_folder(config: DataConfig, note: Notify) -> Undecoded:
    """Find the images of a folder by class; training images outside the class folders have no label.

    ``find_parts`` has the rule for splits. Without ``train``, a fifth of each class is for testing. A flat folder,
    without classes, has no test images, and the encoder is not evaluated. With a file ``clients.csv`` (columns
    ``file``, relative to the folder, and ``client``), training images belong to clients.

    Raises:
      ConfigError: there are no images, a folder cannot be read or is reached twice, splits are not clear, a class has
        test images only or cannot be split, or ``clients.csv`` does not give the client of every training image.
    """
    root = path_of(config)
    if not os.path.isdir(root):
        raise refuse(config, "is not a folder", f"a folder with {FOLDER_FORMS}")
    parts, others = find_parts(config, root, note), list[str]()
    train, test, val = (
        _find_images(config, part, others) if part else [] for part in parts._replace(train=parts.train or root)
    )
    if others:
        note(f"{len(others):,} files of {root} do not have the suffix of an image and are left out: {first_of(others)}")
    if not train:
        raise refuse(config, "has no images for training", FOLDER_FORMS)
    classes = sorted({file.label for file in train if file.label})
    if classes and parts.train and not parts.test:
        raise refuse(config, f"has a folder {parts.train.name} but none for testing", "test or val next to it")
    if not classes and not test:
        note(f"{root} has no class folders: the encoder is trained, but not evaluated")
    elif not parts.train:
        train, test = _hold_out(config, train)
    if classes and not (test and all(file.label for file in test)):
        raise refuse(config, "has test images without a class, or none", f"a class folder each, of {first_of(classes)}")
    if val and not {file.label for file in val} <= set(classes):
        note("the validation split is left out: it has images without a class, or of classes without training images")
        val = []
    if unknown := sorted({str(file.label) for file in test} - set(classes)):
        raise refuse(config, f"has test images of classes without training images: {first_of(unknown)}", "the same")
    if classes:
        note(describe_classes(root, classes))
    train = _assign_clients(config, root, train, test)
    number = {label: i for i, label in enumerate(classes)}

    def read(_: int, file: File) -> Example:
        with Image.open(file.path) as image:
            image.load()
            return Example(image, number[file.label] if file.label else -1, file.client)

    def make_split(files: list[File]) -> Split:
        return Split(len(files), files, read, lambda i: str(files[i].path))

    files_of = {"train": train, "test": test} | ({"val": val} if val else {})
    version = [[(*stamp(file.path), file.label, file.client) for file in files] for files in files_of.values()]
    owners = tuple(sorted({file.client for file in train if file.client}))
    return Undecoded(
        version, lambda: {name: make_split(files) for name, files in files_of.items()}, tuple(classes), owners
    )


def describe_classes(root: Path, classes: list[str]) -> str:
    """What the user should know of the classes that were found: a lone one is often a folder of another kind."""
    if len(classes) == 1:
        return f"{root} has a single class, {classes[0]}: accuracies will be 100 % and say nothing"
    return f"{root} has {len(classes):,} classes: {first_of(classes)}"


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


def held_out(images: int) -> np.ndarray:
    """Which of a class's images are for testing: a fifth, but at least one, always the same ones."""
    chosen = seeds.fixed_rng(seeds.RngTag.TEST_SPLIT).permutation(images)[: max(1, round(TEST_SHARE * images))]
    testing = np.zeros(images, bool)
    testing[chosen] = True
    return testing


def _hold_out(config: DataConfig, files: list[File]) -> tuple[list[File], list[File]]:
    """Training and test images of a folder without splits."""
    train, test = [file for file in files if not file.label], []
    for label, members in itertools.groupby((file for file in files if file.label), lambda file: file.label):
        images = list(members)
        if len(images) < 2:
            raise refuse(config, f"has one image of class {label}", "two, one of them for testing, or a folder test")
        testing = held_out(len(images))
        test += [image for image, held in zip(images, testing, strict=True) if held]
        train += [image for image, held in zip(images, testing, strict=True) if not held]
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
