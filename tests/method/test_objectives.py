"""Losses against independent NumPy, what masks must do, and the options of objectives."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import known_traces, small_config

from lwfedssl_jax.config import ConfigError, override, resolve
from lwfedssl_jax.config.fields import Range
from lwfedssl_jax.costs.ledger import make_ledger
from lwfedssl_jax.method.checks import check_method
from lwfedssl_jax.method.objectives import OBJECTIVES, Objective, Option, options_of
from lwfedssl_jax.method.pretext import pretext_of, see_some_patches, visible_patches
from lwfedssl_jax.method.task import init_params, make_task

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


def numpy_vicreg(
    z: np.ndarray, _: np.ndarray, invariance: float = 25, variance: float = 25, covariance: float = 1
) -> float:
    z1, z2 = z.astype(np.float64)
    found = invariance * np.mean((z1 - z2) ** 2)
    for one in (z1, z2):
        c = np.cov(one.T)
        found += variance * np.mean(np.maximum(0, 1 - np.sqrt(np.diag(c) + 1e-4)))
        found += covariance * sum(c[i, j] ** 2 for i in range(D) for j in range(D) if i != j) / D
    return float(found)


NUMPY = {"simclr": numpy_simclr, "mocov3": numpy_mocov3, "byol": numpy_byol, "vicreg": numpy_vicreg}


def loss_of(name: str) -> Callable[..., jax.Array]:
    """A loss of two views with its default options."""
    objective = OBJECTIVES[name]
    return functools.partial(objective.loss, **{option: o.default for option, o in objective.options.items()})


@pytest.mark.parametrize("name", NUMPY)
def test_equals_numpy(name: str) -> None:
    q, k = embeddings(0), embeddings(1)
    loss = loss_of(name)(jnp.asarray(q), jnp.asarray(k), jnp.ones(B, bool), T)
    assert float(loss) == pytest.approx(NUMPY[name](q, k), rel=1e-5)


@pytest.mark.parametrize("name", NUMPY)
def test_padding_counts_for_nothing(name: str) -> None:
    """Loss and gradient are those of the real samples alone, whatever the padding holds."""
    q, k = embeddings(0), embeddings(1)
    mask = jnp.arange(B) < REAL
    q[:, REAL:], k[:, REAL:] = 1e3, -1e3
    q[:, -1] = 0
    loss, grad = jax.value_and_grad(loss_of(name))(jnp.asarray(q), jnp.asarray(k), mask, T)
    assert float(loss) == pytest.approx(NUMPY[name](q[:, :REAL], k[:, :REAL]), rel=1e-5)
    np.testing.assert_array_equal(grad[:, REAL:], 0)
    chex.assert_tree_all_finite(grad)


@pytest.mark.parametrize("name", NUMPY)
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_one_sample_has_finite_loss_and_gradient(name: str, scale: float) -> None:
    """Even where batch normalisation of one sample has made the embedding zero."""
    q, k = scale * jnp.asarray(embeddings(0)), scale * jnp.asarray(embeddings(1))
    loss, grad = jax.value_and_grad(loss_of(name))(q, k, jnp.arange(B) < 1, T)
    chex.assert_tree_all_finite((loss, grad))


@pytest.mark.parametrize("name", NUMPY)
def test_half_precision_embeddings_give_a_float32_loss(name: str) -> None:
    q, k = jnp.asarray(embeddings(0)), jnp.asarray(embeddings(1))
    half = loss_of(name)(q.astype(jnp.bfloat16), k.astype(jnp.bfloat16), jnp.ones(B, bool), T)
    assert half.dtype == jnp.float32
    assert float(half) == pytest.approx(NUMPY[name](np.asarray(q), np.asarray(k)), rel=0.05)


@pytest.mark.parametrize("option", OBJECTIVES["vicreg"].options)
def test_the_options_of_vicreg_are_the_weights_of_its_terms(option: str) -> None:
    z = embeddings(0)
    weights = dict.fromkeys(OBJECTIVES["vicreg"].options, 0.0) | {option: 2.0}
    loss = OBJECTIVES["vicreg"].loss(jnp.asarray(z), jnp.asarray(z), jnp.ones(B, bool), T, **weights)
    assert float(loss) == pytest.approx(numpy_vicreg(z, z, **weights), rel=1e-5)


def test_every_objective_has_a_reference() -> None:
    assert set(NUMPY) | {"mae"} == set(OBJECTIVES)


MAE = {"objective__name": "mae", "data__image_size": 16, "model__patch_size": 4}


def test_the_loss_of_mae_is_that_of_hidden_patches_of_real_samples() -> None:
    rng = np.random.default_rng(0)
    predicted, patches = rng.normal(size=(2, B, 6, 4)).astype(np.float32)
    hidden = rng.random((B, 6)) < 0.5
    expected = np.mean(
        [np.mean((predicted[i, p] - patches[i, p]) ** 2) for i in range(REAL) for p in np.flatnonzero(hidden[i])]
    )
    arguments = jnp.asarray(patches), jnp.asarray(hidden), jnp.arange(B) < REAL
    loss, grad = jax.value_and_grad(OBJECTIVES["mae"].loss)(jnp.asarray(predicted), *arguments)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_array_equal(grad[REAL:], 0)
    np.testing.assert_array_equal(np.asarray(grad)[~hidden], 0)


def test_mae_hides_other_patches_of_each_image_and_step_and_the_encoder_sees_the_rest(cheap_views: None) -> None:
    task = make_task(resolve(small_config(**MAE)))
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8))
    seen, again, fewer = (see_some_patches(task, jax.random.key(k), images[:n]) for k, n in ((0, 6), (1, 6), (0, 3)))
    assert seen.goal
    assert again.goal
    assert fewer.goal
    assert seen.x.values.shape == (6, 4, 4 * 4 * 3)  # a quarter of 16 patches
    assert seen.goal.hidden.sum(axis=1).tolist() == [12] * 6
    np.testing.assert_array_equal(fewer.goal.visible, seen.goal.visible[:3])  # whatever else is in the batch
    assert len({row.tobytes() for row in np.asarray(seen.goal.visible)}) > 1
    assert (np.asarray(seen.goal.visible) != np.asarray(again.goal.visible)).any()
    np.testing.assert_allclose(seen.goal.patches.mean(-1), 0, atol=1e-5)
    np.testing.assert_allclose(seen.goal.patches.var(-1), 1, atol=1e-3)
    plain = task._replace(options=task.options | {"normalised_pixels": 0})
    found = see_some_patches(plain, jax.random.key(0), images)
    assert found.goal
    at = np.asarray(found.goal.visible)
    np.testing.assert_array_equal(found.x.values[2], np.asarray(found.goal.patches)[2, at[2]])

    trainable = init_params(task, jax.random.key(0))
    run = lambda seen: pretext_of(task).online(task, trainable, seen, jnp.ones(6, bool), (3, None))[0]["decoder"]  # noqa: E731
    changed = jnp.where(jnp.asarray(seen.goal.hidden)[:, :, None], 9, seen.goal.patches)
    np.testing.assert_array_equal(run(seen), run(seen._replace(goal=seen.goal._replace(patches=changed))))
    assert (run(seen) != run(seen._replace(x=seen.x._replace(values=seen.x.values + 1)))).any()


@pytest.mark.parametrize(("patches", "ratio", "visible"), [(16, 0.75, 4), (4, 0.99, 1), (4, 0.01, 3), (64, 0.5, 32)])
def test_at_least_one_patch_is_visible_and_one_hidden(patches: int, ratio: float, visible: int) -> None:
    assert visible_patches(patches, ratio) == visible


def test_the_ledger_prices_the_tokens_that_mae_sees() -> None:
    """The frozen prefix runs on visible tokens, the decoder on all of them; the heads' options count too."""

    def cost(*options: str) -> list[Any]:
        config = resolve(small_config(**MAE, objective__options=options))
        return make_ledger(config, known_traces())["per_stage"]

    quarter, half, deeper = cost(), cost("mask_ratio=0.5"), cost("decoder_depth=2")
    for rule in ("flops_paper_rule", "flops_executed"):
        frozen_layer, on_twice_the_tokens = (stages[2][rule] - stages[1][rule] for stages in (quarter, half))
        assert 2 < on_twice_the_tokens / frozen_layer < 2.5  # attention grows with the square
        assert deeper[0][rule] > quarter[0][rule]
    assert deeper[0]["upload_bytes"] > quarter[0]["upload_bytes"]
    width, tokens, samples = 8, 4, 2  # a block: 12 D^2 per token, attention 2 P^2 D, two layer norms of 5 P D
    block = 12 * width**2 * tokens + 2 * tokens**2 * width + 10 * tokens * width
    assert quarter[2]["flops_paper_rule"] - quarter[1]["flops_paper_rule"] == samples * block


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"objective__options": ("mask=0.5",)},
            "objective.options: 'mask=0.5' is not valid; accepted: NAME=VALUE, each NAME once of those of "
            "objective.name mae: mask_ratio, normalised_pixels, decoder_depth, decoder_width, decoder_heads",
        ),
        (
            {"objective__options": ("mask_ratio=0.5", "mask_ratio=0.6")},
            "objective.options: 'mask_ratio=0.6' is not valid",
        ),
        (
            {"objective__options": ("mask_ratio=1",)},
            "objective.options: 'mask_ratio=1' is not valid; accepted: a number above 0 and below 1 (share of",
        ),
        (
            {"objective__options": ("mask_ratio=half",)},
            "objective.options: 'mask_ratio=half' is not valid; accepted: a num",
        ),
        (
            {"objective__options": ("decoder_depth=1.5",)},
            "objective.options: 'decoder_depth=1.5' is not valid; accepted: a whole number at least 1 and at most 64",
        ),
        (
            {"objective__options": ("decoder_heads=3",)},
            "objective.options: decoder_heads=3 does not divide the decoder's width 8; accepted: 1, 2, 4, 8",
        ),
        ({"objective__options": ("mask_ratio",)}, "objective.options: 'mask_ratio' is not valid; accepted: NAME=VALUE"),
        (
            {"objective__name": "simclr", "objective__options": ("mask_ratio=0.5",)},
            "objective.options: 'mask_ratio=0.5' is not valid; accepted: NAME=VALUE, each NAME once of those of "
            "objective.name simclr: none",
        ),
        (
            {
                "model__name": "resnet18",
                "model__patch_size": 0,
                "model__heads": 0,
                "model__width": 4,
                "model__depth": 2,
            },
            "objective.name: mae hides patches, which model.name resnet18 does not have; accepted: simclr, byol, "
            "mocov3, vicreg, or a vit",
        ),
        ({"data__image_size": 4}, "model.patch_size: 4 makes one patch of an image, and objective.name mae hides some"),
        (
            {"additions__terms": ("alignment=1",)},
            "additions.terms: alignment compares projections, which objective.name mae",
        ),
        (
            {"additions__dictionary": 4},
            "additions.dictionary: 4 embeddings would be negatives, but objective.name mae uses",
        ),
        (
            {"federation__client_start": "fedu", "strategy__name": "end_to_end"},
            "federation.client_start: fedu needs a target branch and a prediction head",
        ),
    ],
)
def test_what_an_objective_cannot_do_is_refused_before_anything_is_compiled(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_method(resolve(small_config(**MAE | changes)))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_an_objective_of_a_users_gets_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(online: jax.Array, target: jax.Array, mask: jax.Array, temperature: float, *, power: int) -> jax.Array:
        return (jnp.abs(online[0] - online[1]) ** power).mean(where=mask[:, None])

    entry = Objective(own, False, False, 2, options={"power": Option(2, Range(1, 4), "exponent")})
    monkeypatch.setitem(OBJECTIVES, "own", entry)
    config = resolve(small_config(objective__name="own", objective__options=("power=3",)))
    assert options_of(config) == {"power": 3}
    check_method(config)
    task = make_task(config)
    assert task.options == {"power": 3}
    z = jnp.asarray(embeddings(0))
    assert float(task.objective.loss(z, z[::-1], jnp.ones(B, bool), T, **task.options)) > 0
    with pytest.raises(ConfigError, match="accepted: a whole number at least 1 and at most 4 \\(exponent\\)"):
        check_method(override(config, {"objective.options": ("power=5",)}))
