"""Membership inference: whether an encoder's features tell the clients' images from others.

The attack on self-supervised encoders of Liu et al., 2021 (EncoderMI, arXiv 2108.11023): views of an image that the
encoder was trained on are more similar to each other. Its score needs nothing but the encoder.
"""

from collections.abc import Callable
from typing import TypedDict

import numpy as np

from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.data.partition import Population
from lwfedssl_jax.data.sources import Dataset
from lwfedssl_jax.data.views import Recipe
from lwfedssl_jax.evaluation import label_free
from lwfedssl_jax.system import seeds

PAIRS = 4  # of views per image
FALSE_POSITIVES = 0.01


class Membership(TypedDict):
    """How well clients' images are told from test images; chance is an ``auc`` of 0.5 and a rate of 0.01.

    Attributes:
      images: of each kind.
      auc: area under the ROC curve: how often an image of a client has a higher score than a test image.
      auc_error: its standard error (Hanley and McNeil, 1982).
      tpr_at_1_percent_fpr: share of the clients' images that are found where 1 % of the test images are mistaken for
        such.
    """

    images: int
    auc: float
    auc_error: float
    tpr_at_1_percent_fpr: float


def check_membership(config: Config, dataset: Dataset) -> None:
    """Refuse membership inference where no image is surely none of a client's.

    Raises:
      ConfigError: there are no test images.
    """
    count = config.evaluation.membership
    if count and not len(dataset.test_images):
        raise ConfigError(
            f"evaluation.membership: {count} images are compared with test images, and there are none; accepted: 0"
        )


def members_and_others(config: Config, dataset: Dataset, clients: Population) -> tuple[np.ndarray, np.ndarray]:
    """Draw as many images of clients as of the test set, both NxHxWxC uint8; at most ``evaluation.membership``."""
    rng = seeds.rng(config.runtime.seed, seeds.RngTag.MEMBERSHIP)
    owned = np.concatenate([clients[i] for i in range(len(clients))])
    count = min(config.evaluation.membership, len(owned), len(dataset.test_images))
    members = np.sort(rng.choice(owned, count, replace=False))
    others = np.sort(rng.choice(len(dataset.test_images), count, replace=False))
    return np.asarray(dataset.train_images[members]), np.asarray(dataset.test_images[others])


def membership(
    features: Callable[[np.ndarray], np.ndarray], members: np.ndarray, others: np.ndarray, recipe: Recipe, seed: int
) -> Membership:
    """Attack an encoder.

    Args:
      features: of uint8 images, NxD.
      members, others: uint8 images, as many of each.
      recipe: of the views, which are those of training.
      seed: of the views.
    """
    scores = [view_similarity(features, images, recipe, seed) for images in (members, others)]
    return compare(*scores)


def view_similarity(
    features: Callable[[np.ndarray], np.ndarray], images: np.ndarray, recipe: Recipe, seed: int
) -> np.ndarray:
    """Return the mean cosine similarity of all pairs of an image's ``2 * PAIRS`` views, N numbers."""
    found = []
    for pair in range(PAIRS):
        own = int(seeds.hashes(seed, seeds.RngTag.MEMBERSHIP, pair) % np.uint64(2**32))
        found += [
            label_free.unit(features(view).astype(np.float64)) for view in label_free.views_of(images, recipe, own)
        ]
    count = len(found)
    similarity: np.ndarray = ((np.sum(found, axis=0) ** 2).sum(1) - count) / (count * (count - 1))
    return similarity


def compare(members: np.ndarray, others: np.ndarray) -> Membership:
    """Compare the scores of members and of as many others."""
    from sklearn.metrics import roc_auc_score

    n = len(members)
    auc = float(roc_auc_score(np.repeat([1, 0], n), np.concatenate([members, others])))
    one, two = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (auc * (1 - auc) + (n - 1) * (one - auc**2 + two - auc**2)) / n**2
    threshold = np.quantile(others, 1 - FALSE_POSITIVES, method="higher")
    return {
        "images": n,
        "auc": auc,
        "auc_error": float(np.sqrt(max(variance, 0))),
        "tpr_at_1_percent_fpr": float((members > threshold).mean()),
    }
