"""Evaluation of an encoder by a linear probe and kNN on its frozen features, without heads."""

import functools
from collections.abc import Sequence
from typing import Literal, NotRequired, Protocol, TypedDict, cast, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_fscore_support, recall_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from lwfedssl_jax.config import ConfigError, EvaluationConfig
from lwfedssl_jax.data.sources import Dataset
from lwfedssl_jax.data.views import Recipe, standardise
from lwfedssl_jax.models.encoder import EVERY_STAGE, Depth, Encoder
from lwfedssl_jax.system import seeds
from lwfedssl_jax.tree import Tree

BATCH = 256  # images encoded at once
KNN_TEMPERATURE = 0.07  # of Wu et al., 2018 (arXiv 1805.01978)
PROBE_ITERATIONS = 1000


class Scores(TypedDict):
    """Accuracy, and means over classes of accuracy, precision, recall and F1, all in [0, 1]."""

    accuracy: float
    mean_per_class_accuracy: float
    precision: float
    recall: float
    f1: float


class ProbeResult(Scores):
    """Means over draws of a linear probe's scores, the standard deviation of its accuracy, and its settings."""

    std: float
    labels_per_class: int | Literal["all"]
    draws: int
    classifier: str
    max_iterations: int


class KnnResult(Scores):
    """The scores of kNN and its settings."""

    neighbours: int
    classifier: str


@final
class EvaluationLine(Scores):
    """An evaluation's line of ``metrics.jsonl``, which also has the other fields of the protocol's result.

    Attributes:
      round: after which the encoder was evaluated; 0 is the untrained encoder.
      depth: number of layers, L1..L_depth, whose features were evaluated.
      protocol: ``linear_probe_K``, ``linear_probe_all``, ``knn`` or ``fine_tune``; on ``evaluation.data``,
        with ``@NAME`` after it.
      baseline: ``scratch`` for fine-tuning of the untrained encoder, ``noise_only`` for an encoder with all the noise
        of a private run and no client's training.
    """

    event: Literal["evaluation"]
    round: int
    depth: int
    protocol: str
    baseline: NotRequired[str]


class Encode(Protocol):
    """``(params, images_NxHxWxC, depth) -> features_NxD``, computed by layers L1..L_depth and the final norm."""

    def __call__(self, params: Tree, images_NxHxWxC: np.ndarray, depth: int, batch: int = BATCH) -> np.ndarray: ...


def check_protocols(config: EvaluationConfig, dataset: Dataset) -> None:
    """Check that the data set allows the protocols; without labels, linear probe and kNN are left out.

    Raises:
      ConfigError: fine-tuning without labels; training images of only one class; a class that only test images have;
        more labels per class, or more neighbours, than there are labelled training images.
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
        raise ConfigError("data: all training images are of one class; accepted: at least two classes")
    if len(unknown := np.setdiff1d(dataset.test_labels, classes)):
        raise ConfigError(
            f"data.name: class {unknown[0]} has test images but no training images; accepted: the same classes in both"
        )
    fewest = int(sizes.min())
    asked = [("labels_per_class", labels) for labels in config.labels_per_class]
    asked += [("fine_tune_labels_per_class", n) for n in config.fine_tune_labels_per_class if config.fine_tune_epochs]
    for field, labels in asked:
        if labels > fewest:
            raise ConfigError(
                f"evaluation.{field}: {labels} is more than the smallest class has; accepted: 0 to {fewest}"
            )
    if config.neighbours > len(labels_N):
        raise ConfigError(
            f"evaluation.neighbours: {config.neighbours} is more than the number of training images; "
            f"accepted: 0 to {len(labels_N)}"
        )


def make_encode(encoder: Encoder, recipe: Recipe, dtype: DTypeLike) -> Encode:
    """Make the function that computes features of images, ``batch`` of them at once.

    Args:
      encoder: to compute features with.
      recipe: how images are standardised.
      dtype: of the images that enter the encoder. They are given as uint8, or as floats in [0, 1].
    """
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
    """Compute ``features_BxD`` of one batch as ``make_encode`` does, for callers that trace it."""
    return forward(encoder, recipe, dtype, *split(encoder, params, depth), images_BxHxWxC, depth)


def split(encoder: Encoder, params: Tree, depth: int) -> tuple[Tree, Tree]:
    """Split an encoder's parameters into layers L1..L_depth, frozen as in the next stage, and those of every stage.

    Layers that exist in one stage only are dropped.
    """
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
    """Compute ``features_BxD`` from the two parts that ``split`` returns."""
    images = standardise(images_BxHxWxC, recipe).astype(dtype)
    with jax.default_matmul_precision(encoder.products):
        x = encoder.frozen_forward(frozen, images, depth, None)
        return encoder.trainable_forward(rest, x, jnp.ones(len(images), bool), 0, None)[0]


def evaluate(
    config: EvaluationConfig, dataset: Dataset, train_NxD: np.ndarray, test_NxD: np.ndarray
) -> dict[str, ProbeResult | KnnResult]:
    """Evaluate frozen features by the protocols of the config.

    Args:
      config: of the evaluation.
      dataset: of the images.
      train_NxD: features of its training images, of which those of ``used_images`` are used.
      test_NxD: features of its test images.

    Returns:
      ``{protocol: {**scores, settings}}``. The protocols are ``linear_probe_K`` (K labelled images per class; mean and
      standard deviation over draws that are the same for every run), ``linear_probe_all`` and ``knn``. Training images
      without a label are left out.
    """
    train_NxD = train_NxD[dataset.labelled]
    dataset = dataset._replace(train_labels=dataset.train_labels[dataset.labelled])
    results: dict[str, ProbeResult | KnnResult] = {}
    # With a thread per core, BLAS threads of these small products wait for each other: 5 CPU seconds in place of 0.03.
    with threadpool_limits(1):
        for labels in config.labels_per_class:
            name = f"linear_probe_{labels or 'all'}"
            results[name] = linear_probe(dataset, train_NxD, test_NxD, labels, config.draws)
        if config.neighbours:
            results["knn"] = knn(dataset, train_NxD, test_NxD, config.neighbours)
    return results


def used_images(config: EvaluationConfig, dataset: Dataset) -> np.ndarray:
    """Return the training images whose features the protocols use, as sorted indices: all labelled ones, or draws."""
    if config.neighbours or 0 in config.labels_per_class:
        return dataset.labelled
    labels = dataset.train_labels[dataset.labelled]
    drawn = [draw_labelled(labels, n, draw) for n in config.labels_per_class for draw in range(config.draws)]
    return dataset.labelled[np.unique(np.concatenate(drawn))] if drawn else dataset.labelled[:0]


def scores(true_N: np.ndarray, predicted_N: np.ndarray) -> Scores:
    """Return the scores of predicted against true classes.

    As usual, the latter three include a class that is only predicted; the mean accuracy does not.
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


