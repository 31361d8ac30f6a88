"""Data sets that a script or a notebook has in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lwfedssl_jax.config import ConfigError, DataConfig
from lwfedssl_jax.data import cache
from lwfedssl_jax.data.cache import CLASSES, Notify
from lwfedssl_jax.data.folders import held_out
from lwfedssl_jax.data.sources import HELD, MEMORY, Dataset, Source, ignore_text

WHOLE = "whole numbers; names, labels = np.unique(labels, return_inverse=True) makes them, with class_names=names"
Images = np.ndarray | Sequence[np.ndarray | Image.Image]


@dataclass(frozen=True)
class Data:
    """A data set in memory, for ``train(config, data=...)``; images are resized to ``data.image_size``.

    Attributes:
      images: for training: uint8 NxHxW, NxHxWx1 or NxHxWx3, or a list of such images or of Pillow's, of any sizes.
      labels: N whole numbers from 0, -1 for images without a label; None without any. They are for evaluation alone.
      test_images, test_labels: for testing, each with a label; without them, a fifth of each class is held out, always
        the same images for the same data. Without labels, the encoder is not evaluated.
      val_images, val_labels: the validation split (``evaluation.labelled_split``), if there is one.
      clients: N numbers or names, whose images they are (``partition.kind natural``).
      class_names: of labels 0, 1 and so on.
    """

    images: Images
    labels: Sequence[int] | np.ndarray | None = None
    test_images: Images | None = None
    test_labels: Sequence[int] | np.ndarray | None = None
    val_images: Images | None = None
    val_labels: Sequence[int] | np.ndarray | None = None
    clients: Sequence[Any] | np.ndarray | None = None
    class_names: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check what can be checked without a config.

        Raises:
          ConfigError: images, labels or clients are not valid, or do not fit together.
        """
        (images, labels), *_ = (_part(self, prefix) for prefix in PREFIXES)
        if self.clients is not None and len(np.asarray(self.clients)) != len(images):
            raise _refuse("clients", f"{len(np.asarray(self.clients))} for {len(images)} images", "one for each image")
        if len(self.class_names) and len(self.class_names) <= (most := int(labels.max(initial=-1))):
            raise _refuse("class_names", f"{len(self.class_names)} for labels up to {most}", "a name for each label")


PREFIXES = ("", "test_", "val_")  # of the splits' fields


def hold(data: Data) -> str:
    """Keep a data set for this process; return the ``data.name`` that names it, by its content.

    Raises:
      ConfigError: it is no ``Data``.
    """
    if not isinstance(data, Data):
        raise ConfigError(f"data: found {type(data).__name__}; accepted: Data(images, labels)")
    channels = 3 if any(_has_colours(images) for images in (data.images, data.test_images, data.val_images)) else 1
    parts = {name: _part(data, name) for name in PREFIXES}
    clients: np.ndarray | None = None
    client_names: tuple[str, ...] = ()
    if data.clients is not None:
        names, clients = np.unique(np.asarray(data.clients), return_inverse=True)
        clients, client_names = clients.astype(np.int32), tuple(map(str, names))
    name = f"{MEMORY}:{_digest(parts, clients, data.class_names)}"

    def load(config: DataConfig, notify: Notify = ignore_text, note: Notify | None = None) -> Dataset:
        arrays: dict[str, Any] = {}
        for prefix, (images, labels) in parts.items():
            arrays[f"{prefix or 'train_'}images"] = _fitted(images, config.image_size, channels)
            arrays[f"{prefix or 'train_'}labels"] = labels
        dataset = Dataset(
            **arrays, train_clients=clients, class_names=tuple(data.class_names), client_names=client_names
        )
        if not len(dataset.val_labels if dataset.val_labels is not None else ()):
            dataset = dataset._replace(val_images=None, val_labels=None)
        return dataset if len(dataset.test_images) or not len(dataset.labelled) else _with_test_images(dataset)

    HELD[name] = Source(channels, "natural" if channels == 3 else "digits", load, (name,))
    return name


def _refuse(field: str, found: str, accepted: str) -> ConfigError:
    return ConfigError(f"Data.{field}: {found}; accepted: {accepted}")


