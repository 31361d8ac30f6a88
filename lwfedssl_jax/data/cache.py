"""Images that threads decode once into the user's cache folder, as arrays that are mapped into memory."""

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
from PIL import ExifTags, Image

from lwfedssl_jax.config import ConfigError, DataConfig
from lwfedssl_jax.system.errors import first_of
from lwfedssl_jax.system.files import user_cache, with_home

HASHES = "sha256.json"  # of an entry's arrays
FORMAT = 4  # of an entry; with another number, all existing entries are unused
GROUP_SIZE, THREAD_BATCH = 1024, 32  # images that are decoded at a time, by all threads and by one
CLASSES = 2**20  # at most; more would make heads of gigabytes
SECONDS_TO_ABANDON = 24 * 3600.0  # a temporary folder unchanged for longer is left over from a process that died

TURN = Image.Transpose
UPRIGHT: dict[Any, Image.Transpose] = {  # by EXIF's orientation
    2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE, 6: TURN.ROTATE_270,
    7: TURN.TRANSVERSE, 8: TURN.ROTATE_90,
}  # fmt: skip

Notify = Callable[[str], None]


class Example(NamedTuple):
    """An image of any size, its label (-1 for none) and its client."""

    image: np.ndarray | Image.Image
    label: int
    client: int | str | None = None


class Split(NamedTuple):
    """Examples that are not decoded yet.

    Attributes:
      size: how many examples.
      items: one per example, in order; iterated over once.
      read: ``(number, item) -> Example``; threads call it. If it raises, the item counts as unreadable.
      name: ``number -> name`` of an item, for messages.
    """

    size: int
    items: Iterable[Any]
    read: Callable[[int, Any], Example]
    name: Callable[[int], str]


class Undecoded(NamedTuple):
    """A data set that has been found.

    Attributes:
      version: plain data that changes when the content does.
      splits: ``() -> {name: split}``, of ``train``, ``test`` and, if the data set has it, ``val``; not called if they
        are in the cache.
      class_names, client_names: of labels and clients 0, 1 and so on, if they are known.
    """

    version: Any
    splits: Callable[[], dict[str, Split]]
    class_names: tuple[str, ...] = ()
    client_names: tuple[str, ...] = ()


def path_of(config: DataConfig) -> Path:
    """The PATH in ``data.name``."""
    return with_home(config.name.partition(":")[2]).absolute()


def refuse(config: DataConfig, why: str, accepted: str) -> ConfigError:
    """The error for a data set that cannot be used."""
    return ConfigError(f"data.name: {config.name!r} {why}; accepted: {accepted}")


def stamp(path: Path) -> tuple[str, int, int]:
    """What changes when a file does: its path, size and modification time in ns; both are -1 if it cannot be read."""
    try:
        found = path.stat()
    except OSError:  # reading it reports why
        return str(path), -1, -1
    return str(path), found.st_size, found.st_mtime_ns


def load_cached(
    config: DataConfig, found: Undecoded, channels: int, notify: Notify, note: Notify
) -> dict[str, np.ndarray]:
    """Read a data set from the cache, or decode it into the cache.

    Args:
      config: of the data set.
      found: what to decode if the cache does not have it.
      channels: 1 or 3; images become gray or RGB.
      notify: hears of progress.
      note: hears what the user should know.

    Returns:
      ``train_images, train_labels, test_images, test_labels``, ``val_images, val_labels`` if there is a split ``val``,
      and ``train_clients`` if examples have clients, which are numbered in the order of their names. Images are uint8
      NxHxWxC, mapped from the cache, or in memory if that cannot be written.

    Raises:
      ConfigError: an image cannot be read, a test image has no label, or a label is too large.
    """
    key = {"format": FORMAT, "name": config.name, "channels": channels, "size": config.image_size}
    digest = hashlib.sha256(json.dumps([key, found.version]).encode()).hexdigest()
    kind, _, rest = config.name.partition(":")
    label = re.sub(r"\W+", "-", f"{kind}-{Path(rest).name}"[:40]).strip("-")
    if (root := folder()) is None:
        note("there is no cache folder (no home directory, and no XDG_CACHE_HOME): the images stay in memory")
        splits = found.splits()
        return _decode(config, splits, _in_memory(_shapes(config, splits, channels)), notify)
    entry = root / f"{label}-{config.image_size}-{digest[:16]}"
    if entry.is_dir():
        notify(f"checking {entry}")
        try:
            return _read_entry(entry)
        except (OSError, EOFError, ValueError) as error:
            note(f"{entry} is damaged ({error}): decoding again")
            shutil.rmtree(entry, ignore_errors=True)
    return _decode_into(entry, config, found.splits(), channels, notify, note)


