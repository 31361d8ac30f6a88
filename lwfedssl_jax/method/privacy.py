"""Differential privacy of whole clients: clipped updates, and noise on their sum (DP-FedAvg).

McMahan et al., 2018 (arXiv 1710.06963). A client's update of a stage with d parameters is scaled down to the L2 norm
``clip * sqrt(d)``, so that one number, which is public, serves all strategies and stages: with AdamW on the clients, an
update's norm grows with the root of d. Every client has the same weight, and the sum is divided by the number of
reports that was expected and not by the number that came, which would depend on who takes part. ``costs.accountant``
has the accountant.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.config.rules import SECURE_RANGE
from lwfedssl_jax.method.aggregation import WEIGHTED_MEAN, Aggregator, RoundContext
from lwfedssl_jax.method.task import Broadcast, Task, init_params, weights_of
from lwfedssl_jax.tree import Tree

CLIP_STEP = 0.2  # of the adapted clip's logarithm (Andrew et al., 2021, section 3.1)
SLACK = 1e-4  # part of the clip that rounding may take: norms are sums of float32


def check_privacy(config: Config, task: Task, aggregator: Aggregator) -> None:
    """Refuse what would release more than the clipped sum with its noise.

    Raises:
      ConfigError: naming the field, the value and what is accepted.
    """
    if not config.privacy.clip:
        return
    federation, additions = config.federation, config.additions
    clipped = f"privacy.clip {config.privacy.clip}"
    if aggregator.add is not WEIGHTED_MEAN.add:
        raise ConfigError(
            f"federation.aggregator: {federation.aggregator} uses more than the mean of the updates, and {clipped} "
            "bounds only that; accepted: fedavg, fedavgm, fedadam, or privacy.clip 0"
        )
    if additions.dictionary:
        raise ConfigError(
            f"additions.dictionary: {additions.dictionary} uploads embeddings, which {clipped} does not bound; "
            "accepted: 0, or privacy.clip 0"
        )
    if federation.client_start != "global":
        raise ConfigError(
            f"federation.client_start: {federation.client_start} keeps models on clients between rounds, for which the "
            f"rounds of {clipped} cannot be composed; accepted: global, or privacy.clip 0"
        )
    if jax.tree.leaves(jax.eval_shape(lambda: init_params(task, jax.random.key(0)))["statistics"]):
        raise ConfigError(
            f"model.name: {config.model.name} averages statistics of batch normalisation, which {clipped} does not "
            "bound; accepted: a model without batch normalisation, such as vit_micro, or privacy.clip 0"
        )
    if config.privacy.secure_sum_bits and additions.depth_dropout and additions.depth_dropout_per == "round":
        raise ConfigError(
            f"privacy.secure_sum_bits: {config.privacy.secure_sum_bits} needs the same numbers from all clients, and "
            "with additions.depth_dropout_per round they differ; accepted: 0, or additions.depth_dropout_per step"
        )
    if config.strategy.pacing != "fixed" and (config.privacy.epsilon or config.privacy.noise_multiplier):
        raise ConfigError(
            f"strategy.pacing: {config.strategy.pacing} ends stages by the clients' loss, to which no noise is added; "
            "accepted: fixed, or no privacy.epsilon and privacy.noise_multiplier"
        )


class Contribution(NamedTuple):
    """What one client adds to a round's sums.

    Attributes:
      update: its clipped change of the weights; 0 in idle rows. With a secure sum, int32 (``to_integers``).
      within: 1 if its change was within the clip, else 0.
      clients: 1.
    """

    update: Tree
    within: jax.Array
    clients: jax.Array


class State(NamedTuple):
    """The server's state over the rounds of a stage: that of the aggregator, and the clip in units of the config's."""

    inner: Tree
    scale: jax.Array


def private(inner: Aggregator, config: Config) -> Aggregator:
    """Clip what an aggregator averages, and add noise; return it unchanged where ``privacy.clip`` is 0.

    Args:
      inner: uses the mean alone (``check_privacy``).
      config: resolved.
    """
    if not config.privacy.clip:
        return inner
    adapts, bits = config.privacy.quantile > 0, config.privacy.secure_sum_bits

    def add(context: RoundContext, broadcast: Broadcast, trained: Tree, examples: jax.Array) -> Contribution:
        del examples  # weights that depend on data would change the sensitivity
        present, *models = map(weights_of, (broadcast.present, trained, broadcast.trainable))
        update = jax.tree.map(lambda has, new, old: masked(has, new - old), present, *models)
        length, bound = norm(update), clip_norm(context, broadcast)
        room = 1 - 2 * SECURE_RANGE * context.expected / 2**bits if bits else 1.0  # for rounding, in the norm
        factor = jnp.minimum(1, room * bound / jnp.maximum(length, jnp.finfo(jnp.float32).tiny)) * (1 - SLACK)
        clipped = jax.tree.map(lambda x: factor.astype(x.dtype) * x, update)
        if bits:
            clipped = to_integers(context.key, clipped, step_of(context, bits))
        return Contribution(clipped, (length <= bound).astype(jnp.float32), jnp.ones((), jnp.float32))

    def finish(
        context: RoundContext, state: State, broadcast: Broadcast, mean: Tree, summed: Contribution
    ) -> tuple[State, Tree, dict[str, jax.Array]]:
        del mean  # which is not clipped
        mechanism, expected = context.hyper.mechanism, context.expected
        bound = clip_norm(context._replace(shared=state.scale), broadcast)
        present, weights = weights_of(broadcast.present), weights_of(broadcast.trainable)
        update_key, count_key, inner_key = jax.random.split(context.key, 3)
        noise = gaussian(update_key, jnp.asarray(mechanism.noise) * bound, present, weights)
        total, found = summed.update, dict[str, jax.Array]()
        if bits:  # noise comes before the modulus, which would otherwise change a sum by more than a client does
            step = step_of(context._replace(shared=state.scale), bits)
            noisy = jax.tree.map(lambda x, z: x + whole(z, step, bits), total, noise)
            total = jax.tree.map(lambda x: x.astype(jnp.float32) * step, total)
            noisy, found["wrapped"] = from_integers(noisy, step, bits)
        else:
            noisy = jax.tree.map(jnp.add, total, noise)
        released = jax.tree.map(lambda x: x / expected.astype(x.dtype), noisy)
        average = broadcast.trainable | jax.tree.map(jnp.add, weights, released)
        inner_state, trainable, measured = inner.finish(
            context._replace(key=inner_key, shared=inner.shared(state.inner)), state.inner, broadcast, average, ()
        )
        scale = state.scale
        if adapts:
            off = summed.within - summed.clients / 2 + mechanism.count_noise * jax.random.normal(count_key)
            scale = scale * jnp.exp(-CLIP_STEP * (off / expected + 0.5 - mechanism.quantile))
        found |= {
            "clip_norm": bound,
            "share_clipped": (summed.clients - summed.within) / jnp.maximum(summed.clients, 1),
            "noise_norm": norm(noise) / expected,
            "signal_norm": norm(total) / expected,
        }
        return State(inner_state, scale), trainable, measured | found

    return Aggregator(
        init=lambda broadcast: State(inner.init(broadcast), jnp.ones((), jnp.float32)),
        add=add,
        finish=finish,
        shared=lambda state: state.scale,
        finishes_empty=True,
    )


def clip_norm(context: RoundContext, broadcast: Broadcast) -> jax.Array:
    """Return the L2 norm to which updates are clipped: by the number of parameters that are not idle."""
    present, weights = weights_of(broadcast.present), weights_of(broadcast.trainable)
    sizes = jax.tree.map(lambda has, x: has.sum() * (x.size // max(has.size, 1)), present, weights)
    parameters = jnp.stack(jax.tree.leaves(sizes)).sum().astype(jnp.float32)
    bound: jax.Array = context.hyper.mechanism.clip * context.shared * jnp.sqrt(parameters)
    return bound


def step_of(context: RoundContext, bits: int) -> jax.Array:
    """Return what 1 stands for in a secure sum, whose range is ``SECURE_RANGE`` clips of all clients, each way.

    Rounding moves each of d numbers by less than a step, so an update's norm by less than ``step * sqrt(d)``, which is
    ``2 * SECURE_RANGE * K / 2**bits`` of the clip, which is lowered by as much.
    """
    step: jax.Array = 2 * SECURE_RANGE * context.expected * context.hyper.mechanism.clip * context.shared / 2**bits
    return step


def to_integers(key: jax.Array, update: Tree, step: jax.Array) -> Tree:
    """Return a client's message of a secure sum: int32, rounded up or down at random, so that the mean is right."""
    leaves, structure = jax.tree.flatten(update)
    keys = jax.random.split(key, len(leaves))

    def leaf(key: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.floor(x / step.astype(x.dtype) + jax.random.uniform(key, x.shape, x.dtype)).astype(jnp.int32)

    return jax.tree.unflatten(structure, [leaf(k, x) for k, x in zip(keys, leaves, strict=True)])


def whole(noise: jax.Array, step: jax.Array, bits: int) -> jax.Array:
    """Round noise to whole steps, less multiples of ``2**bits``, exactly: added to whole numbers, it is their noise."""
    return jnp.fmod(jnp.round(noise / step), 2.0**bits).astype(jnp.int32)


def from_integers(total: Tree, step: jax.Array, bits: int) -> tuple[Tree, jax.Array]:
    """Return what a sum modulo ``2**bits`` stands for, and how many of its numbers were beyond that and wrapped around.

    Sums of int32 do not depend on their order, and so not on lanes or devices.
    """
    cut = jax.tree.map(lambda x: (x << (32 - bits)) >> (32 - bits), total)  # the shift to the right keeps the sign
    wrapped = jax.tree.map(lambda x, y: (x != y).sum(), total, cut)
    return jax.tree.map(lambda x: x.astype(jnp.float32) * step, cut), jnp.stack(jax.tree.leaves(wrapped)).sum()


def norm(weights: Tree) -> jax.Array:
    """Return the L2 norm over all leaves, in float32; an axis at a time, since long sums round more."""

    def squares(x: jax.Array) -> jax.Array:
        x = jnp.square(x.astype(jnp.float32))
        while x.ndim:
            x = x.sum(-1)
        return x

    return jnp.sqrt(jnp.stack([squares(x) for x in jax.tree.leaves(weights)]).sum())


def gaussian(key: jax.Array, deviation: jax.Array, present: Tree, weights: Tree) -> Tree:
    """Draw normal noise in the shape of weights, with a key for each leaf; 0 in idle rows."""
    leaves, structure = jax.tree.flatten(weights)
    keys = jax.random.split(key, len(leaves))
    drawn = [
        deviation.astype(x.dtype) * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.map(masked, present, jax.tree.unflatten(structure, drawn))


def masked(present: jax.Array, leaf: jax.Array) -> jax.Array:
    """Return a leaf with zeros in its idle rows, also where these are not finite."""
    return jnp.where(jnp.expand_dims(present, tuple(range(present.ndim, leaf.ndim))), leaf, 0)
