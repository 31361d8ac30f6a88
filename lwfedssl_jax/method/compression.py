"""Compressed uploads: what a client sends of its update, and what the server makes of it.

``int8`` sends each parameter in 8 bits, and a float32 scale for each matrix (each layer's row of a stacked one), with
stochastic rounding, so that the mean is right (QSGD; Alistarh et al., 2017, arXiv 1610.02132). ``top=SHARE`` sends that
share of the whole update, the largest values as float32 and their positions as int32, or as one bit for each parameter
where that is less; the rest counts as 0 (Aji and Heafield, 2017, arXiv 1704.05021). Clients keep nothing between rounds
and so cannot send the rest later (error feedback). Downloads, and running averages of batch normalisation, are float32.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.method.depth_dropout import PER_ROUND
from lwfedssl_jax.method.task import Broadcast, weights_of
from lwfedssl_jax.tree import Tree

LARGEST_INT8 = 127
SECURE_SUM = "secure_sum="  # followed by the bits of a whole number (``privacy.to_integers``)


class Quantised(NamedTuple):
    """A tree of int8, and of a float32 scale for each matrix."""

    values: Tree
    scales: Tree


class Sparse(NamedTuple):
    """The largest values of an update, and their positions in all of its leaves one after the other.

    In stages that send fewer than the program has room for, the last ones are 0.
    """

    values: jax.Array
    positions: jax.Array


def share_of(compression: str) -> float | None:
    """Return the share of an update that is sent; None for other compressions.

    Raises:
      ConfigError: it is not valid.
    """
    name, _, text = compression.partition("=")
    if name != "top":
        if compression not in ("none", "int8"):
            raise ConfigError(f"federation.compression: unknown {compression!r}; accepted: none, int8, top=SHARE")
        return None
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise ConfigError(f"federation.compression: {compression!r} has no share; accepted: top=SHARE, above 0 to 1")
    return share


def check_compression(config: Config) -> None:
    """Refuse compressions that do not exist or cannot be priced.

    Raises:
      ConfigError: naming the field, the value and what is accepted.
    """
    compression, additions = config.federation.compression, config.additions
    share_of(compression)
    if compression != "none" and additions.depth_dropout and additions.depth_dropout_per == PER_ROUND:
        raise ConfigError(
            f"federation.compression: {compression} compresses whole updates, and with additions.depth_dropout_per "
            "round clients have different parts; accepted: none, or additions.depth_dropout_per step"
        )


def upload_bytes(compression: str, matrices: Sequence[int]) -> int:
    """Return the bytes of an update.

    Args:
      compression: as in ``federation.compression``, or of a secure sum ``SECURE_SUM`` and its bits.
      matrices: the number of parameters of each matrix.
    """
    size = sum(matrices)
    if compression.startswith(SECURE_SUM):
        return -(-size * int(compression.removeprefix(SECURE_SUM)) // 8)
    share = share_of(compression)
    if share is not None:
        kept = kept_of(share, size)
        return min(8 * kept, 4 * kept + -(-size // 8))
    return size + 4 * len(matrices) if compression == "int8" else 4 * size


def kept_of(share: float, size: int) -> int:
    """Return how many values of an update of ``size`` parameters are sent."""
    return min(size, math.ceil(np.float32(share) * np.float32(size)))


class Message(NamedTuple):
    """What a client sends of its model: its compressed update, and the running averages of batch normalisation."""

    update: Quantised | Sparse
    statistics: Tree


class Compression(NamedTuple):
    """How a client's model is sent.

    Attributes:
      pack: ``(key, broadcast, trained) -> message``, on the client.
      unpack: ``(broadcast, message) -> trained``, as the server has it.
    """

    pack: Callable[[jax.Array, Broadcast, Tree], Message]
    unpack: Callable[[Broadcast, Message], Tree]


def make_compression(config: Config) -> Compression | None:
    """Return how the clients of a config send their models; None if as they are."""
    compression = config.federation.compression
    if compression == "none":
        return None
    share = share_of(compression)

    def pack(key: jax.Array, broadcast: Broadcast, trained: Tree) -> Message:
        sent, present = weights_of(broadcast.trainable), weights_of(broadcast.present)
        update = jax.tree.map(jnp.subtract, weights_of(trained), sent)
        packed = quantise(key, update, present) if share is None else largest(update, present, share)
        return Message(packed, {k: v for k, v in trained.items() if k == "statistics"})

    def unpack(broadcast: Broadcast, message: Message) -> Tree:
        sent, update = weights_of(broadcast.trainable), message.update
        received = dequantise(update) if isinstance(update, Quantised) else scatter(update, sent)
        return jax.tree.map(jnp.add, sent, received) | message.statistics

    return Compression(pack, unpack)


def quantise(key: jax.Array, update: Tree, present: Tree) -> Quantised:
    """Round an update to 8 bits at random, up or down in proportion to the distance."""
    leaves, structure = jax.tree.flatten(update)
    keys = jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))

    def scale_of(x: jax.Array, has: jax.Array) -> jax.Array:
        axes = tuple(range(has.ndim, x.ndim))
        return jnp.abs(x).max(axes, keepdims=True).astype(jnp.float32) / LARGEST_INT8

    def leaf(key: jax.Array, x: jax.Array, scale: jax.Array) -> jax.Array:
        steps = x / jnp.where(scale > 0, scale, 1).astype(x.dtype)
        rounded = jnp.floor(steps + jax.random.uniform(key, x.shape, x.dtype))
        return rounded.clip(-LARGEST_INT8, LARGEST_INT8).astype(jnp.int8)

    scales = jax.tree.map(scale_of, update, present)
    return Quantised(jax.tree.map(leaf, keys, update, scales), scales)


def dequantise(message: Quantised) -> Tree:
    """Return the update that the server reads; not finite where a scale is not."""
    return jax.tree.map(lambda q, scale: q.astype(jnp.float32) * scale, message.values, message.scales)


def largest(update: Tree, present: Tree, share: float) -> Sparse:
    """Return the largest values of an update: that share of the parameters that are not idle."""
    masked = jax.tree.map(lambda x, has: jnp.where(_rows(has, x), x, 0), update, present)
    flat = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(masked)])
    sizes = jax.tree.map(lambda x, has: has.sum() * (x.size // max(has.size, 1)), update, present)
    size = jnp.stack(jax.tree.leaves(sizes)).sum().astype(jnp.float32)
    _, positions = jax.lax.top_k(jnp.abs(flat), kept_of(share, flat.size))
    is_sent = jnp.arange(len(positions)) < jnp.ceil(jnp.float32(share) * size).astype(jnp.int32)
    finite = jnp.isfinite(flat).all()  # where NaN stands among the largest is not defined
    return Sparse(jnp.where(finite, jnp.where(is_sent, flat[positions], 0), jnp.nan).astype(flat.dtype), positions)


def scatter(message: Sparse, like: Tree) -> Tree:
    """Return the update that the server reads, in the shapes of ``like``."""
    leaves, structure = jax.tree.flatten(like)
    flat = jnp.zeros(sum(x.size for x in leaves), message.values.dtype).at[message.positions].set(message.values)
    ends = np.cumsum([x.size for x in leaves])[:-1]
    parts: list[Any] = [part.reshape(x.shape) for part, x in zip(jnp.split(flat, ends), leaves, strict=True)]
    return jax.tree.unflatten(structure, parts)


def _rows(present: jax.Array, leaf: jax.Array) -> jax.Array:
    return jnp.expand_dims(present, tuple(range(present.ndim, leaf.ndim)))