def _decode_into(
    entry: Path, config: DataConfig, splits: dict[str, Split], channels: int, notify: Notify, note: Notify
) -> dict[str, np.ndarray]:
    """Decode all splits into a new entry of the cache, or into memory if it cannot be written."""
    shapes = _shapes(config, splits, channels)
    try:
        temporary = _make_temporary(entry)
    except OSError as error:
        note(f"the cache folder {entry.parent} cannot be written ({error}): the images stay in memory")
        return _decode(config, splits, _in_memory(shapes), notify)
    try:
        try:
            images = {name: _allocate(temporary / f"{name}.npy", shape) for name, shape in shapes.items()}
        except OSError as error:
            note(f"the cache folder {entry.parent} has no room ({error}): the images stay in memory")
            return _decode(config, splits, _in_memory(shapes), notify)
        arrays = _decode(config, splits, images, notify)
        _finish(temporary, arrays)
        arrays |= {name: np.load(temporary / f"{name}.npy", mmap_mode="r") for name in shapes}
        with contextlib.suppress(OSError):  # another process was faster, with the same content
            os.rename(temporary, entry)
        return arrays  # files that are mapped stay so under another name, or none
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def folder() -> Path | None:
    """The folder of decoded data sets, if there can be one; it may be deleted at any time."""
    root = user_cache()
    return root / "data" if root else None


def fit(image: np.ndarray | Image.Image, size: int, channels: int) -> np.ndarray:
    """A ``size x size x channels`` uint8 image, upright (Pillow, bilinear; the aspect ratio is not kept).

    A transparent image loses its transparency, as in torchvision.

    Raises:
      ValueError: the image has more than 8 bits per channel.
    """
    if isinstance(image, np.ndarray):
        if image.shape == (size, size, channels):
            return image
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
    if image.mode[0] in "IF":
        raise ValueError(f"its mode {image.mode} has more than 8 bits per channel")
    image = upright(image).convert("RGB" if channels == 3 else "L")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).reshape(size, size, channels)


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF data say; data that cannot be read say nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # of many kinds, from damaged data of no other use here
        return image
    turn = UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def _shapes(config: DataConfig, splits: Mapping[str, Split], channels: int) -> dict[str, tuple[int, ...]]:
    size = config.image_size
    return {f"{name}_images": (split.size, size, size, channels) for name, split in splits.items()}


