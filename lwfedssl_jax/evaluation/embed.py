"""Features of many pictures, read and encoded a few at a time."""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lwfedssl_jax.data.files import image_arrays, npz_images
from lwfedssl_jax.data.folders import SUFFIXES
from lwfedssl_jax.evaluation.export import Picture, TrainedEncoder
from lwfedssl_jax.system.errors import ConfigError

AT_ONCE = 1024  # pictures in memory
FORMS = "a folder of images, an image, or an npz file with arrays of uint8 images"


class Pictures(NamedTuple):
    """Pictures that are not read yet: how many there are, and name and picture of each."""

    number: int
    each: Iterable[tuple[str, Picture]]


class Features(NamedTuple):
    """What pictures gave.

    Attributes:
      names: of the N pictures that could be read.
      features: NxD float32.
      unreadable: the others, each with the reason.
    """

    names: list[str]
    features: np.ndarray
    unreadable: list[str]


def find_pictures(path: Path) -> Pictures:
    """Find the pictures below a folder, in an npz file, or a single one.

    Raises:
      ConfigError: there are none.
    """
    try:
        if path.is_dir():
            files = sorted(_files_in(path))
            found = Pictures(len(files), ((file.relative_to(path).as_posix(), file) for file in files))
        elif path.suffix == ".npz":
            arrays = image_arrays(path)
            found = Pictures(sum(shape[0] for shape in arrays.values()), _images_in(path, list(arrays)))
        else:
            found = Pictures(int(path.is_file()), [(path.name, path)])
    except (OSError, ValueError) as error:
        raise ConfigError(f"IMAGES: {path} cannot be read ({error}); accepted: {FORMS}") from error
    if not found.number:
        lacks = "has no arrays of uint8 images" if path.suffix == ".npz" else "has no images"
        raise ConfigError(f"IMAGES: {path} {lacks if path.exists() else 'does not exist'}; accepted: {FORMS}")
    return found


def _images_in(path: Path, arrays: list[str]) -> Iterator[tuple[str, Picture]]:
    try:
        for name in arrays:
            for i, image in enumerate(npz_images(path, name)):
                yield f"{name}[{i}]", image
    except Exception as error:  # zipfile and NumPy raise many kinds if a byte is wrong
        raise ConfigError(f"IMAGES: {path} cannot be read ({error}); accepted: {FORMS}") from error


def _files_in(folder: Path) -> Iterator[Path]:
    reached: set[str] = set()

    def fail(error: OSError) -> None:
        raise error

    for root, inner, names in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(root)) in reached:  # by a link
            inner.clear()
            continue
        reached.add(real)
        inner[:] = [name for name in inner if not name.startswith(".")]
        yield from (Path(root) / name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith("."))


def embed(encoder: TrainedEncoder, pictures: Pictures, report: Callable[[int], None] = lambda done: None) -> Features:
    """Compute the features of pictures.

    Args:
      encoder: computes them.
      pictures: of any sizes.
      report: hears how many are done.
    """
    names: list[str] = []
    features: list[np.ndarray] = [np.zeros((0, encoder.num_features), np.float32)]
    unreadable: list[str] = []

    def read(entry: tuple[str, Picture]) -> np.ndarray | str:
        name, picture = entry
        try:
            return encoder.picture(picture)
        except Exception as error:  # decoders raise many kinds; all of them are counted
            reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
            return f"{name} ({reason})"

    each, done = iter(pictures.each), 0
    with ThreadPoolExecutor() as pool:
        while group := list(itertools.islice(each, AT_ONCE)):
            images = list(pool.map(read, group))
            unreadable += [image for image in images if isinstance(image, str)]
            read_ones = [image for image in images if not isinstance(image, str)]
            names += [name for (name, _), image in zip(group, images, strict=True) if not isinstance(image, str)]
            if read_ones:
                features.append(encoder(np.stack(read_ones)))
            done += len(group)
            report(done)
    return Features(names, np.concatenate(features), unreadable)
