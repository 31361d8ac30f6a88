"""Images decoded once, by threads, into the user's cache folder: arrays that are mapped into memory, not read."""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lwfedssl_jax.config import ConfigError, DataConfig

HASHES = "sha256.json"  # of an entry's arrays
FORMAT = 1  # of an entry; another number leaves all entries there are unused
AT_ONCE, OF_A_THREAD = 1024, 32  # images that are on their way together, and those that a thread takes
CLASSES = 2**20  # at most; more would make heads of gigabytes
NAMED = 3  # of things that are wrong, the first ones are named and the rest counted
SECONDS_TO_ABANDON = 24 * 3600.0  # a temporary folder that nobody has touched for so long has lost its process

Notify = Callable[[str], None]


class Example(NamedTuple):
    """An image of any size with its label, -1 for none, and whose it is."""

    image: np.ndarray | Image.Image
    label: int
    client: int | str | None = None


class Split(NamedTuple):
    """Examples that are not decoded yet.

    Attributes:
      size: how many examples.
      items: one for each, in order; gone through once.
      read: the example of an item and its number; threads call it, and what it raises makes the item unreadable.
      name: what messages call an item, by its number.
    """

    size: int
    items: Iterable[Any]
    read: Callable[[int, Any], Example]
    name: Callable[[int], str]


class Undecoded(NamedTuple):
    """A data set that has been found.

    Attributes:
      version: plain data that changes when the content does.
      splits: ``() -> (train, test)``; not called where the cache has them.
    """

    version: Any
    splits: Callable[[], tuple[Split, Split]]


def refuse(config: DataConfig, why: str, accepted: str) -> ConfigError:
    """The error for a data set that cannot be used."""
    return ConfigError(f"data.name: {config.name!r} {why}; accepted: {accepted}")


