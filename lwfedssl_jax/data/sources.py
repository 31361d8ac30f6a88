"""Data sets as uint8 arrays with a fixed train/test split."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from lwfedssl_jax.config import ConfigError, DataConfig
from lwfedssl_jax.data import cache, files, folders, tfds
from lwfedssl_jax.data.cache import Notify, Undecoded
from lwfedssl_jax.system import seeds

AT_ONCE = 4096  # images whose channels are changed at a time


class Dataset(NamedTuple):
    """Images for training and testing, NxHxWxC uint8, and their labels, N int32, -1 for none.

    Labels are for evaluation alone. Images may be mapped from a file that is larger than the memory: read them in
    batches.

    Attributes:
      train_clients: N int32, the data set's own client of each training image, from 0; None if it has no clients.
      val_images, val_labels: its validation split, if it has one and another one for testing.
      class_names, client_names: of labels, and of the data set's own clients, from 0; empty if they are not known.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    train_clients: np.ndarray | None = None
    val_images: np.ndarray | None = None
    val_labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()
    client_names: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """Number of classes: one more than the largest label."""
        return int(max(self.train_labels.max(), self.test_labels.max(initial=-1))) + 1

    @property
    def labelled(self) -> np.ndarray:
        """Indices of the training images that have a label."""
        return np.flatnonzero(self.train_labels >= 0)


def ignore_text(_: str) -> None:
    """Does nothing with what it hears."""


class Load(Protocol):
    """Function that reads a data set."""

    def __call__(self, config: DataConfig, notify: Notify = ignore_text, note: Notify | None = None) -> Dataset:
        """Read the data set.

        Args:
          config: names it.
          notify: hears of progress.
          note: hears what the user should know; by default ``notify`` does.

        Raises:
          ConfigError: it cannot be found or used.
        """


class Source(NamedTuple):
    """A kind of data set: what is known before it is read, and how to read it.

    Attributes:
      channels: of an image.
      views: name of the augmentation recipe that suits it.
      load: reads it.
      forms: of ``data.name`` that name it.
    """

    channels: int
    views: str
    load: Load
    forms: tuple[str, ...]


def find(config: DataConfig) -> Source:
    """The source that ``data.name`` names.

    Raises:
      ConfigError: no such source.
    """
    if config.name in HELD:
        return HELD[config.name]
    kind, colon, rest = config.name.partition(":")
    if kind == MEMORY:
        raise ConfigError(
            f"data.name: {config.name!r} is not in this process; accepted: train(config, data=Data(...)) with it"
        )
    forms = SOURCES[kind].forms if kind in SOURCES else ()
    if bool(colon) != bool(rest) or not any(bool(colon) == (":" in form) for form in forms):
        accepted = ", ".join(form for source in SOURCES.values() for form in source.forms)
        raise ConfigError(f"data.name: unknown {config.name!r}; accepted: {accepted}")
    return SOURCES[kind]


def with_labels_of(dataset: Dataset, split: str) -> Dataset:
    """Return the data set with the images of a split, train or val, in place of those for training.

    Raises:
      ConfigError: the data set has no validation split.
    """
    if split == "train":
        return dataset
    if dataset.val_images is None or dataset.val_labels is None:
        raise ConfigError(f"evaluation.labelled_split: {split} does not exist in this data set; accepted: train")
    return dataset._replace(train_images=dataset.val_images, train_labels=dataset.val_labels, train_clients=None)


def load_like(config: DataConfig, name: str, notify: Notify = ignore_text, note: Notify | None = None) -> Dataset:
    """Read another data set in the size and the channels of a config's images.

    Args:
      config: of the images that an encoder is trained on.
      name: of the other data set, as in ``data.name``.
      notify, note: as for ``Load``.

    Raises:
      ConfigError: it cannot be found or used.
    """
    other = dataclasses.replace(config, name=name, client_column="")
    dataset, channels = find(other).load(other, notify, note), find(config).channels
    return dataset._replace(
        train_images=with_channels(dataset.train_images, channels),
        test_images=with_channels(dataset.test_images, channels),
        val_images=None if dataset.val_images is None else with_channels(dataset.val_images, channels),
        train_clients=None,
        client_names=(),
    )