def mean_scores(draws: Sequence[Scores]) -> Scores:
    """Return each score's mean over draws."""
    values = [cast(dict[str, float], draw) for draw in draws]
    return cast(Scores, {name: float(np.mean([draw[name] for draw in values])) for name in values[0]})


def linear_probe(
    dataset: Dataset, train_NxD: np.ndarray, test_NxD: np.ndarray, labels_per_class: int, draws: int
) -> ProbeResult:
    """Evaluate standardised features by logistic regression (multinomial, L2, C = 1); 0 labels per class means all."""
    drawn = []
    for draw in range(draws if labels_per_class else 1):
        chosen = draw_labelled(dataset.train_labels, labels_per_class, draw)
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=PROBE_ITERATIONS))
        probe.fit(train_NxD[chosen], dataset.train_labels[chosen])
        drawn.append(scores(dataset.test_labels, probe.predict(test_NxD)))
    return {
        **mean_scores(drawn),
        "std": float(np.std([draw_scores["accuracy"] for draw_scores in drawn])),
        "labels_per_class": labels_per_class or "all",
        "draws": len(drawn),
        "classifier": "logistic regression (L2, C = 1) on standardised features",
        "max_iterations": PROBE_ITERATIONS,
    }


def knn(dataset: Dataset, train_NxD: np.ndarray, test_NxD: np.ndarray, neighbours: int) -> KnnResult:
    """Evaluate features by kNN on cosine similarity s, with votes ``exp(s / 0.07)`` (Wu et al., arXiv 1805.01978)."""
    classifier = KNeighborsClassifier(
        neighbours, metric="cosine", weights=lambda distance: np.exp(-distance / KNN_TEMPERATURE)
    )
    classifier.fit(train_NxD, dataset.train_labels)
    return {
        **scores(dataset.test_labels, classifier.predict(test_NxD)),
        "neighbours": neighbours,
        "classifier": f"votes exp(cosine / {KNN_TEMPERATURE})",
    }


def draw_labelled(labels_N: np.ndarray, per_class: int, draw: int) -> np.ndarray:
    """Indices of a random draw of ``per_class`` images of each class; of all images for 0."""
    if not per_class:
        return np.arange(len(labels_N))
    rng = seeds.fixed_rng(seeds.RngTag.LABELLED, draw)
    return np.concatenate(
        [rng.choice(np.flatnonzero(labels_N == c), per_class, replace=False) for c in np.unique(labels_N)]
    )
