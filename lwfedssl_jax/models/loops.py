"""Loops over layers and samples whose length is an argument of the program."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from lwfedssl_jax.models.encoder import Depth
from lwfedssl_jax.tree import Tree

CPU_CHUNK = 2**17  # elements of a block's widest activation that stay in a core's cache


def chunk_samples(elements: int) -> int | None:
    """How many samples go through a block at once; None for all of them.

    On a CPU their activations are to stay in a core's cache.

    Args:
      elements: of one sample's widest activation.
    """
    return max(1, CPU_CHUNK // elements) if jax.default_backend() == "cpu" else None


def in_chunks(f: Callable[[jax.Array], jax.Array], x: jax.Array, chunk: int | None) -> jax.Array:
    """``f(x)``, about ``chunk`` samples (rows of ``x``) at a time; ``f`` must treat samples independently."""
    n = len(x)
    if chunk is None or chunk >= n:
        return f(x)
    size = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: max(d / chunk, chunk / d))
    return jax.lax.map(f, x.reshape(n // size, size, *x.shape[1:])).reshape(x.shape)


def row(params_L: Tree, i: Depth, order: jax.Array | None = None) -> Tree:
    """The ``i``-th layer to run: row i of each leaf, or row ``order[i]``."""
    at = i if order is None else order[i]
    return jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, at, keepdims=False), params_L)


def with_row(rows: jax.Array, one: jax.Array, i: Depth, axis: int = 0) -> jax.Array:
    """``rows`` with ``one`` as the i-th along an axis, in place inside of a loop.

    JAX's own rule for ``vmap`` makes a scatter of it, even if all write the same row: that reads the old row as well.
    """

    def write(rows: jax.Array, one: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(rows, one, i, axis)

    def over_lanes(
        size: int, batched: list[bool], rows: jax.Array, one: jax.Array, i: jax.Array
    ) -> tuple[jax.Array, bool]:
        if batched[2]:
            return jax.vmap(write, [0 if b else None for b in batched])(rows, one, i), True
        rows, one = (
            x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip((rows, one), batched[:2], strict=True)
        )
        return with_row(rows, one, i, axis + 1), True

    in_place = jax.custom_batching.custom_vmap(write)
    in_place.def_vmap(over_lanes)
    return in_place(rows, one, jnp.asarray(i))


LayerFunction = Callable[[Tree, jax.Array], jax.Array]  # ``(params, x) -> x`` of the same shape


class PullbackForm(NamedTuple):
    """What is static in the pullback of a step: the same for every row.

    Attributes:
      structure: of the pullback as a pytree.
      sources: for each of its leaves, the number of the parameter that it is, or None if it is saved.
    """

    structure: Any
    sources: tuple[int | None, ...]


class SavedSteps(NamedTuple):
    """What the backward pass needs of the steps that have run.

    Attributes:
      params_L: all parameters.
      saved_L: what each step's pullback has saved in addition to them, in the order of the steps.
      order: see ``row``.
    """

    params_L: Tree
    saved_L: list[jax.Array]
    order: jax.Array | None


def dynamic_scan(f: LayerFunction) -> Callable[[Tree, jax.Array, Depth, jax.Array | None], jax.Array]:
    """``(params_L, x, depth, order) -> f(params[depth - 1], ... f(params[0], x))``, differentiable.

    JAX cannot reverse a loop whose length is traced. Here each step's pullback is saved in buffers of L rows, and the
    backward pass loops over them. Rows that are not run get zero gradients. ``x`` must keep its shape.
    """

    def run(params_L: Tree, x: jax.Array, depth: Depth, order: jax.Array | None) -> jax.Array:
        return run_forward(f, params_L, x, depth, order)[0]

    def known_forward(params_L: Tree, x: jax.Array, depth: int) -> tuple[jax.Array, Tree]:
        return run_forward(f, params_L, x, depth, None)

    def traced_forward(params_L: Tree, x: jax.Array, depth: jax.Array, order: jax.Array | None) -> tuple[Any, Any]:
        x, pull_step = run_forward(f, params_L, x, depth, order)
        return x, (depth, pull_step)

    def traced_backward(saved: tuple[jax.Array, Any], g: jax.Array) -> tuple[Tree, jax.Array, None, None]:
        return *run_backward(*saved, g), None, None

    # A depth that is known when traced stays known, so that the loops' lengths can be counted (costs/operations.py).
    known = jax.custom_vjp(lambda params_L, x, depth: run(params_L, x, depth, None), nondiff_argnums=(2,))
    known.defvjp(known_forward, run_backward)
    traced = jax.custom_vjp(run)
    traced.defvjp(traced_forward, traced_backward)

    def scan(params_L: Tree, x: jax.Array, depth: Depth, order: jax.Array | None) -> jax.Array:
        is_counted = isinstance(depth, int) and depth != 1  # whatever the number of rows (costs/operations.py)
        if order is None and len(jax.tree.leaves(params_L)[0]) == 1 and not is_counted:  # a stage has at least a layer
            return f(row(params_L, 0), x)
        if isinstance(depth, int) and order is None:
            return known(params_L, x, depth)
        return traced(params_L, x, jnp.asarray(depth), order)

    return scan


def run_forward(
    f: LayerFunction, params_L: Tree, x: jax.Array, depth: Depth, order: jax.Array | None
) -> tuple[jax.Array, jax.tree_util.Partial]:
    """Run the first ``depth`` rows of ``order``.

    Returns:
      The result, and ``(i, g) -> (gradients of the row's parameters, g)``, the pullback of step i.
    """
    forms: list[PullbackForm] = []

    def save(params: Tree, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        x, saved, form = save_pullback(f, params, x)
        forms.append(form)
        return x, saved

    def step(i: jax.Array, carry: tuple[jax.Array, list[jax.Array]]) -> tuple[jax.Array, list[jax.Array]]:
        x, saved_L = carry
        x, saved = save(row(params_L, i, order), x)
        return x, [with_row(all_, one, i) for all_, one in zip(saved_L, saved, strict=True)]

    length = len(jax.tree.leaves(params_L)[0])
    shapes = jax.eval_shape(lambda p, x: save(row(p, 0), x)[1], params_L, x)
    buffers = [jnp.zeros((length, *s.shape), s.dtype) for s in shapes]
    x, saved_L = jax.lax.fori_loop(0, depth, step, (x, buffers))
    saved_steps = SavedSteps(params_L, saved_L, order)
    return x, jax.tree_util.Partial(functools.partial(pull_step, forms[0]), saved_steps)


def run_backward(depth: Depth, pull: jax.tree_util.Partial, g: jax.Array) -> tuple[Tree, jax.Array]:
    """Gradients of all rows of the parameters, zero for rows that did not run, and of ``x``.

    Args:
      depth: how many steps have run.
      pull: from ``run_forward``.
      g: gradient of its result.
    """
    (saved,) = pull.args

    def step(i: Depth, carry: tuple[Tree, jax.Array]) -> tuple[Tree, jax.Array]:
        grads_L, g = carry
        grads, g = pull(depth - 1 - i, g)
        at = depth - 1 - i if saved.order is None else saved.order[depth - 1 - i]
        return jax.tree.map(lambda all_, one: with_row(all_, one, at), grads_L, grads), g

    return jax.lax.fori_loop(0, depth, step, (jax.tree.map(jnp.zeros_like, saved.params_L), g))


def save_pullback(f: LayerFunction, params: Tree, x: jax.Array) -> tuple[jax.Array, list[jax.Array], PullbackForm]:
    """``f(params, x)``, and its pullback as arrays to save and a static form.

    A pullback (what ``jax.vjp`` returns) is a pytree: its leaves are the arrays it has saved. Leaves that are
    parameters are not saved again.
    """
    x, pullback = jax.vjp(f, params, x)
    leaves, structure = jax.tree.flatten(pullback)
    known = jax.tree.leaves(params)
    sources = tuple(next((j for j, p in enumerate(known) if p is leaf), None) for leaf in leaves)
    saved = [leaf for leaf, j in zip(leaves, sources, strict=True) if j is None]
    return x, saved, PullbackForm(structure, sources)


def pull_step(form: PullbackForm, steps: SavedSteps, i: Depth, g: jax.Array) -> tuple[Tree, jax.Array]:
    """Apply the pullback of step i, from what ``save_pullback`` gave for it."""
    known, saved = jax.tree.leaves(row(steps.params_L, i, steps.order)), iter(row(steps.saved_L, i))
    pullback = jax.tree.unflatten(form.structure, [next(saved) if j is None else known[j] for j in form.sources])
    return cast(tuple[Tree, jax.Array], pullback(g))
