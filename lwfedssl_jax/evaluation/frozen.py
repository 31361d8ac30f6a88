"""How good an encoder is: linear probe and kNN on frozen features, without heads."""

import functools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_fscore_support, recall_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lwfedssl_jax.config import ConfigError, EvaluationConfig
from lwfedssl_jax.data.sources import Dataset
from lwfedssl_jax.data.views import Recipe, standardise
from lwfedssl_jax.models.encoder import EVERY_STAGE, Depth, Encoder
from lwfedssl_jax.tree import Tree

BATCH = 256  # images encoded at once
KNN_TEMPERATURE = 0.07  # of Wu et al., 2018 (arXiv 1805.01978)
PROBE_ITERATIONS = 1000

Result = dict[str, Any]


class Encode(Protocol):
    """``(params, images_NxHxWxC, depth) -> features_NxD`` of layers L1..L_depth and the final norm."""

    def __call__(self, params: Tree, images_NxHxWxC: np.ndarray, depth: int, batch: int = BATCH) -> np.ndarray: ...


def check(config: EvaluationConfig, dataset: Dataset) -> None:
    """Refuse protocols the data set cannot serve.

    Raises:
      ConfigError: fine-tuning without labels, where other protocols are left out; one class only; a class with test
        images only; more labels a class, or neighbours, than there are training images with labels.
    """
    labels_N = dataset.train_labels[dataset.labelled]
    if not len(labels_N):
        if config.fine_tune_epochs:
            raise ConfigError(
                f"evaluation.fine_tune_epochs: {config.fine_tune_epochs} needs labels, which no training image has; "
                "accepted: 0"
            )
        return
    classes, sizes = np.unique(labels_N, return_counts=True)
    if len(classes) < 2:
        raise ConfigError("data: the training images are all of one class; accepted: at least two classes")
    if len(unknown := np.setdiff1d(dataset.test_labels, classes)):
        raise ConfigError(
            f"data.name: class {unknown[0]} has test images and no training images; accepted: the same classes in both"
        )
    fewest = int(sizes.min())
    for labels in config.labels_per_class:
        if labels > fewest:
            raise ConfigError(
                f"evaluation.labels_per_class: {labels} is more than the smallest class has; accepted: 0 to {fewest}"
            )
    if config.neighbours > len(labels_N):
        raise ConfigError(
            f"evaluation.neighbours: {config.neighbours} is more than the training images; "
            f"accepted: 0 to {len(labels_N)}"
        )


def make_encode(encoder: Encoder, recipe: Recipe, dtype: DTypeLike) -> Encode:
    """Features of uint8 images, or of floats in [0, 1], ``batch`` images at once; ``dtype`` is that of images."""
    forward_batch = jax.jit(functools.partial(forward, encoder, recipe, dtype))

    def encode(params: Tree, images_NxHxWxC: np.ndarray, depth: int, batch: int = BATCH) -> np.ndarray:
        n = len(images_NxHxWxC)
        frozen, rest = split(encoder, params, depth)
        batches = (images_NxHxWxC[i : i + batch] for i in range(0, n, batch))
        padded = (np.pad(x, [(0, batch - len(x))] + [(0, 0)] * 3) for x in batches)
        parts = [forward_batch(frozen, rest, images, np.int32(depth)) for images in padded]
        return np.concatenate(jax.device_get(parts))[:n].astype(np.float32)

    return encode


def apply(
    encoder: Encoder, recipe: Recipe, dtype: DTypeLike, params: Tree, images_BxHxWxC: jax.Array, depth: int
) -> jax.Array:
    """What ``make_encode`` makes of one batch, for callers that trace it."""
    return forward(encoder, recipe, dtype, *split(encoder, params, depth), images_BxHxWxC, depth)


def split(encoder: Encoder, params: Tree, depth: int) -> tuple[Tree, Tree]:
    """Layers L1..L_depth, frozen as in the stage after, and what every stage has; no layers of one stage only."""
    layers = encoder.layers(params)
    params = {name: params[name] for name in layers}
    frozen = jax.tree.map(lambda n, x: x if np.any((n > 0) & (n <= depth)) else None, layers, params)
    return frozen, jax.tree.map(lambda n, x: x if np.all(n == EVERY_STAGE) else None, layers, params)


