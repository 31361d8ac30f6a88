"""Evaluation of an encoder by fine-tuning: encoder and linear head are trained with labels (arXiv 2401.11647)."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from lwfedssl_jax.config import EvaluationConfig
from lwfedssl_jax.data.rand_augment import LARGEST_MAGNITUDE, MAGNITUDE, OPERATIONS_DRAWN, rand_augment
from lwfedssl_jax.data.sources import Dataset
from lwfedssl_jax.data.views import Recipe
from lwfedssl_jax.evaluation.frozen import Encode, Scores, draw_labelled, mean_scores, scores
from lwfedssl_jax.method import stages
from lwfedssl_jax.method.task import Task
from lwfedssl_jax.models.encoder import Encoder, with_its_products
from lwfedssl_jax.system import seeds
from lwfedssl_jax.tree import Tree

HEAD_STD = 0.01  # of the head's first weights


class FineTuneResult(Scores):
    """Means over draws of the scores of fine-tuning, the standard deviation of its accuracy, and its settings."""

    std: float
    labels_per_class: int | Literal["all"]
    draws: int
    epochs: int
    warmup_epochs: int
    learning_rate: float
    weight_decay: float
    batch_size: int
    views: str


class FineTuneSetup(NamedTuple):
    """Everything that is fixed when a step is compiled. It is hashable, and equal setups share a program."""

    encoder: Encoder
    recipe: Recipe
    dtype: DTypeLike
    config: EvaluationConfig
    steps_per_epoch: int


class FineTuneState(NamedTuple):
    """Everything that a step changes; ``weights`` has those of the encoder and of the head."""

    weights: Tree
    statistics: Tree
    opt_state: optax.OptState


class FineTuneJob(NamedTuple):
    """What is fine-tuned, and how.

    Attributes:
      task: static.
      config: epochs, learning rate and the like.
      dataset: to train and to test on.
      params: from which the encoder starts.
      depth: number of layers that exist.
      seed: of the head, the batches and the views.
      labels_per_class: labelled images of each class, in ``config.draws`` draws; 0 for all of them, once.
    """

    task: Task
    config: EvaluationConfig
    dataset: Dataset
    params: Tree
    depth: int
    seed: int
    labels_per_class: int = 0


def fine_tune(job: FineTuneJob, encode: Encode, notify: Callable[[str], None] = lambda _: None) -> FineTuneResult:
    """Train layers L1..L_depth and a linear head on labelled images, and evaluate them on the test images.

    Args:
      job: what is fine-tuned.
      encode: from ``frozen.make_encode``, for the test images.
      notify: called with a line about each epoch.

    Returns:
      ``{**scores, settings}``.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    config, dataset, labels = job.config, job.dataset, job.labels_per_class
    drawn = []
    for draw in range(config.draws if labels else 1):
        state = train_state(job, notify, draw)
        head = jax.device_get(state.weights["head"])
        trained = {"encoder": state.weights["encoder"], "statistics": state.statistics}
        logits_NxC = encode(trained, dataset.test_images, job.depth) @ head["kernel"] + head["bias"]
        drawn.append(scores(dataset.test_labels, logits_NxC.argmax(-1)))
    return {
        **mean_scores(drawn),
        "std": float(np.std([found["accuracy"] for found in drawn])),
        "labels_per_class": labels or "all",
        "draws": len(drawn),
        "epochs": config.fine_tune_epochs,
        "warmup_epochs": config.fine_tune_warmup_epochs,
        "learning_rate": config.fine_tune_learning_rate,
        "weight_decay": config.fine_tune_weight_decay,
        "batch_size": config.fine_tune_batch_size,
        "views": f"RandAugment({OPERATIONS_DRAWN} operations, magnitude {MAGNITUDE} of {LARGEST_MAGNITUDE})",
    }


