"""Data sets as uint8 arrays with a fixed train/test split."""

import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from lwfedssl_jax.config import ConfigError, DataConfig

# Where Debian's package dataset-fashion-mnist puts its files.
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class Dataset(NamedTuple):
    """Images NxHxWxC uint8 and labels N int32 for training (labels only judge) and testing."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def classes(self) -> int:
        """Number of classes: one more than the largest label."""
        return int(max(self.train_labels.max(), self.test_labels.max())) + 1


class Source(NamedTuple):
    """A kind of data set: what is known before it is read, and how to read it.

    Attributes:
      channels: image channels.
      views: name of the augmentation recipe that suits it.
      load: ``DataConfig -> Dataset``; raises ``ConfigError`` where it is not installed.
    """

    channels: int
    views: str
    load: Callable[[DataConfig], Dataset]


def find(config: DataConfig) -> Source:
    """The source that ``data.name`` names.

    Raises:
      ConfigError: no such source.
    """
    kind, colon, rest = config.name.partition(":")
    if kind not in SOURCES or bool(colon) != (kind == "tfds") or bool(colon) != bool(rest):
        raise ConfigError(f"data.name: unknown {config.name!r}; accepted: digits, synthetic, fashion_mnist, tfds:NAME")
    return SOURCES[kind]


def load_digits(config: DataConfig) -> Dataset:
    """scikit-learn's 1,797 handwritten digits (8x8, one channel), resized; 360 of them, stratified, for testing."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    train, test = train_test_split(np.arange(len(images)), test_size=360, stratify=digits.target, random_state=0)
    images, labels = resize(images, config.image_size), digits.target.astype(np.int32)
    return Dataset(images[train], labels[train], images[test], labels[test])


def load_synthetic(config: DataConfig) -> Dataset:
    """Generated RGB images: a smooth pattern for each class under a random shift, contrast and noise.

    The same config gives the same images, whatever the run's seed. Patterns differ in shape,
    not in colour or orientation, and keep to the image's middle, so that the ``digits``
    views leave the classes recognisable.
    """
    rng = np.random.default_rng(0)
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


def load_fashion_mnist(config: DataConfig) -> Dataset:
    """Zalando's 70,000 garments (28x28, one channel; arXiv 1708.07747), 10,000 of them for testing, resized."""

    def arrays(split: str) -> tuple[np.ndarray, np.ndarray]:
        paths = [FASHION_MNIST / f"{split}-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
        images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1)
        if images.shape != (len(labels), 28, 28) or not len(labels):
            raise _damaged(paths[0], f"its shape is {images.shape} where there are {len(labels)} labels of 28x28")
        if labels.max() > 9:
            raise _damaged(paths[1], f"it has a label {labels.max()}")
        return resize(images[..., None], config.image_size), labels.astype(np.int32)

    try:
        return Dataset(*arrays("train"), *arrays("t10k"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"data.name: 'fashion_mnist' is not installed (no {error.filename}); accepted: Debian's package "
            f"dataset-fashion-mnist (apt-get install dataset-fashion-mnist), or tfds:fashion_mnist prepared by "
            f"`tfds build fashion_mnist --file_format=array_record`"
        ) from error


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of a gzipped idx file: two zeros, type 8, number of dimensions, big-endian sizes, bytes.

    Raises:
      ConfigError: the file is damaged.
      FileNotFoundError: there is none.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes([0, 0, 8, dimensions]):
        raise _damaged(path, f"it does not begin like an idx{dimensions} file of bytes")
    shape = np.frombuffer(content, ">u4", dimensions, offset=4).tolist()
    if len(content) != start + math.prod(shape):
        raise _damaged(path, f"it has {len(content) - start} bytes for the shape {tuple(shape)}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"data.name: 'fashion_mnist' cannot be read, {path} is damaged ({why}); "
        f"accepted: the file of Debian's package dataset-fashion-mnist"
    )


def load_tfds(config: DataConfig) -> Dataset:
    """A data set that tensorflow-datasets has prepared on this machine, as array_record (needs no TensorFlow).

    It must have splits ``train`` and ``test``, features ``image`` and ``label``; gray images become RGB.
    """
    import tensorflow_datasets as tfds

    name = config.name.removeprefix("tfds:")
    try:
        train, test = tfds.data_source(name, split=["train", "test"], download=False)
    except Exception as error:  # tfds raises many kinds; to the user all mean "not readable here"
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(
            f"data.name: {config.name!r} is not installed ({type(error).__name__}: {reason}); accepted: a data set "
            f"prepared by `tfds build {name} --file_format=array_record`, or digits, synthetic, "
            "fashion_mnist"
        ) from error

    if missing := {"image", "label"} - set(train.dataset_info.features):
        raise ConfigError(f"data.name: {config.name!r} has no feature {missing.pop()!r}; accepted: image and label")

    def arrays(split: "tfds.core.data_sources.BaseDataSource") -> tuple[np.ndarray, np.ndarray]:
        images = [resize(_rgb(np.asarray(row["image"]))[None], config.image_size)[0] for row in split]
        return np.stack(images), np.array([row["label"] for row in split], np.int32)

    return Dataset(*arrays(train), *arrays(test))


def resize(images_NxHxWxC: np.ndarray, size: int) -> np.ndarray:
    """uint8 images resized to ``size`` x ``size`` (Pillow, bilinear)."""
    if images_NxHxWxC.shape[1:3] == (size, size):
        return images_NxHxWxC
    gray = images_NxHxWxC.shape[-1] == 1
    out = [
        np.asarray(Image.fromarray(x[..., 0] if gray else x).resize((size, size), Image.Resampling.BILINEAR))
        for x in images_NxHxWxC
    ]
    return np.stack(out)[..., None] if gray else np.stack(out)


def _rgb(image: np.ndarray) -> np.ndarray:
    return np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image


SOURCES = {
    "digits": Source(1, "digits", load_digits),
    "synthetic": Source(3, "digits", load_synthetic),
    "fashion_mnist": Source(1, "fashion", load_fashion_mnist),
    "tfds": Source(3, "natural", load_tfds),
}