def first_of(names: list[str]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def stamp(path: Path) -> tuple[str, int, int]:
    """What changes when a file does: its path, size and time of modification, both -1 where there is none."""
    try:
        found = path.stat()
    except OSError:  # whoever reads it says why
        return str(path), -1, -1
    return str(path), found.st_size, found.st_mtime_ns


def load_cached(
    config: DataConfig, found: Undecoded, channels: int, notify: Notify, note: Notify
) -> dict[str, np.ndarray]:
    """``train_images, train_labels, test_images, test_labels``, and ``train_clients`` if examples say whose they are.

    Images are uint8 NxHxWxC, mapped from the cache; where that cannot be written, they are in memory.
    Clients are numbered by the order of their names.

    Args:
      config: of the data set.
      found: what it is decoded from, if it is not in the cache.
      channels: 1 or 3; images become gray or RGB.
      notify: hears of progress.
      note: hears what the user should know.

    Raises:
      ConfigError: an image cannot be read, a test image has no label, or a label is too large.
    """
    key = {"format": FORMAT, "name": config.name, "channels": channels, "size": config.image_size}
    digest = hashlib.sha256(json.dumps([key, found.version]).encode()).hexdigest()
    kind, _, rest = config.name.partition(":")
    label = re.sub(r"\W+", "-", f"{kind}-{Path(rest).name}"[:40]).strip("-")
    entry = folder() / f"{label}-{config.image_size}-{digest[:16]}"
    if entry.is_dir():
        notify(f"checking {entry}")
        try:
            return _checked(entry)
        except (OSError, EOFError, ValueError) as error:
            note(f"{entry} is damaged ({error}): decoding again")
            shutil.rmtree(entry, ignore_errors=True)
    train, test = found.splits()
    shapes = {
        f"{name}_images": (split.size, config.image_size, config.image_size, channels)
        for name, split in (("train", train), ("test", test))
    }
    try:
        temporary = _temporary(entry)
    except OSError as error:
        note(f"the cache folder {entry.parent} cannot be written ({error}): the images stay in memory")
        return _decode(config, train, test, {name: np.empty(shape, np.uint8) for name, shape in shapes.items()}, notify)
    try:
        try:
            images = {name: _allocate(temporary / f"{name}.npy", shape) for name, shape in shapes.items()}
        except OSError as error:
            note(f"the cache folder {entry.parent} has no room ({error}): the images stay in memory")
            images = {name: np.empty(shape, np.uint8) for name, shape in shapes.items()}
            return _decode(config, train, test, images, notify)
        arrays = _decode(config, train, test, images, notify)
        _finish(temporary, arrays)
        arrays |= {name: np.load(temporary / f"{name}.npy", mmap_mode="r") for name in shapes}
        with contextlib.suppress(OSError):  # another process was faster, with the same content
            os.rename(temporary, entry)
        return arrays  # files that are mapped stay so under another name, or none
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def folder() -> Path:
    """Where decoded data sets are kept; all of it may be deleted at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lwfedssl_jax" / "data"


def fit(image: np.ndarray | Image.Image, size: int, channels: int) -> np.ndarray:
    """A ``size x size x channels`` uint8 image (Pillow, bilinear; the sides' ratio is not kept).

    Raises:
      ValueError: the image has more than 8 bits a channel.
    """
    if isinstance(image, np.ndarray):
        if image.shape == (size, size, channels):
            return image
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    if image.mode[0] in "IF":
        raise ValueError(f"its mode {image.mode} has more than 8 bits a channel")
    image = image.convert("RGB" if channels == 3 else "L")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, channels)


def _decode(
    config: DataConfig, train: Split, test: Split, images: Mapping[str, np.ndarray], notify: Notify
) -> dict[str, np.ndarray]:
    """All arrays, of which ``images`` is filled."""
    total = train.size + test.size

    def progress(done: int) -> None:
        notify(f"decoding {done:,} of {total:,} images")

    train_labels, whose, failed = _decode_split(train, images["train_images"], progress)
    test_labels, _, failed_too = _decode_split(test, images["test_images"], lambda done: progress(train.size + done))
    if failed := failed + failed_too:
        raise refuse(
            config,
            f"has {len(failed):,} of {total:,} images that cannot be read: {first_of(failed)}",
            "images that Pillow reads, 8 bits a channel",
        )
    if unlabelled := sum(label < 0 for label in test_labels):
        raise refuse(config, f"has {unlabelled:,} test images without a label", "a label for each")
    if (largest := max(train_labels + test_labels)) >= CLASSES:
        raise refuse(config, f"has a label {largest}", f"labels from 0 to {CLASSES - 1}")
    labels = {"train_labels": np.array(train_labels, np.int32), "test_labels": np.array(test_labels, np.int32)}
    arrays = dict(images) | labels
    if None not in whose:
        arrays["train_clients"] = np.unique(np.array(whose), return_inverse=True)[1].astype(np.int32)
    return arrays


def _decode_split(
    split: Split, images: np.ndarray, progress: Callable[[int], None]
) -> tuple[list[int], list[int | str | None], list[str]]:
    """Fills ``images``; labels, clients, and the names of those that cannot be read, with why."""
    labels = [-1] * split.size
    whose: list[int | str | None] = [None] * split.size
    failed: dict[int, str] = {}

    def work(part: list[tuple[int, Any]]) -> None:
        for i, item in part:
            try:
                example = split.read(i, item)
                images[i] = fit(example.image, *images.shape[2:])
                labels[i], whose[i] = max(example.label, -1), example.client
            except Exception as error:  # decoders raise many kinds; every one is counted and none passed over
                failed[i] = f"{split.name(i)} ({' '.join(str(error).split()) or type(error).__name__})"

    done = 0
    with ThreadPoolExecutor() as pool:
        for group in _batched(enumerate(split.items), AT_ONCE):
            list(pool.map(work, _batched(group, OF_A_THREAD)))
            done += len(group)
            progress(done)
    return labels, whose, [failed[i] for i in sorted(failed)]


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    every = iter(items)
    return iter(lambda: list(itertools.islice(every, size)), [])


def _temporary(entry: Path) -> Path:
    """A folder to make an entry in; those that killed processes have left are removed."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    for left in entry.parent.glob("*.tmp"):
        with contextlib.suppress(OSError):  # its process has just finished it
            if time.time() - max(p.stat().st_mtime for p in [left, *left.iterdir()]) > SECONDS_TO_ABANDON:
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".tmp", dir=entry.parent))


def _allocate(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A new file's array; OSError now where the disk is full, which would else kill the process when it is written."""
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _finish(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write what is not in files yet, and the hashes of all."""
    for name, array in arrays.items():
        if isinstance(array, np.memmap):
            array.flush()
        else:
            np.save(path / f"{name}.npy", array)
    (path / HASHES).write_text(json.dumps(_hashes(path), indent=1))


def _checked(entry: Path) -> dict[str, np.ndarray]:
    """An entry's arrays; ValueError or OSError where it is damaged."""
    if json.loads((entry / HASHES).read_text()) != _hashes(entry):
        raise ValueError("its arrays are not as they were written")
    files = {file.stem: file for file in entry.glob("*.npy")}
    if not {"train_images", "train_labels", "test_images", "test_labels"} <= set(files):
        raise ValueError("arrays are missing")
    mapped = {name: np.load(files[name], mmap_mode="r") for name in ("train_images", "test_images")}
    return {name: np.load(file) for name, file in files.items() if name not in mapped} | mapped


def _hashes(path: Path) -> dict[str, str]:
    hashes = {}
    for array in sorted(path.glob("*.npy")):
        with array.open("rb") as file:
            hashes[array.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
