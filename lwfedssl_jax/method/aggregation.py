"""Aggregation on the server: how the clients' trained parameters are combined, as streaming sums."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from lwfedssl_jax.config import Config, choose
from lwfedssl_jax.method.task import Broadcast, Hyper, weights_of
from lwfedssl_jax.tree import Tree


class Canaries(NamedTuple):
    """What a round's canaries do (``canaries.py``).

    Attributes:
      uploads: by canary, 1 or -1, or 0 if it is not in the round.
      key: of the stage, from which their directions follow.
    """

    uploads: jax.Array
    key: jax.Array


class RoundContext(NamedTuple):
    """What an aggregator knows about the round.

    Attributes:
      number: of the round, from 1.
      key: a random key for the aggregator's own draws; in ``add`` it differs between clients.
      hyper: the run's hyperparameters.
      expected: how many clients were expected to report, on average over cohorts and drop-outs.
      shared: what ``Aggregator.shared`` returned for the state before the round.
      canaries: None without any.
    """

    number: jax.Array
    key: jax.Array
    hyper: Hyper
    expected: jax.Array
    shared: Tree
    canaries: Canaries | None = None


class Aggregator(NamedTuple):
    """Aggregation by sums over clients, so that no client's model has to be kept.

    Attributes:
      init: ``broadcast -> state``, the server's own state over the rounds of a stage (momentum, for example; ``()``
        if it has none).
      add: ``(context, broadcast, trained, examples) -> contribution`` of one client, a pytree that is summed over all
        clients that report; ``()`` if the weighted mean, which is always computed, is enough.
      finish: ``(context, state, broadcast, mean, summed) -> (state, trainable, measured)``, after the round;
        ``measured`` maps names to numbers for the round's line of ``metrics.jsonl``.
      shared: ``state -> what clients know of it``, in ``RoundContext.shared``.
      finishes_empty: whether ``finish`` also follows a round in which nobody reports; if not, such a round changes
        nothing.

    ``broadcast`` is what the server sent, ``trained`` its trainable part after a client's training, ``mean`` the
    average over clients weighted by their examples, ``summed`` the sum of the contributions.
    """

    init: Callable[[Broadcast], Tree]
    add: Callable[[RoundContext, Broadcast, Tree, jax.Array], Tree]
    finish: Callable[[RoundContext, Tree, Broadcast, Tree, Tree], tuple[Tree, Tree, dict[str, jax.Array]]]
    shared: Callable[[Tree], Tree] = lambda state: ()
    finishes_empty: bool = False


# FedAvg (McMahan et al., 2017, arXiv 1602.05629): sum of n_i * w_i over sum of n_i.
WEIGHTED_MEAN = Aggregator(
    init=lambda broadcast: (),
    add=lambda context, broadcast, trained, examples: (),
    finish=lambda context, state, broadcast, mean, summed: (state, mean, {}),
)


def server_optimizer(optimizer: optax.GradientTransformation) -> Aggregator:
    """Apply ``optimizer`` to the averaged change as a pseudo-gradient (FedOpt; Reddi et al., 2021, arXiv 2003.00295).

    It is algorithm 1 of the paper. Running averages of batch normalisation are averaged without the optimizer.
    """

    def finish(
        context: RoundContext, state: Tree, broadcast: Broadcast, mean: Tree, summed: Tree
    ) -> tuple[Tree, Tree, dict[str, jax.Array]]:
        del context, summed
        weights = weights_of(broadcast.trainable)
        change = jax.tree.map(jnp.subtract, weights, weights_of(mean))
        updates, state = optimizer.update(change, state, weights)
        return state, mean | optax.apply_updates(weights, updates), {}

    return WEIGHTED_MEAN._replace(
        init=lambda broadcast: optimizer.init(weights_of(broadcast.trainable)),
        finish=finish,
    )


def fedavgm(config: Config) -> Aggregator:
    """Averaging with server momentum (Hsu et al., 2019, arXiv 1909.06335)."""
    f = config.federation
    return server_optimizer(optax.sgd(f.server_learning_rate or 1.0, f.server_momentum))


def fedadam(config: Config) -> Aggregator:
    """Adam on the averaged change (Reddi et al., 2021, arXiv 2003.00295); second moment's decay 0.99."""
    f = config.federation
    rate = f.server_learning_rate or 0.01
    return server_optimizer(optax.adam(rate, b1=f.server_momentum, b2=0.99, eps=f.server_epsilon))


def ldawa(config: Config) -> Aggregator:
    """L-DAWA: scales parameters by their cosine to the global ones (Rehman et al., 2023, arXiv 2307.07393, alg. 1).

    ``w = sum(c_i * w_i) / K`` over the K clients, c_i the cosine of ``w_i`` and the global ``w``, separately for each
    parameter (each layer of a stacked one); c is 1 where either is zero. The first ``LDAWA_WARM_UP`` rounds of a stage,
    and running averages of batch normalisation, have the weighted mean.
    """
    del config

    def cosine(sent: jax.Array, trained: jax.Array, axes: tuple[int, ...]) -> jax.Array:
        product = (sent * trained).sum(axes, keepdims=True)
        of_sent, of_trained = (jnp.sqrt(jnp.square(x).sum(axes, keepdims=True)) for x in (sent, trained))
        norms = of_sent * of_trained
        return jnp.where(norms > 0, product / jnp.where(norms > 0, norms, 1), 1)

    def add(context: RoundContext, broadcast: Broadcast, trained: Tree, examples: jax.Array) -> Tree:
        del context, examples

        def leaf(present: jax.Array, s: jax.Array, t: jax.Array) -> dict[str, jax.Array]:
            axes = tuple(range(present.ndim, s.ndim))
            has = jnp.expand_dims(present, axes).astype(s.dtype)
            return {"scaled": has * cosine(s, t, axes) * t, "clients": has}

        return jax.tree.map(leaf, *map(weights_of, (broadcast.present, broadcast.trainable, trained)))

    def finish(
        context: RoundContext, state: Tree, broadcast: Broadcast, mean: Tree, summed: Tree
    ) -> tuple[Tree, Tree, dict[str, jax.Array]]:
        del context, broadcast

        def leaf(mean: jax.Array, s: dict[str, jax.Array]) -> jax.Array:
            is_mean = (state < LDAWA_WARM_UP) | (s["clients"] == 0)
            return jnp.where(is_mean, mean, s["scaled"] / jnp.maximum(s["clients"], 1))

        return state + 1, mean | jax.tree.map(leaf, weights_of(mean), summed), {}

    return Aggregator(lambda broadcast: jnp.zeros((), jnp.int32), add, finish)


LDAWA_WARM_UP = 3  # of the authors' code


AGGREGATORS: dict[str, Callable[[Config], Aggregator]] = {
    "fedavg": lambda config: WEIGHTED_MEAN,
    "fedavgm": fedavgm,
    "fedadam": fedadam,
    "ldawa": ldawa,
}


def make_aggregator(config: Config) -> Aggregator:
    """Return the aggregator that ``federation.aggregator`` names.

    Raises:
      ConfigError: there is no aggregator with that name.
    """
    return choose("federation.aggregator", config.federation.aggregator, AGGREGATORS)(config)