def _has_colours(images: Images | None) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim == 4 and images.shape[3] > 1
    return any(
        image.mode not in ("1", "L") if isinstance(image, Image.Image) else np.shape(image)[2:] not in ((), (1,))
        for image in (images if images is not None else ())
    )


def _part(data: Data, prefix: str) -> tuple[list[np.ndarray | Image.Image], np.ndarray]:
    """The images of a split, and its labels.

    Raises:
      ConfigError: they are not valid.
    """
    images, labels = getattr(data, f"{prefix}images"), getattr(data, f"{prefix}labels")
    given = [images] if isinstance(images, str | Path) else images if images is not None else []
    if any(isinstance(image, str | Path) for image in given):
        raise _refuse(f"{prefix}images", "paths", "arrays, or data.name folder:PATH without data= for files")
    found = [x if isinstance(x, Image.Image) else np.asarray(x) for x in given]
    if not found and not prefix:
        raise _refuse("images", "none", "at least one image")
    for i, image in enumerate(found):
        if isinstance(image, Image.Image):
            if image.mode[0] in "IF":
                raise _refuse(f"{prefix}images[{i}]", f"mode {image.mode}", "8 bits per channel")
            continue
        shape, dtype = np.shape(image), getattr(image, "dtype", type(image))
        if dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3))) or 0 in shape:
            last = len(shape) == 3 and shape[0] in (1, 3) and shape[2] not in (1, 3)
            accepted = f"uint8 HxW, HxWx1 or HxWx3{', channels last (np.moveaxis)' if last else ''}, or Pillow's"
            raise _refuse(f"{prefix}images[{i}]", f"{dtype} of shape {shape}", accepted)
    if labels is None:
        if prefix and found:
            raise _refuse(f"{prefix}labels", "missing", f"a label for each of {len(found)} images")
        return found, np.full(len(found), -1, np.int32)
    numbers = np.asarray(labels).reshape(-1)
    least = 0 if prefix else -1
    if not np.issubdtype(numbers.dtype, np.integer) and len(numbers):
        raise _refuse(f"{prefix}labels", f"type {numbers.dtype}", WHOLE)
    if len(numbers) != len(found):
        raise _refuse(f"{prefix}labels", f"{len(numbers)} for {len(found)} images", "one for each image")
    if wrong := [int(n) for n in (numbers.min(initial=0), numbers.max(initial=0)) if not least <= n < CLASSES]:
        raise _refuse(f"{prefix}labels", f"a label {wrong[0]}", f"{least} to {CLASSES - 1}")
    return found, numbers.astype(np.int32)


def _fitted(images: Sequence[np.ndarray | Image.Image], size: int, channels: int) -> np.ndarray:
    fitted = [cache.fit(image, size, channels) for image in images]
    return np.stack(fitted) if fitted else np.zeros((0, size, size, channels), np.uint8)


def _with_test_images(dataset: Dataset) -> Dataset:
    """Hold a fifth of each class out for testing.

    Raises:
      ConfigError: a class has one image.
    """
    testing = np.zeros(len(dataset.train_labels), bool)
    for label in np.unique(dataset.train_labels[dataset.labelled]):
        members = np.flatnonzero(dataset.train_labels == label)
        if len(members) < 2:
            raise _refuse("labels", f"one image of class {label}", "two, one of them for testing, or test_images")
        testing[members[held_out(len(members))]] = True
    return dataset._replace(
        train_images=dataset.train_images[~testing],
        train_labels=dataset.train_labels[~testing],
        test_images=dataset.train_images[testing],
        test_labels=dataset.train_labels[testing],
        train_clients=None if dataset.train_clients is None else dataset.train_clients[~testing],
    )


def _digest(
    parts: dict[str, tuple[list[np.ndarray | Image.Image], np.ndarray]],
    clients: np.ndarray | None,
    class_names: Sequence[str],
) -> str:
    """What changes when the data do, of eight hexadecimal digits."""
    found = hashlib.sha256()
    for images, labels in parts.values():
        for image in images:
            array = np.asarray(image)
            found.update(f"{array.shape}".encode() + array.tobytes())
        found.update(labels.tobytes())
    found.update(b"" if clients is None else clients.tobytes())
    found.update(repr(list(class_names)).encode() if len(class_names) else b"")
    return found.hexdigest()[:8]