def with_channels(images_NxHxWxC: np.ndarray, channels: int) -> np.ndarray:
    """Turn uint8 images to gray (ITU-R 601, as Pillow) or RGB; images of that kind are returned as they are."""
    if images_NxHxWxC.shape[-1] == channels:
        return images_NxHxWxC
    if channels == 3:
        return np.repeat(images_NxHxWxC, 3, -1)
    gray = np.empty((*images_NxHxWxC.shape[:-1], 1), np.uint8)
    for first in range(0, len(gray), AT_ONCE):
        rows = slice(first, first + AT_ONCE)
        gray[rows, ..., 0] = np.round(images_NxHxWxC[rows] @ np.array([0.299, 0.587, 0.114]))
    return gray


def decoded(channels: int, find: Callable[[DataConfig, Notify], Undecoded]) -> Load:
    """A function that reads what ``find(config, note)`` finds, through the cache."""

    def load(config: DataConfig, notify: Notify = ignore_text, note: Notify | None = None) -> Dataset:
        note = note or notify
        found = find(config, note)
        arrays = cache.load_cached(config, found, channels, notify, note)
        return Dataset(**arrays, class_names=found.class_names, client_names=found.client_names)

    return load


def find_fashion_mnist(config: DataConfig, note: Notify) -> Undecoded:
    """Find Fashion-MNIST: in tensorflow-datasets if prepared there and no folder is named, otherwise the idx files."""
    if ":" not in config.name and tfds.is_prepared("fashion_mnist", note):
        return tfds.open_tfds(config, "fashion_mnist", note)
    return files.open_fashion_mnist(config)


def load_digits(config: DataConfig, notify: Notify = ignore_text, note: Notify | None = None) -> Dataset:
    """scikit-learn's 1,797 handwritten digits (8x8, one channel), resized; 360 of them, stratified, are for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    train, test = train_test_split(np.arange(len(images)), test_size=360, stratify=digits.target, random_state=0)
    images, labels = resize(images, config.image_size), digits.target.astype(np.int32)
    return Dataset(images[train], labels[train], images[test], labels[test])


def load_synthetic(config: DataConfig, notify: Notify = ignore_text, note: Notify | None = None) -> Dataset:
    """Generate RGB images: a smooth pattern per class under a random shift, contrast and noise.

    The same config gives the same images, whatever the run's seed. Patterns differ in shape, not in colour or
    orientation, and stay in the middle of the image, so that the ``digits`` views leave the classes recognisable.
    """
    rng = seeds.fixed_rng(seeds.RngTag.SYNTHETIC)
    n, classes, size = config.synthetic_examples, config.synthetic_classes, config.image_size
    coarse = rng.integers(0, 256, (classes, 5, 5, 1), dtype=np.uint8)
    patterns = resize(coarse, size)[..., 0].astype(np.float32) / 255
    total = n + max(n // 4, classes)
    labels = (np.arange(total) % classes).astype(np.int32)
    images = np.empty((total, size, size, 3), np.uint8)
    shifts = rng.integers(-(size // 16), size // 16 + 1, (total, 2))
    for i, label in enumerate(labels):
        pattern = np.roll(patterns[label], shifts[i], (0, 1))[..., None] * rng.uniform(0.5, 1, 3)
        noisy = pattern * rng.uniform(0.6, 1) + rng.normal(0, 0.08, (size, size, 3))
        images[i] = np.round(np.clip(noisy, 0, 1) * 255)
    return Dataset(images[:n], labels[:n], images[n:], labels[n:])


def resize(images_NxHxWxC: np.ndarray, size: int) -> np.ndarray:
    """uint8 images resized to ``size`` x ``size`` (Pillow, bilinear)."""
    if images_NxHxWxC.shape[1:3] == (size, size):
        return images_NxHxWxC
    return np.stack([cache.fit(image, size, image.shape[-1]) for image in images_NxHxWxC])


MEMORY = "memory"
HELD: dict[str, Source] = {}  # data sets in memory, by data.name (data/memory.py)
SOURCES = {
    "digits": Source(1, "digits", load_digits, ("digits",)),
    "synthetic": Source(3, "digits", load_synthetic, ("synthetic",)),
    "fashion_mnist": Source(1, "fashion", decoded(1, find_fashion_mnist), ("fashion_mnist", "fashion_mnist:PATH")),
    "tfds": Source(
        3,
        "natural",
        decoded(3, lambda config, note: tfds.open_tfds(config, config.name.removeprefix("tfds:"), note)),
        ("tfds:NAME",),
    ),
    "npz": Source(3, "natural", decoded(3, files.open_npz), ("npz:PATH",)),
    "folder": Source(3, "natural", decoded(3, folders.open_folder), ("folder:PATH",)),
}
