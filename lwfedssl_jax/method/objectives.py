"""The self-supervised objectives as pure functions, with masks for padded samples.

Every loss takes both views' embeddings at once, ``online_2xBxD`` and ``target_2xBxD``,
and ``mask_B``, True for real samples. Masked samples are neither anchors nor negatives.
Losses are computed in float32 or wider.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

Negatives = tuple[jax.Array, jax.Array]  # MxD, normalised, and M, False where a row is ignored


class Objective(NamedTuple):
    """A self-supervised objective.

    Attributes:
      loss: ``(online_2xBxD, target_2xBxD, mask_B, temperature) -> scalar``, a mean over samples.
      has_target: a momentum target branch (encoder and projection head) gives ``target``;
        without one it is the online embeddings themselves.
      has_prediction: the online branch ends in a prediction head.
      paper_views: number of forward passes per sample that the paper's FLOPs rule counts.
      loss_with_negatives: ``loss`` with additional ``negatives`` for every anchor; None for objectives without any.
      fewest: real samples that a batch needs to learn from. Of a single one there is no negative, and the heads' batch
        normalisation makes 0 of it.
    """

    loss: Callable[[jax.Array, jax.Array, jax.Array, ArrayLike], jax.Array]
    has_target: bool
    has_prediction: bool
    paper_views: int
    loss_with_negatives: Callable[[jax.Array, jax.Array, jax.Array, ArrayLike, Negatives], jax.Array] | None = None
    fewest: int = 2


def simclr_loss(
    online_2xBxD: jax.Array,
    target_2xBxD: jax.Array,
    mask_B: jax.Array,
    temperature: ArrayLike,
    negatives: Negatives | None = None,
) -> jax.Array:
    """NT-Xent over 2B views (Chen et al., 2020, arXiv 2002.05709, eq. 1).

    Each view is an anchor; its positive is the other view of the same image, its negatives
    are all other views: ``-log(exp(s_ij / t) / sum_{k != i} exp(s_ik / t))``, s the cosine.
    """
    del target_2xBxD
    b = mask_B.shape[0]
    z = unit_norm(online_2xBxD).reshape(2 * b, -1)
    others = jnp.tile(mask_B, 2)[None, :] & ~jnp.eye(2 * b, dtype=bool)
    positives = (jnp.arange(2 * b) + b) % (2 * b)
    logits = _with_negatives(z @ z.T / temperature, others, z, temperature, negatives)
    return _masked_mean(_cross_entropy(*logits, positives), jnp.tile(mask_B, 2))


def mocov3_loss(
    online_2xBxD: jax.Array,
    target_2xBxD: jax.Array,
    mask_B: jax.Array,
    temperature: ArrayLike,
    negatives: Negatives | None = None,
) -> jax.Array:
    """``nce(q1, k2) + nce(q2, k1)`` (Chen et al., 2021, arXiv 2104.02057, alg. 1), without the factor 2t.

    ``nce(q, k)`` is the cross entropy of ``q @ k.T / t`` against the diagonal.
    """
    q, k = online_2xBxD, target_2xBxD
    return nce(q[0], k[1], mask_B, temperature, negatives) + nce(q[1], k[0], mask_B, temperature, negatives)


def nce(
    q_BxD: jax.Array, k_BxD: jax.Array, mask_B: jax.Array, temperature: ArrayLike, negatives: Negatives | None = None
) -> jax.Array:
    """Mean cross entropy of ``q @ k.T / temperature`` (both l2-normalised) against the diagonal."""
    q, k = unit_norm(q_BxD), unit_norm(k_BxD)
    logits = _with_negatives(q @ k.T / temperature, mask_B[None, :], q, temperature, negatives)
    return _masked_mean(_cross_entropy(*logits, jnp.arange(len(mask_B))), mask_B)


def byol_loss(online_2xBxD: jax.Array, target_2xBxD: jax.Array, mask_B: jax.Array, temperature: ArrayLike) -> jax.Array:
    """``2 - 2 cos(q, k)`` summed over both directions (Grill et al., 2020, arXiv 2006.07733, eq. 2)."""
    del temperature
    q, k = unit_norm(online_2xBxD), unit_norm(target_2xBxD)[::-1]
    return _masked_mean((2 - 2 * (q * k).sum(-1)).sum(0), mask_B)


def unit_norm(x: jax.Array) -> jax.Array:
    """``x / ||x||`` over the last axis, in float32 or wider; zero vectors stay zero."""
    x = x.astype(np.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))


def _with_negatives(
    logits: jax.Array, allowed: jax.Array, anchors_NxD: jax.Array, temperature: ArrayLike, negatives: Negatives | None
) -> tuple[jax.Array, jax.Array]:
    """Append a column for each of ``negatives``; ``allowed`` may have one row for all anchors."""
    if negatives is None:
        return logits, allowed
    further_MxD, filled_M = negatives
    filled = jnp.broadcast_to(filled_M[None, :], (len(allowed), len(filled_M)))
    return (
        jnp.concatenate([logits, anchors_NxD @ further_MxD.T / temperature], axis=1),
        jnp.concatenate([allowed, filled], axis=1),
    )


def _cross_entropy(logits: jax.Array, allowed: jax.Array, positives: jax.Array) -> jax.Array:
    # A finite floor: masked rows, weighted by zero afterwards, must not turn into 0 * inf.
    logits = jnp.where(allowed, logits, -1e9)
    return optax.softmax_cross_entropy_with_integer_labels(logits, positives)


def _masked_mean(values_B: jax.Array, mask_B: jax.Array) -> jax.Array:
    return jnp.mean(values_B, where=mask_B)


OBJECTIVES = {
    "simclr": Objective(
        simclr_loss, has_target=False, has_prediction=False, paper_views=2, loss_with_negatives=simclr_loss
    ),
    "byol": Objective(byol_loss, has_target=True, has_prediction=True, paper_views=1),
    "mocov3": Objective(
        mocov3_loss, has_target=True, has_prediction=True, paper_views=1, loss_with_negatives=mocov3_loss
    ),
}
