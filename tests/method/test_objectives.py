"""Losses against independent NumPy, and what masks must do."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lwfedssl_jax.method.objectives import OBJECTIVES

B, REAL, D, T = 5, 3, 4, 0.3


def embeddings(seed: int, b: int = B) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(2, b, D)).astype(np.float32)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def numpy_simclr(z: np.ndarray, _: np.ndarray) -> float:
    z1, z2 = unit(z)
    n, total = len(z1), 0.0
    every = np.concatenate([z1, z2])
    for i in range(2 * n):
        similarities = np.exp(every @ every[i] / T)
        positive = np.exp(every[(i + n) % (2 * n)] @ every[i] / T)
        total += -np.log(positive / (similarities.sum() - similarities[i]))
    return total / (2 * n)


def numpy_mocov3(q: np.ndarray, k: np.ndarray) -> float:
    (q1, q2), (k1, k2) = unit(q), unit(k)

    def nce(q: np.ndarray, k: np.ndarray) -> float:
        p = np.exp(q @ k.T / T)
        return float(np.mean(-np.log(np.diag(p) / p.sum(axis=1))))

    return nce(q1, k2) + nce(q2, k1)


def numpy_byol(q: np.ndarray, k: np.ndarray) -> float:
    (q1, q2), (k1, k2) = unit(q), unit(k)
    return float(np.mean(np.sum((q1 - k2) ** 2, -1) + np.sum((q2 - k1) ** 2, -1)))


NUMPY = {"simclr": numpy_simclr, "mocov3": numpy_mocov3, "byol": numpy_byol}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_numpy(name: str) -> None:
    q, k = embeddings(0), embeddings(1)
    loss = OBJECTIVES[name].loss(jnp.asarray(q), jnp.asarray(k), jnp.ones(B, bool), T)
    assert float(loss) == pytest.approx(NUMPY[name](q, k), rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_counts_for_nothing(name: str) -> None:
    """Loss and gradient are those of the real samples alone, whatever the padding holds."""
    q, k = embeddings(0), embeddings(1)
    mask = jnp.arange(B) < REAL
    q[:, REAL:], k[:, REAL:] = 1e3, -1e3
    q[:, -1] = 0
    loss, grad = jax.value_and_grad(OBJECTIVES[name].loss)(jnp.asarray(q), jnp.asarray(k), mask, T)
    assert float(loss) == pytest.approx(NUMPY[name](q[:, :REAL], k[:, :REAL]), rel=1e-5)
    np.testing.assert_array_equal(grad[:, REAL:], 0)
    chex.assert_tree_all_finite(grad)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_one_sample_has_finite_loss_and_gradient(name: str, scale: float) -> None:
    """Even where batch normalisation of one sample has made the embedding zero."""
    q, k = scale * jnp.asarray(embeddings(0)), scale * jnp.asarray(embeddings(1))
    loss, grad = jax.value_and_grad(OBJECTIVES[name].loss)(q, k, jnp.arange(B) < 1, T)
    chex.assert_tree_all_finite((loss, grad))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_half_precision_embeddings_give_a_float32_loss(name: str) -> None:
    q, k = jnp.asarray(embeddings(0)), jnp.asarray(embeddings(1))
    half = OBJECTIVES[name].loss(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), jnp.ones(B, bool), T)
    assert half.dtype == jnp.float32
    assert float(half) == pytest.approx(NUMPY[name](np.asarray(q), np.asarray(k)), rel=0.05)
