"""The encoder and the heads against independent NumPy, and how the encoder splits."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from jax.flatten_util import ravel_pytree

from lwfedssl_jax import tree
from lwfedssl_jax.config import ModelConfig
from lwfedssl_jax.costs import operations
from lwfedssl_jax.models import attention
from lwfedssl_jax.models.dense import contract
from lwfedssl_jax.models.encoder import EVERY_STAGE, Depth, Encoder
from lwfedssl_jax.models.heads import mlp_head
from lwfedssl_jax.models.loops import in_chunks, with_row
from lwfedssl_jax.models.vit import Block, Embedding, LayerNorm, layer_norm, vit

CONFIG = ModelConfig(name="vit_micro", patch_size=4, width=12, depth=3, heads=3)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 3)), jnp.float32)


def make(**options: bool) -> tuple[Encoder, tree.Tree]:
    encoder = vit(CONFIG, (8, 8, 3), jnp.float32, **options)
    params = jax.jit(encoder.init)(jax.random.key(0))
    # Away from the neutral initial values of biases and norms, so that each of them counts.
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return encoder, jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(keys), x.shape), params)


def forward(encoder: Encoder, trainable: tree.Tree, x: jax.Array, depth: Depth) -> jax.Array:
    return encoder.trainable_forward(trainable, x, jnp.ones(len(x), bool), depth, None)[0]


def numpy_vit(p: tree.Tree, images: np.ndarray) -> np.ndarray:
    def norm(x: np.ndarray, q: tree.Tree) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * q["scale"] + q["bias"]

    def dense(x: np.ndarray, q: tree.Tree) -> np.ndarray:
        return x @ q["kernel"] + q["bias"]

    features = []
    for image in images:
        patches = [image[i : i + 4, j : j + 4].reshape(-1) for i in (0, 4) for j in (0, 4)]
        x = dense(np.stack(patches), p["embedding"]["patch"]) + p["embedding"]["position"]
        for layer in range(CONFIG.depth):
            b = jax.tree.map(lambda v, i=layer: v[i], p["blocks"])
            q, k, v = np.split(dense(norm(x, b["norm1"]), b["qkv"]), 3, axis=-1)
            mixed = []
            for h in range(CONFIG.heads):
                columns = slice(h * 4, h * 4 + 4)
                weights = scipy.special.softmax(q[:, columns] @ k[:, columns].T / np.sqrt(4), axis=-1)
                mixed.append(weights @ v[:, columns])
            x = x + dense(np.concatenate(mixed, -1), b["proj"])
            hidden = dense(norm(x, b["norm2"]), b["fc1"])
            x = x + dense(hidden * 0.5 * (1 + scipy.special.erf(hidden / np.sqrt(2))), b["fc2"])
        features.append(norm(x, p["norm"]).mean(axis=0))
    return np.stack(features)


def test_vit_equals_numpy() -> None:
    encoder, params = make()
    expected = numpy_vit(jax.tree.map(np.asarray, params["encoder"]), np.asarray(IMAGES))
    np.testing.assert_allclose(forward(encoder, params, IMAGES, CONFIG.depth), expected, atol=1e-5)


@pytest.mark.parametrize("frozen_layers", [1, 2, 3])
def test_frozen_and_trainable_parts_make_the_whole(frozen_layers: int) -> None:
    encoder, params = make()
    layers = encoder.layers(params)
    frozen = jax.tree.map(lambda n: (n != EVERY_STAGE) & (n <= frozen_layers), layers)
    rest = jax.tree.map(np.logical_not, frozen)
    x = encoder.frozen_forward(tree.take(params, tree.rows(frozen)), IMAGES, frozen_layers, None)
    whole = forward(encoder, params, IMAGES, CONFIG.depth)
    np.testing.assert_allclose(
        forward(encoder, tree.take(params, tree.rows(rest)), x, 3 - frozen_layers), whole, atol=1e-5
    )


@pytest.mark.parametrize("remat", [False, True])
def test_depth_may_be_traced_and_idle_rows_get_no_gradient(remat: bool) -> None:
    """Values and gradients of the first two blocks, with the third idle, against a program of two blocks."""
    encoder, params = make(remat=remat)
    loss = lambda p, depth: (forward(encoder, p, IMAGES, depth) ** 2).sum()  # noqa: E731
    two = params["encoder"] | {"blocks": jax.tree.map(lambda x: x[:2], params["encoder"]["blocks"])}

    def plain_loss(p: tree.Tree) -> jax.Array:
        x = IMAGES
        block = Block(CONFIG.heads, jnp.float32, jnp.float32)
        x = Embedding(4, 12, jnp.float32, jnp.float32, 4).apply({"params": p["embedding"]}, x)
        for i in range(2):
            x = block.apply({"params": jax.tree.map(lambda v, i=i: v[i], p["blocks"])}, x)
        return (LayerNorm(jnp.float32).apply({"params": p["norm"]}, x).mean(axis=1) ** 2).sum()

    value, expected = jax.value_and_grad(plain_loss)(two)
    for depth in (2, jnp.int32(2)):
        found, grads = jax.jit(jax.value_and_grad(lambda p, d=depth: loss(p, d)))(params)
        grads = grads["encoder"]
        np.testing.assert_allclose(found, value, rtol=1e-5)
        assert max(float(jnp.abs(x[2]).max()) for x in jax.tree.leaves(grads["blocks"])) == 0
        grads["blocks"] = jax.tree.map(lambda x: x[:2], grads["blocks"])
        chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("samples", "chunk", "size"), [(64, 8, 8), (62, 8, 31), (6, 8, 6), (7, 2, 1), (12, 5, 6)])
def test_chunks_are_near_the_asked_size_and_change_nothing(samples: int, chunk: int, size: int) -> None:
    x = jnp.arange(samples * 3.0).reshape(samples, 3)
    seen = []

    def double(x: jax.Array) -> jax.Array:
        seen.append(len(x))
        return 2 * x

    np.testing.assert_array_equal(in_chunks(double, x, chunk), 2 * x)
    assert seen[0] == size


def test_bfloat16_products_are_summed_in_float32_both_ways() -> None:
    a, b = (jnp.asarray(np.random.default_rng(i).normal(size=(64, 64)), jnp.float32) for i in (0, 1))
    exact = lambda a, b: ((a @ b) ** 2).sum()  # noqa: E731
    narrow = lambda a, b: (contract("ij,jk->ik", jnp.bfloat16, a, b) ** 2).sum()  # noqa: E731
    for want, found in zip(jax.grad(exact, (0, 1))(a, b), jax.grad(narrow, (0, 1))(a, b), strict=True):
        assert found.dtype == jnp.float32
        assert float((want * found).sum() / jnp.linalg.norm(want) / jnp.linalg.norm(found)) > 0.999
    traced = str(jax.make_jaxpr(jax.grad(narrow, (0, 1)))(a, b))
    assert traced.count("dot_general") == traced.count("preferred_element_type=float32") == 3


def test_remat_recomputes_each_block_and_changes_no_result() -> None:
    plain, params = make()
    remat, _ = make(remat=True)
    loss = lambda encoder: lambda p: (forward(encoder, p, IMAGES, 3) ** 2).sum()  # noqa: E731
    a, b = jax.grad(loss(plain))(params), jax.grad(loss(remat))(params)
    chex.assert_trees_all_close(a, b, rtol=1e-4, atol=1e-5)
    once = operations.count(jax.make_jaxpr(loss(plain))(params))
    of_plain, of_remat = (operations.count(jax.make_jaxpr(jax.grad(loss(e)))(params)) for e in (plain, remat))
    embedding = 2 * 4 * 48 * 12
    assert of_plain == 3 * once - embedding  # nothing asks for the gradient of the images
    # The block's last product is not needed for its gradient.
    assert of_plain < of_remat < of_plain + once


def test_bfloat16_computes_near_float32_with_float32_parameters() -> None:
    encoder, params = make()
    half = vit(CONFIG, (8, 8, 3), jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(jax.jit(half.init)(jax.random.key(0)))} == {jnp.dtype(jnp.float32)}
    features = forward(half, params, IMAGES, CONFIG.depth)
    assert features.dtype == jnp.float32
    np.testing.assert_allclose(
        features.astype(jnp.float32), forward(encoder, params, IMAGES, CONFIG.depth), rtol=0.1, atol=0.1
    )


def test_bfloat16_halves_what_the_backward_pass_keeps_and_gradients_stay_near() -> None:
    _, params = make()
    images, kept, grads = jnp.tile(IMAGES, (8, 1, 1, 1)), [], []
    for dtype in (jnp.float32, jnp.bfloat16):
        encoder = vit(CONFIG, (8, 8, 3), dtype)
        features, pullback = jax.vjp(lambda p, e=encoder: forward(e, p, images, CONFIG.depth), params)
        of_all_layers = (x for x in jax.tree.leaves(pullback) if x.ndim and len(x) == CONFIG.depth)
        kept.append(sum(x.nbytes for x in of_all_layers if not any(x is known for known in jax.tree.leaves(params))))
        grads.append(ravel_pytree(pullback(features)[0])[0])
    assert kept[1] < 0.6 * kept[0]
    assert float(grads[0] @ grads[1] / jnp.linalg.norm(grads[0]) / jnp.linalg.norm(grads[1])) > 0.98


def test_a_fused_kernel_of_attention_changes_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's takes the place of this one of the same signature."""
    qkv = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 3, 3, 4)), jnp.float32)
    loss = lambda qkv: (attention.attention(qkv, jnp.float32) ** 3).sum()  # noqa: E731
    plain = jax.value_and_grad(loss)(qkv)
    monkeypatch.setattr(attention, "has_fused_attention", lambda dtype, tokens, features: True)
    monkeypatch.setattr(attention, "fused", jax.nn.dot_product_attention)
    chex.assert_trees_all_close(plain, jax.value_and_grad(loss)(qkv), rtol=1e-4, atol=1e-5)


