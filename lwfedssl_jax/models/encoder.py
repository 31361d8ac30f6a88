"""What an encoder is to the rest of the package, whatever its architecture."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import jax

from lwfedssl_jax.tree import Tree

EVERY_STAGE = 0  # layer number of parameters that every stage trains

F = TypeVar("F", bound=Callable[..., Any])

Depth = int | jax.Array  # number of leading layers that run


class Patches(NamedTuple):
    """Some patches of each image, which an encoder with tokens can have in place of whole images.

    Attributes:
      values: BxVxF, the numbers of V patches.
      positions: BxV, their numbers in the whole image, row by row.
    """

    values: jax.Array
    positions: jax.Array


class Encoder(NamedTuple):
    """Pure functions of an encoder F.

    Parameters are ``{"encoder": weights, "statistics": running averages of batch normalisation}``,
    the latter empty where an architecture keeps none. They are averaged and exchanged like weights,
    but get no gradient. A *part* is a tree of the same form with None for what is not in it.

    Attributes:
      init: ``key -> params`` with all L layers.
      layers: ``params -> tree`` of each leaf's layer number: 1..L, ``EVERY_STAGE``, or ``-s`` for
        what exists in the stage that ends with layer s and in no other; a vector where a leaf is
        stacked over layers.
      frozen_forward: ``(frozen part, images_BxHxWxC, depth, order) -> x``, the first ``depth`` frozen
        layers on stored statistics; the images themselves where nothing is frozen.
      trainable_forward: ``(trainable part, x, mask_B, depth, order) -> (features, statistics)``, from
        what ``frozen_forward`` gave for V views one after the other (V * B samples) through the first
        ``depth`` trainable layers: ``features_VBxD``, and the part's running averages after this batch,
        of which only the samples that ``mask_B`` names count.
      feature_dim: D.
      patch_size: of an encoder of tokens, one for each patch, which then has ``trainable_tokens`` and takes ``Patches``
        too; else 0.
      trainable_tokens: as ``trainable_forward``, but with ``tokens_VBxPxD``, whose mean the features are.
      products: how products of float32 factors are computed, as JAX names it (``jax.default_matmul_precision``).

    A depth may be traced, and be another for each that is batched by ``vmap``. ``order``, if not
    None, has the numbers (from 0) of the layers that run, ``depth`` of them, at its front.
    """

    init: Callable[[jax.Array], Tree]
    layers: Callable[[Tree], Tree]
    frozen_forward: Callable[[Tree, Any, Depth, jax.Array | None], Any]
    trainable_forward: Callable[[Tree, jax.Array, jax.Array, Depth, jax.Array | None], tuple[jax.Array, Tree]]
    feature_dim: int
    patch_size: int = 0
    trainable_tokens: Callable[[Tree, Any, jax.Array, Depth, jax.Array | None], tuple[jax.Array, Tree]] | None = None
    products: str = "highest"


def with_its_products(f: F) -> F:
    """Make a function whose first argument has an ``encoder`` compute all products as the encoder does."""

    @functools.wraps(f)
    def traced(owner: Any, *args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision(owner.encoder.products):
            return f(owner, *args, **kwargs)

    return cast(F, traced)
