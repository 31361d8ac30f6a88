"""Vision transformer with stacked blocks, split into a frozen and a trainable part.

Pre-norm blocks, learned position embedding, tokens mean-pooled, no class token
(arXiv 2401.11647 on ViT-Tiny). Layer 1 owns the patch and position embedding;
the final normalisation belongs to no layer and is trained in every stage.

How many of the stacked blocks run is an argument, so one program serves all stages.
"""

import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lwfedssl_jax.config import ModelConfig
from lwfedssl_jax.models.dense import XAVIER, Dense, contract
from lwfedssl_jax.models.encoder import EVERY_STAGE, Depth, Encoder
from lwfedssl_jax.tree import Tree

CPU_CHUNK = 2**17  # elements of a block's widest activation that stay in a core's cache


@jax.jit  # the name marks it for the operation count in resources.py; XLA inlines it
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """``(x - mean) / sqrt(var + 1e-6) * scale + bias`` over the last axis."""
    # The variance in two passes: E[x^2] - E[x]^2 cancels where the mean is large.
    x = jax.nn.standardize(x, axis=-1, epsilon=1e-6, variance=x.var(-1, keepdims=True))
    return x * jnp.broadcast_to(scale, x.shape) + jnp.broadcast_to(bias, x.shape)


class LayerNorm(nn.Module):
    """Layer normalisation with learned scale and bias."""

    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        return layer_norm(x, scale, bias)


class Embedding(nn.Module):
    """Images to tokens: patch embedding as reshape and matrix product, plus positions."""

    patch_size: int
    width: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, images_BxHxWxC: jax.Array) -> jax.Array:
        b, h, w, c = images_BxHxWxC.shape
        p = self.patch_size
        x = images_BxHxWxC.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
        x = x.reshape(-1, p * p * c)
        position_PxD = self.param(
            "position", nn.initializers.normal(0.02), (h * w // p**2, self.width), self.param_dtype
        )
        dense = Dense(self.width, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=XAVIER, name="patch")
        return dense(x).reshape(b, -1, self.width) + position_PxD[None]


class Block(nn.Module):
    """Pre-norm transformer block: attention and a 4x MLP with exact GELU, both residual.

    Matrix products run on flattened tokens: the weight gradient of a rank-3 product is
    several times slower on a CPU.
    """

    heads: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BxPxD: jax.Array) -> jax.Array:
        b, p, d = x_BxPxD.shape
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype, "kernel_init": XAVIER}
        norm = functools.partial(LayerNorm, self.param_dtype)
        x = x_BxPxD.reshape(b * p, d)

        qkv = Dense(3 * d, name="qkv", **types)(norm(name="norm1")(x))
        q, k, v = qkv.reshape(b, p, 3, self.heads, d // self.heads).transpose(2, 0, 3, 1, 4)
        scores = contract("bhqd,bhkd->bhqk", self.dtype, q * (d // self.heads) ** -0.5, k)
        # Softmax with its division last, where there are fewest numbers to divide.
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        mixed = contract("bhqk,bhkd->bhqd", self.dtype, weights, v) / weights.sum(-1, keepdims=True)
        mixed = mixed.transpose(0, 2, 1, 3).reshape(b * p, d)
        x = x + Dense(d, name="proj", **types)(mixed)

        hidden = Dense(4 * d, name="fc1", **types)(norm(name="norm2")(x))
        x = x + Dense(d, name="fc2", **types)(gelu(hidden))
        return x.reshape(b, p, d)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, ``x * Phi(x)``; flax's goes through erfc, twice the work on a CPU."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


def vit(config: ModelConfig, image_shape: tuple[int, int, int], dtype: DTypeLike, *, remat: bool = False) -> Encoder:
    """A vision transformer of the config's size for images of shape (H, W, C).

    Args:
      config: resolved sizes (no zeros).
      image_shape: height, width, channels.
      dtype: of the matrix products' factors; everything else is in it or in float32, if that is wider.
      remat: keep only each trainable block's input for the backward pass and recompute the
        rest; otherwise all matrix products are kept, and only what lies between is recomputed.
    """
    wide = np.promote_types(dtype, jnp.float32)
    tokens = image_shape[0] * image_shape[1] // config.patch_size**2
    embedding = Embedding(config.patch_size, config.width, dtype, wide)
    block = Block(config.heads, dtype, wide)
    norm = LayerNorm(wide)

    def init(key: jax.Array) -> Tree:
        image, x = jnp.zeros((1, *image_shape), wide), jnp.zeros((1, tokens, config.width), wide)
        embedding_key, blocks_key, norm_key = jax.random.split(key, 3)
        weights = {
            "embedding": embedding.init(embedding_key, image)["params"],
            "blocks": jax.vmap(lambda k: block.init(k, x)["params"])(jax.random.split(blocks_key, config.depth)),
            "norm": norm.init(norm_key, x)["params"],
        }
        return {"encoder": weights, "statistics": {}}

    def layers(params: Tree) -> Tree:
        numbers = {"embedding": np.array(1), "blocks": np.arange(1, config.depth + 1), "norm": np.array(EVERY_STAGE)}
        weights = {part: jax.tree.map(lambda _, n=n: n, params["encoder"][part]) for part, n in numbers.items()}
        return {"encoder": weights, "statistics": {}}

    def apply(module: nn.Module, params: Tree, x: jax.Array) -> jax.Array:
        return cast(jax.Array, module.apply({"params": params}, x))

    policy = None if remat else jax.checkpoint_policies.dots_saveable
    run_block = jax.checkpoint(functools.partial(apply, block), policy=policy)
    chunk = chunk_samples(tokens * 4 * config.width)
    run_trainable = dynamic_scan(lambda params, x: in_chunks(functools.partial(run_block, params), x, chunk))

    def frozen_forward(frozen: Tree, images: jax.Array, depth: Depth, order: jax.Array | None = None) -> jax.Array:
        weights = frozen["encoder"]
        if not jax.tree.leaves(weights):
            return images

        def through(x: jax.Array) -> jax.Array:
            return jax.lax.fori_loop(0, depth, lambda i, x: apply(block, row(weights["blocks"], i, order), x), x)

        return in_chunks(through, apply(embedding, weights["embedding"], images), chunk)

    def trainable_forward(
        trainable: Tree, x: jax.Array, mask_B: jax.Array, depth: Depth, order: jax.Array | None = None
    ) -> tuple[jax.Array, Tree]:
        del mask_B  # samples do not see each other
        weights = trainable["encoder"]
        if jax.tree.leaves(weights["embedding"]):
            x = apply(embedding, weights["embedding"], x)
        if jax.tree.leaves(weights["blocks"]):
            x = run_trainable(weights["blocks"], x, depth, order)
        return apply(norm, weights["norm"], x).mean(axis=1), {}

    return Encoder(init, layers, frozen_forward, trainable_forward, config.width)


def chunk_samples(elements: int) -> int | None:
    """Samples that go through a block at once, if one sample's widest activation has so many elements.

    On a CPU so many that they stay in a core's cache; elsewhere all of them (None).
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