def forward(
    encoder: Encoder,
    recipe: Recipe,
    dtype: DTypeLike,
    frozen: Tree,
    rest: Tree,
    images_BxHxWxC: jax.Array,
    depth: Depth,
) -> jax.Array:
    """``features_BxD`` of the parts that ``split`` gives."""
    images = standardise(images_BxHxWxC, recipe).astype(dtype)
    x = encoder.frozen_forward(frozen, images, depth, None)
    return encoder.trainable_forward(rest, x, jnp.ones(len(images), bool), 0, None)[0]


def evaluate(
    config: EvaluationConfig, dataset: Dataset, train_NxD: np.ndarray, test_NxD: np.ndarray
) -> dict[str, Result]:
    """``{protocol: {**scores, settings}}`` of frozen features.

    Protocols: ``linear_probe_K`` (K labelled images a class, mean and standard deviation over
    draws that are the same for every run), ``linear_probe_all``, ``knn``. Training images without a label are left out.
    """
    train_NxD = train_NxD[dataset.labelled]
    dataset = dataset._replace(train_labels=dataset.train_labels[dataset.labelled])
    results = {}
    for labels in config.labels_per_class:
        results[f"linear_probe_{labels or 'all'}"] = linear_probe(dataset, train_NxD, test_NxD, labels, config.draws)
    if config.neighbours:
        results["knn"] = knn(dataset, train_NxD, test_NxD, config.neighbours)
    return results


def scores(true_N: np.ndarray, predicted_N: np.ndarray) -> dict[str, float]:
    """Accuracy, and means over classes of accuracy, precision, recall and F1, all in [0, 1].

    As usual, the latter three count a class that is only ever predicted, the mean accuracy does not.
    """
    shared = {"average": "macro", "zero_division": 0}
    precision, recall, f1, _ = precision_recall_fscore_support(true_N, predicted_N, **shared)
    return {
        "accuracy": float(np.mean(true_N == predicted_N)),
        "mean_per_class_accuracy": float(recall_score(true_N, predicted_N, labels=np.unique(true_N), **shared)),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
    }


def linear_probe(
    dataset: Dataset, train_NxD: np.ndarray, test_NxD: np.ndarray, labels_per_class: int, draws: int
) -> Result:
    """Multinomial logistic regression (L2, C = 1) on standardised features; 0 labels a class means all."""
    drawn = []
    for draw in range(draws if labels_per_class else 1):
        chosen = _draw(dataset.train_labels, labels_per_class, draw)
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=PROBE_ITERATIONS))
        probe.fit(train_NxD[chosen], dataset.train_labels[chosen])
        drawn.append(scores(dataset.test_labels, probe.predict(test_NxD)))
    return {
        **{name: float(np.mean([of_draw[name] for of_draw in drawn])) for name in drawn[0]},
        "std": float(np.std([of_draw["accuracy"] for of_draw in drawn])),
        "labels_per_class": labels_per_class or "all",
        "draws": len(drawn),
        "classifier": "logistic regression (L2, C = 1) on standardised features",
        "max_iterations": PROBE_ITERATIONS,
    }


def knn(dataset: Dataset, train_NxD: np.ndarray, test_NxD: np.ndarray, neighbours: int) -> Result:
    """Weighted kNN on cosine similarity s, votes ``exp(s / 0.07)`` (Wu et al., 2018, arXiv 1805.01978)."""
    classifier = KNeighborsClassifier(
        neighbours, metric="cosine", weights=lambda distance: np.exp(-distance / KNN_TEMPERATURE)
    )
    classifier.fit(train_NxD, dataset.train_labels)
    return {
        **scores(dataset.test_labels, classifier.predict(test_NxD)),
        "neighbours": neighbours,
        "classifier": f"votes exp(cosine / {KNN_TEMPERATURE})",
    }


def _draw(labels_N: np.ndarray, per_class: int, draw: int) -> np.ndarray:
    if not per_class:
        return np.arange(len(labels_N))
    rng = np.random.default_rng(draw)
    return np.concatenate(
        [rng.choice(np.flatnonzero(labels_N == c), per_class, replace=False) for c in np.unique(labels_N)]
    )
