"""The self-supervised objectives as pure functions, with masks for padded samples.

Every loss takes both views' embeddings at once, ``online_2xBxD`` and ``target_2xBxD``,
and ``mask_B``, True for real samples. Masked samples are neither anchors nor negatives.
Losses are computed in float32 or wider.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from lwfedssl_jax.config import Config, ConfigError, choose
from lwfedssl_jax.config.fields import Range

Negatives = tuple[jax.Array, jax.Array]  # MxD, normalised, and M, False where a row is ignored


class Option(NamedTuple):
    """An option of an objective, ``objective.options NAME=VALUE``.

    Attributes:
      default: its value if it is not given; if this is an int, so is every value.
      accepted: the interval of its values.
      meaning: a phrase for error messages and documentation.
    """

    default: float
    accepted: Range
    meaning: str


class Objective(NamedTuple):
    """A self-supervised objective.

    Attributes:
      loss: ``(online_2xBxD, target_2xBxD, mask_B, temperature) -> scalar``, a mean over samples, with the options as
        keyword arguments. If ``hides_patches``: ``(predicted_BxPxF, patches_BxPxF, hidden_BxP, mask_B) -> scalar``.
      has_target: a momentum target branch (encoder and projection head) gives ``target``;
        without one it is the online embeddings themselves.
      has_prediction: the online branch ends in a prediction head.
      paper_views: number of forward passes per sample that the paper's FLOPs rule counts.
      loss_with_negatives: ``loss`` with additional ``negatives`` for every anchor, as its fifth argument; None for
        objectives without any.
      fewest: real samples that a batch needs to learn from. Of a single one there is no negative, and the heads' batch
        normalisation makes 0 of it.
      options: by name.
      hides_patches: the encoder sees some patches of one view, and a decoder in place of the projection head predicts
        the numbers of all patches; else the loss compares embeddings of two views.
    """

    loss: Callable[..., jax.Array]
    has_target: bool
    has_prediction: bool
    paper_views: int
    loss_with_negatives: Callable[..., jax.Array] | None = None
    fewest: int = 2
    options: Mapping[str, Option] = MappingProxyType({})
    hides_patches: bool = False


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
    further = None if negatives is None else negatives_logsumexp(z, negatives, temperature)
    return _masked_mean(_cross_entropy(z @ z.T / temperature, others, positives, further), jnp.tile(mask_B, 2))


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
    further = None if negatives is None else negatives_logsumexp(q, negatives, temperature)
    return _masked_mean(
        _cross_entropy(q @ k.T / temperature, mask_B[None, :], jnp.arange(len(mask_B)), further), mask_B
    )


def byol_loss(online_2xBxD: jax.Array, target_2xBxD: jax.Array, mask_B: jax.Array, temperature: ArrayLike) -> jax.Array:
    """``2 - 2 cos(q, k)`` summed over both directions (Grill et al., 2020, arXiv 2006.07733, eq. 2)."""
    del temperature
    q, k = unit_norm(online_2xBxD), unit_norm(target_2xBxD)[::-1]
    return _masked_mean((2 - 2 * (q * k).sum(-1)).sum(0), mask_B)


def unit_norm(x: jax.Array) -> jax.Array:
    """``x / ||x||`` over the last axis, in float32 or wider; zero vectors stay zero."""
    x = x.astype(np.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-12))


NEGATIVES_AT_ONCE = 4096


def negatives_logsumexp(anchors_NxD: jax.Array, negatives: Negatives, temperature: ArrayLike) -> jax.Array:
    """``log(sum_j exp(a_i . n_j / t))`` over further negatives n of each anchor a; N numbers.

    Of many negatives, only the logits of ``NEGATIVES_AT_ONCE`` exist at a time, also in the backward pass.
    """
    further_MxD, filled_M = negatives

    def some(further_CxD: jax.Array, filled_C: jax.Array) -> jax.Array:
        logits = jnp.where(filled_C[None, :], anchors_NxD @ further_CxD.T / temperature, MASKED)
        return jax.nn.logsumexp(logits, axis=1)

    if len(filled_M) <= NEGATIVES_AT_ONCE:
        return some(further_MxD, filled_M)
    parts = -(-len(filled_M) // NEGATIVES_AT_ONCE)
    missing = parts * NEGATIVES_AT_ONCE - len(filled_M)
    further = jnp.pad(further_MxD, ((0, missing), (0, 0))).reshape(parts, NEGATIVES_AT_ONCE, -1)
    filled = jnp.pad(filled_M, (0, missing)).reshape(parts, NEGATIVES_AT_ONCE)

    @jax.checkpoint
    def add(total_N: jax.Array, part: Negatives) -> tuple[jax.Array, None]:
        return jnp.logaddexp(total_N, some(*part)), None

    total, _ = jax.lax.scan(add, jnp.full(len(anchors_NxD), MASKED, anchors_NxD.dtype), (further, filled))
    return total


MASKED = -1e9  # a finite floor: masked rows, weighted by zero afterwards, must not turn into 0 * inf


def _cross_entropy(logits: jax.Array, allowed: jax.Array, positives: jax.Array, further: jax.Array | None) -> jax.Array:
    """Cross entropy against the positives; ``further`` is the log of what other negatives add to the sum."""
    logits = jnp.where(allowed, logits, MASKED)
    if further is None:
        return optax.softmax_cross_entropy_with_integer_labels(logits, positives)
    positive = jnp.take_along_axis(logits, positives[:, None], axis=1)[:, 0]
    return jnp.logaddexp(jax.nn.logsumexp(logits, axis=1), further) - positive


def _masked_mean(values_B: jax.Array, mask_B: jax.Array) -> jax.Array:
    return jnp.mean(values_B, where=mask_B)


def vicreg_loss(
    online_2xBxD: jax.Array,
    target_2xBxD: jax.Array,
    mask_B: jax.Array,
    temperature: ArrayLike,
    *,
    invariance: float,
    variance: float,
    covariance: float,
) -> jax.Array:
    """VICReg (Bardes et al., 2022, arXiv 2105.04906, eq. 1 to 6), with its gamma of 1 and epsilon of 1e-4.

    The mean squared distance of both views' embeddings, the hinge of each dimension's standard deviation over the
    samples at 1, and the squared covariances of different dimensions, the latter two summed over views.
    """
    del target_2xBxD, temperature
    z = online_2xBxD.astype(np.promote_types(online_2xBxD.dtype, jnp.float32))
    mask, dimensions = mask_B[None, :, None], z.shape[-1]
    others = jnp.maximum(mask_B.sum() - 1, 1).astype(z.dtype)
    centred = jnp.where(mask, z - z.mean(1, keepdims=True, where=mask), 0)
    deviation_2xD = jnp.sqrt(jnp.square(centred).sum(1) / others + 1e-4)
    covariance_2xDxD = jnp.einsum("vbd,vbe->vde", centred, centred) / others
    off_diagonal = jnp.where(jnp.eye(dimensions, dtype=bool), 0, covariance_2xDxD)
    return (
        invariance * jnp.square(z[0] - z[1]).mean(where=mask_B[:, None])
        + variance * jnp.maximum(1 - deviation_2xD, 0).mean(1).sum()
        + covariance * jnp.square(off_diagonal).sum() / dimensions
    )


def mae_loss(
    predicted_BxPxF: jax.Array, patches_BxPxF: jax.Array, hidden_BxP: jax.Array, mask_B: jax.Array
) -> jax.Array:
    """Mean squared error over the numbers of hidden patches (He et al., 2022, arXiv 2111.06377)."""
    wide = np.promote_types(predicted_BxPxF.dtype, jnp.float32)
    error_BxP = jnp.square(predicted_BxPxF.astype(wide) - patches_BxPxF.astype(wide)).mean(-1)
    return error_BxP.mean(where=hidden_BxP & mask_B[:, None])


OBJECTIVES = {
    "simclr": Objective(
        simclr_loss, has_target=False, has_prediction=False, paper_views=2, loss_with_negatives=simclr_loss
    ),
    "byol": Objective(byol_loss, has_target=True, has_prediction=True, paper_views=1),
    "mocov3": Objective(
        mocov3_loss, has_target=True, has_prediction=True, paper_views=1, loss_with_negatives=mocov3_loss
    ),
    "vicreg": Objective(
        vicreg_loss,
        has_target=False,
        has_prediction=False,
        paper_views=2,
        options={
            "invariance": Option(25.0, Range(0, 10**6), "weight of the distance of both views"),
            "variance": Option(25.0, Range(0, 10**6), "weight of the standard deviations"),
            "covariance": Option(1.0, Range(0, 10**6), "weight of the covariances"),
        },
    ),
    "mae": Objective(
        mae_loss,
        has_target=False,
        has_prediction=False,
        paper_views=1,
        fewest=1,
        options={
            "mask_ratio": Option(
                0.75, Range(0, 1, above=True, below=True), "share of the patches that are hidden, rounded to patches"
            ),
            "normalised_pixels": Option(1, Range(0, 1), "1: each patch has mean 0 and variance 1 in the loss; 0: not"),
            "decoder_depth": Option(1, Range(1, 64), "transformer blocks of the decoder"),
            "decoder_width": Option(0, Range(0, 2**20), "width of the decoder; 0: the encoder's"),
            "decoder_heads": Option(0, Range(0, 2**20), "attention heads of the decoder; 0: the encoder's"),
        },
        hides_patches=True,
    ),
}


def options_of(config: Config) -> dict[str, float]:
    """Return the options of the config's objective, by name.

    Raises:
      ConfigError: an entry of ``objective.options`` is not NAME=VALUE, or has an unknown or repeated name, or a value
        that the objective does not accept.
    """
    declared = choose("objective.name", config.objective.name, OBJECTIVES).options
    values: dict[str, float] = {}
    for text in config.objective.options:
        name, given, number = text.partition("=")
        if not given or name not in declared or name in values:
            known = ", ".join(declared) or "none"
            raise ConfigError(
                f"objective.options: {text!r} is not valid; accepted: NAME=VALUE, each NAME once of those of "
                f"objective.name {config.objective.name}: {known}"
            )
        default, accepted, meaning = declared[name]
        try:
            value = type(default)(number)
        except ValueError:
            value = float("nan")
        if value not in accepted:
            kind = "whole number" if isinstance(default, int) else "number"
            raise ConfigError(f"objective.options: {text!r} is not valid; accepted: a {kind} {accepted} ({meaning})")
        values[name] = value
    return {name: option.default for name, option in declared.items()} | values
