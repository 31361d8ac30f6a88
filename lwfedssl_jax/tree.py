"""Pytrees of parameters: taking and putting what a mask names, averages, bytes.

A mask has the parameters' structure. Its leaves are booleans, or, where a parameter is
stacked over layers, boolean vectors over that leading axis. ``rows`` turns it into
indices, whose shapes alone decide which program runs: equal shapes share one. What a mask
leaves out is ``None``, which JAX treats as an empty subtree.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Tree = Any  # a pytree; JAX has no static type for "same structure as"


def rows(mask: Tree, length: int | None = None) -> Tree:
    """Where the leaves that ``mask`` names are, for ``take`` and ``put``; plain data, which may be traced.

    A named leaf becomes 0; a stacked one the indices of its named rows, filled up to ``length``
    with one past the last row; a leaf without any becomes None.
    """

    def leaf(m: np.ndarray) -> np.ndarray | None:
        if not np.any(m):
            return None
        if not np.ndim(m):
            return np.zeros((), np.int32)
        named = np.flatnonzero(m)
        return np.pad(named, (0, (length or len(named)) - len(named)), constant_values=len(m)).astype(np.int32)

    return jax.tree.map(leaf, mask)


def take(tree: Tree, where: Tree) -> Tree:
    """The part of ``tree`` that ``where`` (from ``rows``) names; rows past the end repeat the last one."""

    def leaf(at: jax.Array | None, x: jax.Array) -> jax.Array | None:
        if at is None:
            return None
        return jnp.take(x, at, axis=0, mode="clip") if at.ndim else x

    return jax.tree.map(leaf, where, tree, is_leaf=lambda at: at is None)


def put(tree: Tree, where: Tree, part: Tree) -> Tree:
    """``tree`` with what ``where`` names replaced by ``part``; the inverse of ``take``.

    All else is passed through untouched, bit for bit; what ``part`` has for rows past the end
    is dropped.
    """

    def leaf(at: jax.Array | None, x: jax.Array, new: jax.Array | None) -> jax.Array | None:
        if at is None:
            return x
        return x.at[at].set(new, mode="drop") if at.ndim else new

    return jax.tree.map(leaf, where, tree, part, is_leaf=lambda at: at is None)


def present(tree: Tree, where: Tree) -> Tree:
    """For each leaf of ``take(tree, where)``: True, or a vector of which of its rows are not past the end."""

    def leaf(at: jax.Array | None, x: jax.Array) -> jax.Array | None:
        if at is None:
            return None
        return at < len(x) if at.ndim else jnp.array(True)

    return jax.tree.map(leaf, where, tree, is_leaf=lambda at: at is None)


def ema(target: Tree, online: Tree, momentum: ArrayLike) -> Tree:
    """``momentum * target + (1 - momentum) * online``, exact where the two are equal."""
    return jax.tree.map(lambda t, o: t + (1 - momentum) * (o - t), target, online)


def where(condition: ArrayLike, if_true: Tree, if_false: Tree) -> Tree:
    """Leaf-wise ``jnp.where`` on one scalar condition."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true, if_false)


def stack(trees: Sequence[Tree]) -> Tree:
    """Trees of host arrays as one with a leading axis over them."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def size(tree: Tree) -> int:
    """Number of elements over all leaves (arrays or their shapes)."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """Bytes over all leaves (arrays or their shapes)."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