def _in_memory(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    return {name: np.empty(shape, np.uint8) for name, shape in shapes.items()}


def _decode(
    config: DataConfig, splits: dict[str, Split], images: Mapping[str, np.ndarray], notify: Notify
) -> dict[str, np.ndarray]:
    """Fill ``images`` and return all arrays.

    Raises:
      ConfigError: as ``load_cached``.
    """
    total, before = sum(split.size for split in splits.values()), 0
    labels: dict[str, list[int]] = {}
    clients: dict[str, list[int | str | None]] = {}
    unreadable: list[str] = []

    for name, split in splits.items():

        def report(done: int, before: int = before) -> None:
            notify(f"decoding {before + done:,} of {total:,} images")

        labels[name], clients[name], reasons = _decode_split(split, images[f"{name}_images"], report)
        unreadable, before = unreadable + reasons, before + split.size
    if unreadable:
        raise refuse(
            config,
            f"has {len(unreadable):,} of {total:,} images that cannot be read: {first_of(unreadable)}",
            "images that Pillow reads, 8 bits per channel",
        )
    if unlabelled := sum(label < 0 for label in labels["test"]):
        raise refuse(config, f"has {unlabelled:,} test images without a label", "a label for each")
    if (largest := max(itertools.chain(*labels.values()))) >= CLASSES:
        raise refuse(config, f"has a label {largest}", f"labels from 0 to {CLASSES - 1}")
    arrays = dict(images) | {f"{name}_labels": np.array(numbers, np.int32) for name, numbers in labels.items()}
    if None not in clients["train"]:
        arrays["train_clients"] = np.unique(np.array(clients["train"]), return_inverse=True)[1].astype(np.int32)
    return arrays


def _decode_split(
    split: Split, images: np.ndarray, report: Callable[[int], None]
) -> tuple[list[int], list[int | str | None], list[str]]:
    """Fill ``images``; return labels, clients, and the names of unreadable items, each with the reason."""
    labels = [-1] * split.size
    clients: list[int | str | None] = [None] * split.size
    reasons: dict[int, str] = {}

    def decode(items: list[tuple[int, Any]]) -> None:
        for i, item in items:
            try:
                example = split.read(i, item)
                images[i] = fit(example.image, *images.shape[2:])
                labels[i], clients[i] = max(example.label, -1), example.client
            except Exception as error:  # decoders raise many kinds; all of them are counted
                reasons[i] = f"{split.name(i)} ({' '.join(str(error).split()) or type(error).__name__})"

    done = 0
    with ThreadPoolExecutor() as pool:
        for group in _batched(enumerate(split.items), GROUP_SIZE):
            list(pool.map(decode, _batched(group, THREAD_BATCH)))
            done += len(group)
            report(done)
    return labels, clients, [reasons[i] for i in sorted(reasons)]


def _batched(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    return iter(lambda: list(itertools.islice(iterator, size)), [])


def _make_temporary(entry: Path) -> Path:
    """Make a folder to write an entry in; remove those that killed processes have left."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    for old in entry.parent.glob("*.tmp"):
        with contextlib.suppress(OSError):  # its process has just renamed it
            if time.time() - max(p.stat().st_mtime for p in [old, *old.iterdir()]) > SECONDS_TO_ABANDON:
                shutil.rmtree(old, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".tmp", dir=entry.parent))


def _allocate(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The array of a new file.

    Raises:
      OSError: the disk is full. Without the check, writing to the array would kill the process.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def _finish(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write the arrays that are not in files yet, and the hashes of all."""
    for name, array in arrays.items():
        if isinstance(array, np.memmap):
            array.flush()
        else:
            np.save(path / f"{name}.npy", array)
    (path / HASHES).write_text(json.dumps(_hash_files(path), indent=1), encoding="utf-8")


def _read_entry(entry: Path) -> dict[str, np.ndarray]:
    """The arrays of an entry.

    Raises:
      ValueError, OSError: it is damaged.
    """
    if json.loads((entry / HASHES).read_text(encoding="utf-8")) != _hash_files(entry):
        raise ValueError("its arrays have changed since they were written")
    files = {file.stem: file for file in entry.glob("*.npy")}
    if not {"train_images", "train_labels", "test_images", "test_labels"} <= set(files):
        raise ValueError("arrays are missing")
    mapped = {name: np.load(files[name], mmap_mode="r") for name in files if name.endswith("_images")}
    return {name: np.load(file) for name, file in files.items() if name not in mapped} | mapped


def _hash_files(path: Path) -> dict[str, str]:
    hashes = {}
    for array in sorted(path.glob("*.npy")):
        with array.open("rb") as file:
            hashes[array.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