def train_state(job: FineTuneJob, notify: Callable[[str], None], draw: int = 0) -> FineTuneState:
    """Compute the state after all epochs, each with one RandAugment view of every image of a draw (``fine_tune``)."""
    task, config, dataset, params, depth, seed, labels = job
    labelled = dataset.labelled
    labelled = labelled[draw_labelled(dataset.train_labels[labelled], labels, draw)]
    prefix = f"{labels} labels per class, draw {draw + 1} of {config.draws}, " if labels else ""
    n = len(labelled)
    batch_size = min(config.fine_tune_batch_size, n)
    fixed = FineTuneSetup(task.encoder, task.recipe, np.dtype(task.dtype), config, -(-n // batch_size))
    key = seeds.key(seed, seeds.KeyTag.FINE_TUNE)
    start = _existing(task.encoder, params, depth)
    image, mask_1 = jnp.zeros((1, *task.image_shape), task.dtype), jnp.ones(1, bool)
    # With fewer layers, the features need not have the width of the whole encoder's.
    width = jax.eval_shape(lambda p: task.encoder.trainable_forward(p, image, mask_1, depth, None)[0], start).shape[-1]
    state = _start(fixed, start, key, (width, dataset.classes))
    for epoch in range(config.fine_tune_epochs):
        notify(f"fine-tuning, {prefix}epoch {epoch + 1} of {config.fine_tune_epochs}")
        order = seeds.rng(seed, seeds.RngTag.FINE_TUNE, epoch).permutation(n)
        losses = []
        for step, first in enumerate(range(0, n, batch_size)):
            batch = order[first : first + batch_size]
            mask_B = np.arange(batch_size) < len(batch)
            batch = labelled[np.resize(batch, batch_size)]  # the last one is filled with repetitions
            images_BxHxWxC, labels_B = dataset.train_images[batch], dataset.train_labels[batch]
            at = np.array([epoch + 1, step, depth], np.int32)  # from 1: 0 is the head's
            state, loss = _step(fixed, state, images_BxHxWxC, labels_B, mask_B, key, at)
            losses.append(loss)
        if not np.isfinite(jax.device_get(losses)).all():
            raise FloatingPointError(
                f"fine-tuning: the loss is not finite in epoch {epoch + 1}; "
                f"lower evaluation.fine_tune_learning_rate ({config.fine_tune_learning_rate})"
            )
    return state


def schedule(config: EvaluationConfig, steps_per_epoch: int) -> optax.Schedule:
    """Learning rate of each step: it rises linearly from 0, then falls as a cosine to 0 after the last step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.fine_tune_learning_rate,
        warmup_steps=config.fine_tune_warmup_epochs * steps_per_epoch,
        decay_steps=config.fine_tune_epochs * steps_per_epoch,
    )


def _optimizer(fixed: FineTuneSetup) -> optax.GradientTransformation:
    return optax.adamw(schedule(fixed.config, fixed.steps_per_epoch), weight_decay=fixed.config.fine_tune_weight_decay)


def _existing(encoder: Encoder, params: Tree, depth: int) -> Tree:
    """Parameters of layers L1..L_depth. Stacked leaves keep all rows, since those of later layers are not run."""
    layers = encoder.layers(params)
    _, trainable = stages.freeze(layers, 0, depth)

    def keep(mask: np.ndarray, n: np.ndarray, x: jax.Array) -> jax.Array | None:
        # As in ``frozen.split``, layers that exist in one stage only (n < 0) are dropped.
        return x if np.any(mask & (n >= 0)) else None

    return jax.tree.map(keep, trainable, layers, {name: params[name] for name in layers})


@functools.partial(jax.jit, static_argnums=(0, 3))
def _start(fixed: FineTuneSetup, params: Tree, key: jax.Array, head_shape: tuple[int, int]) -> FineTuneState:
    head = {
        "kernel": HEAD_STD * jax.random.normal(jax.random.fold_in(key, 0), head_shape, fixed.dtype),
        "bias": jnp.zeros(head_shape[1], fixed.dtype),
    }
    weights = {"encoder": params["encoder"], "head": head}
    return FineTuneState(weights, params["statistics"], _optimizer(fixed).init(weights))


@functools.partial(jax.jit, static_argnums=0)
@with_its_products
def _step(
    fixed: FineTuneSetup,
    state: FineTuneState,
    images_BxHxWxC: jax.Array,
    labels_B: jax.Array,
    mask_B: jax.Array,
    key: jax.Array,
    at: jax.Array,
) -> tuple[FineTuneState, jax.Array]:
    """Take one optimizer step; ``at`` has the epoch, the step in it, and the number of layers that exist."""
    epoch, step, depth = at
    key = jax.random.fold_in(jax.random.fold_in(key, epoch), step)
    views = rand_augment(key, images_BxHxWxC, fixed.recipe, fixed.dtype)

    def loss(weights: Tree) -> tuple[jax.Array, Any]:
        part = {"encoder": weights["encoder"], "statistics": state.statistics}
        features_BxD, statistics = fixed.encoder.trainable_forward(part, views, mask_B, depth, None)
        logits = features_BxD @ weights["head"]["kernel"] + weights["head"]["bias"][None]
        losses_B = optax.softmax_cross_entropy_with_integer_labels(logits, labels_B)
        return losses_B.mean(where=mask_B), statistics

    (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(state.weights)
    updates, opt_state = _optimizer(fixed).update(grads, state.opt_state, state.weights)
    return FineTuneState(optax.apply_updates(state.weights, updates), statistics, opt_state), value
