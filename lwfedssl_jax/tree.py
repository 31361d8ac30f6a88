"""Pytrees of parameters: taking and putting what a mask names, averages, bytes.

A mask has the parameters' structure. Its leaves are booleans, or, where a parameter is
stacked over layers, boolean vectors over that leading axis. Masks are NumPy values, so
they are static under ``jit``. What a mask leaves out is ``None``, which JAX treats as an
empty subtree.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Tree = Any  # a pytree; JAX has no static type for "same structure as"


def take(tree: Tree, mask: Tree) -> Tree:
    """The part of ``tree`` that ``mask`` names: rows of stacked leaves, ``None`` where nothing is left."""

    def leaf(m: np.ndarray, x: jax.Array) -> jax.Array | None:
        if not np.any(m):
            return None
        return x if np.all(m) else x[np.flatnonzero(m)]

    return jax.tree.map(leaf, mask, tree)


def put(tree: Tree, mask: Tree, part: Tree) -> Tree:
    """``tree`` with what ``mask`` names replaced by ``part``; the inverse of ``take``.

    All that the mask does not name is passed through untouched, bit for bit.
    """

    def leaf(m: np.ndarray, x: jax.Array, new: jax.Array | None) -> jax.Array:
        if new is None:
            return x
        return new if np.all(m) else x.at[np.flatnonzero(m)].set(new)

    return jax.tree.map(leaf, mask, tree, part)


def ema(target: Tree, online: Tree, momentum: float) -> Tree:
    """``momentum * target + (1 - momentum) * online``, exact where the two are equal."""
    return jax.tree.map(lambda t, o: t + (1 - momentum) * (o - t), target, online)


def where(condition: ArrayLike, if_true: Tree, if_false: Tree) -> Tree:
    """Leaf-wise ``jnp.where`` on one scalar condition."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), if_true, if_false)


def size(tree: Tree) -> int:
    """Number of elements over all leaves (arrays or their shapes)."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def nbytes(tree: Tree) -> int:
    """Bytes over all leaves (arrays or their shapes)."""
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
