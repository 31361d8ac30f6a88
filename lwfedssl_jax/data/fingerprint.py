"""The fingerprint of a data set: two runs with the same one have seen the same images, labels and clients."""

import hashlib
from collections.abc import Iterable

import numpy as np

from lwfedssl_jax.data.sources import Dataset

AT_ONCE = 2**26  # bytes that are read from a mapped file at a time
DIGITS = 16  # hexadecimal
PARTS = ("images", "labels", "clients")


def fingerprint(dataset: Dataset) -> dict[str, str]:
    """Hash (SHA-256) a data set's images, labels and own clients, each with its shape: training, testing, validation.

    A data set without clients of its own has no entry ``clients``.
    """
    parts: dict[str, tuple[np.ndarray, ...]] = {
        "images": (dataset.train_images, dataset.test_images),
        "labels": (dataset.train_labels, dataset.test_labels),
    }
    if dataset.val_images is not None and dataset.val_labels is not None:
        parts = {"images": (*parts["images"], dataset.val_images), "labels": (*parts["labels"], dataset.val_labels)}
    if dataset.train_clients is not None:
        parts["clients"] = (dataset.train_clients,)
    return {name: _digest(arrays) for name, arrays in parts.items()}


def _digest(arrays: Iterable[np.ndarray]) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(f"{array.dtype.str} {array.shape}".encode())
        step = max(1, AT_ONCE // max(1, array[:1].nbytes))
        for first in range(0, len(array), step):
            found.update(np.ascontiguousarray(array[first : first + step]).tobytes())
    return found.hexdigest()[:DIGITS]
