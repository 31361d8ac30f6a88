"""Loops over layers and samples whose length is an argument of the program."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from lwfedssl_jax.models.encoder import Depth
from lwfedssl_jax.tree import Tree

CPU_CHUNK = 2**17  # elements of a block's widest activation that stay in a core's cache


def chunk_samples(elements: int) -> int | None:
    """Samples that go through a block at once, from the number of elements of one sample's widest activation.

    On a CPU as many as stay in a core's cache; elsewhere all of them (None).
    """
    return max(1, CPU_CHUNK // elements) if jax.default_backend() == "cpu" else None


def in_chunks(f: Callable[[jax.Array], jax.Array], x: jax.Array, chunk: int | None) -> jax.Array:
    """``f(x)`` for an ``f`` that treats samples (the first axis) one by one, about ``chunk`` at a time."""
    n = len(x)
    if chunk is None or chunk >= n:
        return f(x)
    size = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: max(d / chunk, chunk / d))
    return jax.lax.map(f, x.reshape(n // size, size, *x.shape[1:])).reshape(x.shape)


def row(params_L: Tree, i: Depth, order: jax.Array | None = None) -> Tree:
    """The ``i``-th layer to run: row i of each leaf, or row ``order[i]``."""
    at = i if order is None else order[i]
    return jax.tree.map(lambda p: p[at], params_L)


def dynamic_scan(
    f: Callable[[Tree, jax.Array], jax.Array],
) -> Callable[[Tree, jax.Array, Depth, jax.Array | None], jax.Array]:
    """``(params_L, x, depth, order) -> f(params[depth - 1], ... f(params[0], x))``, differentiable.

    JAX cannot reverse a loop of traced length. Here what each step's pullback has saved goes
    into a buffer of L rows, and the backward pass loops over them. Rows that are not run get
    zero gradients. ``x`` must keep its shape.

    A pullback (what ``jax.vjp`` returns) is a pytree: its leaves are the arrays it has saved, its
    structure is the same for every step. Leaves that are parameters are not saved again, but
    taken from ``params_L`` when the pullback is put together for the backward pass.
    """

    def forward(params_L: Tree, x: jax.Array, depth: Depth, order: jax.Array | None = None) -> tuple[jax.Array, Tree]:
        form: list[tuple[Any, list[int | None]]] = []  # of the pullback: structure, which parameter a leaf is

        def with_saved(params: Tree, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            x, pullback = jax.vjp(f, params, x)
            leaves, structure = jax.tree.flatten(pullback)
            known = jax.tree.leaves(params)
            source = [next((j for j, p in enumerate(known) if p is leaf), None) for leaf in leaves]
            form.append((structure, source))
            return x, [leaf for leaf, j in zip(leaves, source, strict=True) if j is None]

        def step(i: jax.Array, carry: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
            x, saved_L = carry
            x, saved = with_saved(row(params_L, i, order), x)
            return x, [all_.at[i].set(one) for all_, one in zip(saved_L, saved, strict=True)]

        length = len(jax.tree.leaves(params_L)[0])
        shapes = jax.eval_shape(lambda p, x: with_saved(row(p, 0), x)[1], params_L, x)
        buffers = [jnp.zeros((length, *s.shape), s.dtype) for s in shapes]
        x, saved_L = jax.lax.fori_loop(0, depth, step, (x, buffers))
        return x, jax.tree_util.Partial(functools.partial(pull, *form[0]), params_L, saved_L, order)

    def pull(
        structure: Any,
        source: list[int | None],
        params_L: Tree,
        saved_L: list[jax.Array],
        order: jax.Array | None,
        i: Depth,
        g: jax.Array,
    ) -> tuple[Tree, jax.Array]:
        known, saved = jax.tree.leaves(row(params_L, i, order)), iter(row(saved_L, i))
        pullback = jax.tree.unflatten(structure, [next(saved) if j is None else known[j] for j in source])
        return cast(tuple[Tree, jax.Array], pullback(g))

    def backward(depth: Depth, pull_row: Any, g: jax.Array) -> tuple[Tree, jax.Array]:
        params_L, _, order = pull_row.args

        def step(i: Depth, carry: tuple[Tree, jax.Array]) -> tuple[Tree, jax.Array]:
            grads_L, g = carry
            grads, g = pull_row(depth - 1 - i, g)
            at = depth - 1 - i if order is None else order[depth - 1 - i]
            return jax.tree.map(lambda all_, one: all_.at[at].set(one), grads_L, grads), g

        return jax.lax.fori_loop(0, depth, step, (jax.tree.map(jnp.zeros_like, params_L), g))

    def run(params_L: Tree, x: jax.Array, depth: Depth, order: jax.Array | None = None) -> jax.Array:
        return forward(params_L, x, depth, order)[0]

    def traced_forward(
        params_L: Tree, x: jax.Array, depth: jax.Array, order: jax.Array | None
    ) -> tuple[jax.Array, tuple[jax.Array, Tree]]:
        x, saved = forward(params_L, x, depth, order)
        return x, (depth, saved)

    def traced_backward(saved: tuple[jax.Array, Tree], g: jax.Array) -> tuple[Tree, jax.Array, None, None]:
        return *backward(*saved, g), None, None

    # A depth known when traced stays known, for the loops' lengths to be counted (resources.py).
    known = jax.custom_vjp(lambda params_L, x, depth: run(params_L, x, depth), nondiff_argnums=(2,))
    known.defvjp(forward, backward)
    traced = jax.custom_vjp(run)
    traced.defvjp(traced_forward, traced_backward)

    def scan(params_L: Tree, x: jax.Array, depth: Depth, order: jax.Array | None) -> jax.Array:
        if isinstance(depth, int) and order is None:
            return known(params_L, x, depth)
        return traced(params_L, x, jnp.asarray(depth), order)

    return scan
