"""What an encoder's features say without labels: how many directions they use, and how they place an image's views."""

import functools
from typing import Literal, TypedDict, final

import jax
import numpy as np

from lwfedssl_jax.data.sources import Dataset
from lwfedssl_jax.data.views import Recipe, two_views
from lwfedssl_jax.system import seeds

MOST_IMAGES, MOST_BYTES = 2048, 2**26  # that are looked at; the bytes are those of all views
BATCH = 256  # images whose views are made at once
COLLAPSED = 2.0  # an effective rank below it: features differ in hardly more than their length
RANK_EPSILON = 1e-7  # of RankMe


class LabelFree(TypedDict):
    """Metrics of N features of D numbers, and of those of two random views of each image.

    Attributes:
      effective_rank: 1 to min(N, D), exponential of the entropy of the singular values (RankMe, arXiv 2210.02885).
      alignment: 0 to 4, mean squared distance of the two views' normalised features (Wang and Isola, arXiv 2005.10242).
      uniformity: -4 to 0, log of the mean of exp(-2 d^2) over all pairs of images, with d the distance of their
        normalised features (arXiv 2005.10242); the lower, the more evenly the features cover the sphere.
      feature_std: 0 to about 1, mean over dimensions of the standard deviation of normalised features, times sqrt(D);
        0 if all features are equal (SimSiam, arXiv 2011.10566).
    """

    effective_rank: float
    alignment: float
    uniformity: float
    feature_std: float


@final
class LabelFreeLine(LabelFree):
    """A line of ``metrics.jsonl`` with the metrics of the encoder after ``round``; 0 is the untrained encoder."""

    event: Literal["evaluation"]
    round: int
    depth: int
    protocol: Literal["label_free"]


def images_with_views(dataset: Dataset, recipe: Recipe, seed: int) -> np.ndarray:
    """Return test images (without any, training images) and two random views of each.

    Args:
      dataset: of many images, some are taken at equal distances.
      recipe: of the views, which are those of training.
      seed: of the run; the views are the same in every evaluation.

    Returns:
      ``3xNxHxWxC``, uint8.
    """
    images = dataset.test_images if len(dataset.test_images) else dataset.train_images
    count = max(2, min(len(images), MOST_IMAGES, MOST_BYTES // (2 * images[0].nbytes)))
    chosen = np.asarray(images[np.linspace(0, len(images) - 1, count).astype(int)])
    return np.concatenate([chosen[None], views_of(chosen, recipe, seed)])


def views_of(images_NxHxWxC: np.ndarray, recipe: Recipe, seed: int) -> np.ndarray:
    """Return two random views of each uint8 image, ``2xNxHxWxC`` uint8; the same each time."""
    views = []
    for first in range(0, len(images_NxHxWxC), BATCH):
        batch = images_NxHxWxC[first : first + BATCH]
        padded = np.pad(batch, [(0, BATCH - len(batch)), *[(0, 0)] * 3])
        made = jax.device_get(_two_views(seeds.key(seed, seeds.KeyTag.EVALUATION, first), padded, recipe))[
            :, : len(batch)
        ]
        views.append(np.round(255 * (made * recipe.std + recipe.mean)).clip(0, 255).astype(np.uint8))
    return np.concatenate(views, 1)


@functools.partial(jax.jit, static_argnums=2)
def _two_views(key: jax.Array, images_BxHxWxC: jax.Array, recipe: Recipe) -> jax.Array:
    return two_views(key, images_BxHxWxC, recipe)


def label_free(features_3xNxD: np.ndarray) -> LabelFree:
    """Compute the metrics of the features of images and of their two views (``images_with_views``)."""
    x_NxD, first_NxD, second_NxD = features_3xNxD.astype(np.float64)
    return {
        "effective_rank": effective_rank(x_NxD),
        "alignment": float(((unit(first_NxD) - unit(second_NxD)) ** 2).sum(1).mean()),
        "uniformity": uniformity(unit(x_NxD)),
        "feature_std": float(unit(x_NxD).std(0).mean() * np.sqrt(x_NxD.shape[1])),
    }


def effective_rank(x_NxD: np.ndarray) -> float:
    """Compute RankMe."""
    values = np.linalg.svd(x_NxD, compute_uv=False)
    shares = values / max(values.sum(), np.finfo(float).tiny) + RANK_EPSILON
    return float(np.exp(-(shares * np.log(shares)).sum()))


def uniformity(unit_NxD: np.ndarray) -> float:
    """Compute the uniformity of normalised features, of each pair of different images once."""
    above = np.triu_indices(len(unit_NxD), 1)
    squared = np.maximum(2 - 2 * (unit_NxD @ unit_NxD.T)[above], 0)
    return float(np.log(np.exp(-2 * squared).mean()))


def unit(x_NxD: np.ndarray) -> np.ndarray:
    """Scale features to length 1; features of length 0 stay."""
    return x_NxD / np.maximum(np.linalg.norm(x_NxD, axis=1, keepdims=True), np.finfo(float).tiny)