def test_without_a_gpu_there_is_no_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not attention.has_fused_attention(jnp.dtype("bfloat16"), 8, 16)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # one on which cuDNN's does not run
    assert not attention.has_fused_attention(jnp.dtype("bfloat16"), 8, 24)


@pytest.mark.parametrize("batched", [which for which in itertools.product([True, False], repeat=3) if any(which)])
def test_a_row_is_written_in_place_in_every_lane(batched: tuple[bool, bool, bool]) -> None:
    rng = np.random.default_rng(0)
    rows, one = rng.normal(size=(3, 2, 5, 4)), rng.normal(size=(3, 2, 4))
    given = [x if b else x[0] for x, b in zip((rows, one, np.array([0, 4, 2])), batched, strict=True)]
    axes = [0 if b else None for b in batched]
    inner = jax.vmap(with_row, (0, 0, None))  # lanes of stacked runs
    found = jax.vmap(inner, axes)(*given)
    expected = jax.vmap(jax.vmap(lambda rows, one, i: rows.at[i].set(one), (0, 0, None)), axes)(*given)
    np.testing.assert_array_equal(found, expected)
    text = str(jax.make_jaxpr(jax.vmap(inner, axes))(*given))
    assert ("scatter" in text) == batched[2]


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (3.0, 0.2), (100.0, 2.0)])
def test_layer_norm_of_large_means(mean: float, std: float) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(mean, std, (4, 192)), jnp.float32)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer_norm(x, jnp.ones(192), jnp.zeros(192)), expected, atol=1e-3)


def test_layers_start_from_different_values() -> None:
    encoder = vit(CONFIG, (8, 8, 3), jnp.float32)
    kernels = jax.jit(encoder.init)(jax.random.key(0))["encoder"]["blocks"]["qkv"]["kernel"]
    assert float(jnp.abs(kernels[0] - kernels[1]).max()) > 0.01


@pytest.mark.parametrize("layers", [2, 3])
def test_head_normalises_over_real_samples_only(layers: int) -> None:
    head = mlp_head(layers, 5, 7, 4, jnp.float32)
    params = jax.device_get(head.init(jax.random.key(0)))
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    x[4:] = 1e3
    z = x[:4]
    for i in range(layers - 1):
        z = z @ params[f"Dense_{i}"]["kernel"]
        norm = params[f"BatchNorm_{i}"]
        z = np.maximum((z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) * norm["scale"] + norm["bias"], 0)
    z = z @ params[f"Dense_{layers - 1}"]["kernel"]
    np.testing.assert_allclose(head.apply(params, jnp.asarray(x), jnp.arange(6) < 4)[:4], z, rtol=1e-3, atol=1e-4)
