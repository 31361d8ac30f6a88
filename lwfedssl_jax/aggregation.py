"""What the server makes of the clients' trained parameters, as a stream of sums."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax.tree import Tree


class Aggregator(NamedTuple):
    """Aggregation as a sum of one contribution a client, so that nobody's model has to be kept.

    Attributes:
      init: ``sent -> state``, the server's own state over the rounds of a stage (momentum, a
        random key; ``()`` if it has none). A run that continues starts it anew.
      add: ``(sent, trained, examples) -> contribution``, a pytree; the contributions of all
        clients that report are summed.
      finish: ``(state, sent, summed) -> (state, trainable)``, after the round.

    ``sent`` is the trainable part the server sent out, ``trained`` what a client made of it.
    """

    init: Callable[[Tree], Tree]
    add: Callable[[Tree, Tree, jax.Array], Tree]
    finish: Callable[[Tree, Tree, Tree], tuple[Tree, Tree]]


def _add(sent: Tree, trained: Tree, examples: jax.Array) -> Tree:
    del sent
    return {"weighted": jax.tree.map(lambda x: examples.astype(x.dtype) * x, trained), "examples": examples}


def _finish(state: Tree, sent: Tree, summed: Tree) -> tuple[Tree, Tree]:
    del sent
    total = jnp.maximum(summed["examples"], 1)
    return state, jax.tree.map(lambda x: x / total.astype(x.dtype), summed["weighted"])


# FedAvg (McMahan et al., 2017, arXiv 1602.05629): sum of n_i * w_i over sum of n_i.
WEIGHTED_MEAN = Aggregator(init=lambda sent: (), add=_add, finish=_finish)
