"""Taking, putting and averaging parts of trees."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax import tree

PARAMS = {"a": jnp.arange(6.0).reshape(3, 2), "b": jnp.arange(4.0), "c": jnp.float32(7)}
MASK = {"a": np.array([False, True, False]), "b": np.array(True), "c": np.array(False)}


def test_take_keeps_named_rows_and_drops_the_rest() -> None:
    part = tree.take(PARAMS, tree.rows(MASK))
    np.testing.assert_array_equal(part["a"], [[2, 3]])
    np.testing.assert_array_equal(part["b"], PARAMS["b"])
    assert part["c"] is None
    assert tree.size(part) == 6
    assert tree.nbytes(part) == 24


def test_put_replaces_named_rows_and_nothing_else() -> None:
    part = jax.tree.map(lambda x: x + 100, tree.take(PARAMS, tree.rows(MASK)))
    after = tree.put(PARAMS, tree.rows(MASK), part)
    np.testing.assert_array_equal(after["a"], [[0, 1], [102, 103], [4, 5]])
    np.testing.assert_array_equal(after["b"], PARAMS["b"] + 100)
    assert after["c"] is PARAMS["c"]


def test_parts_by_a_mask_and_its_opposite_make_the_whole() -> None:
    opposite = jax.tree.map(np.logical_not, MASK)
    blank = jax.tree.map(jnp.zeros_like, PARAMS)
    one, other = tree.rows(MASK), tree.rows(opposite)
    whole = tree.put(tree.put(blank, one, tree.take(PARAMS, one)), other, tree.take(PARAMS, other))
    chex.assert_trees_all_equal(whole, PARAMS)


def test_rows_past_the_end_are_there_for_the_shape_only() -> None:
    where = tree.rows(MASK, 2)
    part = tree.take(PARAMS, where)
    assert part["a"].shape == (2, 2)
    assert tree.present(PARAMS, where)["a"].tolist() == [True, False]
    assert tree.present(PARAMS, where)["c"] is None
    after = tree.put(PARAMS, where, jax.tree.map(lambda x: x + 100, part))
    np.testing.assert_array_equal(after["a"], [[0, 1], [102, 103], [4, 5]])


def test_ema_is_exact_where_both_are_equal() -> None:
    x = jax.random.normal(jax.random.key(0), (1000,))
    np.testing.assert_array_equal(tree.ema(x, x, 0.99), x)
    np.testing.assert_allclose(tree.ema(jnp.ones(2), jnp.zeros(2), 0.9), 0.9, rtol=1e-6)
