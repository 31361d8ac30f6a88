"""Additional terms of the local loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.method.objectives import nce, unit_norm
from lwfedssl_jax.system import seeds
from lwfedssl_jax.tree import Tree

ALIGNMENT_TEMPERATURE = 0.5  # MOON's


class Local(NamedTuple):
    """What a term of the local loss can use.

    Attributes:
      weights: what is being trained.
      received: the same, as the server sent it.
      present: for each leaf, which rows are not idle (``tree.present``).
      projection: 2xBxO, the projection head's output for both views; None for an objective without one.
      received_projection: gives the same from the received weights, for one more forward pass.
      mask: B, True for real samples.
      extras: what the server sent in addition to the model (``Exchange``).
      project_images: ``(model, images_PxHxWxC) -> PxO``, projections of uint8 images without augmentation, with all
        layers trainable.
      key: of the step; a term that draws random numbers folds its own stream into it.
    """

    weights: Tree
    received: Tree
    present: Tree
    projection: Any
    received_projection: Callable[[], jax.Array]
    mask: jax.Array
    extras: Tree
    project_images: Callable[[Tree, jax.Array], jax.Array]
    key: jax.Array


Term = Callable[[Local], jax.Array]


def proximal(local: Local) -> jax.Array:
    """``1/2 * ||w - w_global||^2`` over the trainable weights (FedProx; Li et al., 2020, arXiv 1812.06127, eq. 2).

    The weight is FedProx's mu.
    """

    def squares(w: jax.Array, received: jax.Array, present: jax.Array) -> jax.Array:
        mask = present.reshape(present.shape + (1,) * (w.ndim - present.ndim))
        return jnp.where(mask, jnp.square(w - received), 0).sum()

    return jnp.stack(jax.tree.leaves(jax.tree.map(squares, local.weights, local.received, local.present))).sum() / 2


def alignment(local: Local) -> jax.Array:
    """Align local projections with the global model's of the same view (arXiv 2401.11647 v3; after MOON, 2103.16257).

    It is the mean of ``nce(z, z_global)`` over both views, with other samples' global projections as negatives and
    temperature 0.5. With depth dropout, both models run without the skipped layers.
    """
    z, goal = local.projection, jax.lax.stop_gradient(local.received_projection())
    return (
        nce(z[0], goal[0], local.mask, ALIGNMENT_TEMPERATURE) + nce(z[1], goal[1], local.mask, ALIGNMENT_TEMPERATURE)
    ) / 2


def base(local: Local) -> jax.Array:
    """Mean ``||z - z_base||^2`` of normalised projections of public images (FedCA's alignment; arXiv 2010.08982)."""
    images = public_batch(local.extras["public"], len(local.mask), local.key)
    models = local.weights, local.extras["base"]
    z, goal = (unit_norm(local.project_images(model, images)) for model in models)
    return jnp.square(z - goal).sum(-1).mean()


def public_batch(public_NxHxWxC: jax.Array, size: int, key: jax.Array) -> jax.Array:
    """Draw at most ``size`` of the public images for a step, without replacement: PxHxWxC, uint8."""
    shape = (min(size, len(public_NxHxWxC)),)
    drawn = jax.random.choice(
        jax.random.fold_in(key, seeds.StepTag.PUBLIC_IMAGES), len(public_NxHxWxC), shape, replace=False
    )
    return public_NxHxWxC[drawn]


TERMS: dict[str, Term] = {"proximal": proximal, "alignment": alignment, "base": base}


def terms_of(config: Config) -> tuple[tuple[Term, float], ...]:
    """Return the terms that ``additions.terms`` names, with their weights; terms of weight 0 are left out.

    Raises:
      ConfigError: an entry is not NAME=WEIGHT, or has an unknown or repeated name or a negative weight.
    """
    found: dict[str, float] = {}
    for text in config.additions.terms:
        name, _, number = text.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if name not in TERMS or name in found or not 0 <= weight < float("inf"):
            raise ConfigError(
                f"additions.terms: {text!r} is not valid; accepted: NAME=WEIGHT, each NAME once of {', '.join(TERMS)}, "
                "a finite WEIGHT of at least 0"
            )
        found[name] = weight
    return tuple((TERMS[name], weight) for name, weight in found.items() if weight)
