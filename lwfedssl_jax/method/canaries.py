"""Canaries: clients that nobody trains, whose presence the released models are searched for.

Each canary has a random direction in every stage. A random half of them are in the population and upload it in the
rounds in which they are drawn; the others are not, and are what the first are compared with (Andrew et al., 2024, arXiv
2302.03098). A canary uploads its direction in half of a stage's rounds and the opposite in the others, in random order:
noise that is the same in several rounds would cancel, and give it away. Canaries go through the aggregator like
clients, with many examples and updates beyond the clip, so that weights and clips that do not bind show too.
``costs.audit`` has the comparison.
"""

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax.config import Config
from lwfedssl_jax.method.aggregation import Aggregator, RoundContext
from lwfedssl_jax.method.privacy import Contribution, clip_norm, gaussian, norm
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.task import Broadcast, weights_of
from lwfedssl_jax.system import seeds
from lwfedssl_jax.tree import Tree

BEYOND = 3.0  # norm of a canary's update, in the clip
EXAMPLES = 1000.0  # of a canary
COSINES = "canary_cosines"  # in a round's line: by canary, of its direction and the change of the global model


def inside(config: Config) -> np.ndarray:
    """Return which of the M canaries are in the population, M booleans."""
    rng = seeds.rng(config.runtime.seed, seeds.RngTag.CANARIES)
    chosen = np.zeros(config.privacy.canaries, bool)
    chosen[rng.permutation(len(chosen))[: len(chosen) // 2]] = True
    return chosen


def signs(config: Config, stage: Stage) -> np.ndarray:
    """Return whether each canary uploads its direction, 1, or the opposite, -1, in each round of a stage: MxR."""
    rng = seeds.rng(config.runtime.seed, seeds.RngTag.CANARIES, stage.number)
    alternating = np.where(np.arange(stage.rounds) % 2, -1.0, 1.0)
    return rng.permuted(np.tile(alternating, (config.privacy.canaries, 1)), axis=1).astype(np.float32)


def uploads(config: Config, stage: Stage, number: int, probability: float) -> np.ndarray:
    """Return what the canaries upload in a round: 1, -1 or, if they are not in it, 0; M numbers.

    Args:
      config: resolved.
      stage: that the round is in.
      number: of the round.
      probability: with which a client is drawn.
    """
    rng = seeds.rng(config.runtime.seed, seeds.RngTag.CANARIES, stage.number, number)
    drawn = inside(config) & (rng.random(config.privacy.canaries) < probability)
    return np.where(drawn, signs(config, stage)[:, number - stage.first_round - 1], 0).astype(np.float32)


def with_canaries(aggregator: Aggregator, config: Config) -> Aggregator:
    """Add the canaries' contributions to a round's sum; return the aggregator unchanged without any.

    Args:
      aggregator: clips (``privacy.private``).
      config: resolved.
    """
    if not config.privacy.canaries:
        return aggregator
    numbers = jnp.arange(config.privacy.canaries)

    def finish(
        context: RoundContext, state: Tree, broadcast: Broadcast, mean: Tree, summed: Contribution
    ) -> tuple[Tree, Tree, dict[str, jax.Array]]:
        present, weights, canaries = weights_of(broadcast.present), weights_of(broadcast.trainable), context.canaries
        assert canaries is not None
        sending = context._replace(shared=aggregator.shared(state))

        def direction(number: jax.Array) -> Tree:
            drawn = gaussian(jax.random.fold_in(canaries.key, number), jnp.ones(()), present, weights)
            length = norm(drawn)
            return jax.tree.map(lambda x: x / length.astype(x.dtype), drawn)

        def add(total: Tree, canary: tuple[jax.Array, jax.Array]) -> tuple[Tree, None]:
            number, uploaded = canary
            size = BEYOND * uploaded * clip_norm(sending, broadcast)
            trained = jax.tree.map(lambda w, x: w + size.astype(x.dtype) * x, weights, direction(number))
            update = aggregator.add(sending, broadcast, broadcast.trainable | trained, jnp.float32(EXAMPLES)).update
            return jax.tree.map(lambda t, x: t + jnp.where(uploaded == 0, 0, x), total, update), None

        total, _ = jax.lax.scan(add, summed.update, (numbers, canaries.uploads))
        state, trainable, measured = aggregator.finish(context, state, broadcast, mean, summed._replace(update=total))
        change = jax.tree.map(jnp.subtract, weights_of(trainable), weights)
        length = jnp.maximum(norm(change), jnp.finfo(jnp.float32).tiny)

        def cosine(number: jax.Array) -> jax.Array:
            products = jax.tree.map(lambda x, y: (x * y).sum(), direction(number), change)
            return jnp.stack(jax.tree.leaves(products)).sum() / length

        return state, trainable, measured | {COSINES: jax.lax.map(cosine, numbers)}

    return aggregator._replace(finish=finish)
