"""The mechanism of differential privacy: clipping, noise, the adapted clip; what is refused with it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.method import privacy
from lwfedssl_jax.method.aggregation import WEIGHTED_MEAN, RoundContext
from lwfedssl_jax.method.checks import check_method
from lwfedssl_jax.method.programs import program_config
from lwfedssl_jax.method.task import Broadcast, Mechanism, make_task

CONFIG = small_config(privacy__clip=0.5)
HYPER = make_task(CONFIG).hyper
PRIVATE = privacy.private(WEIGHTED_MEAN, CONFIG)
ADAPTED = privacy.private(WEIGHTED_MEAN, small_config(privacy__clip=0.5, privacy__quantile=0.6))


def context(clip: float = 0.5, noise: float = 0.0, key: int = 0, expected: float = 4, **more: float) -> RoundContext:
    mechanism = Mechanism(*(jnp.float32(x) for x in (clip, noise, more.get("quantile", 0), more.get("count_noise", 0))))
    hyper = HYPER._replace(mechanism=mechanism)
    one = jnp.ones((), jnp.float32)
    return RoundContext(jnp.int32(1), jax.random.key(key), hyper, jnp.float32(expected), one)


def broadcast_of(trainable: Any, present: Any = None) -> Broadcast:
    present = jax.tree.map(lambda _: jnp.array(True), trainable) if present is None else present
    return Broadcast(trainable, present, {}, 1, 0, 0)


SHAPES = {"a": (7, 5), "b": (3,), "c": ()}


def hostile(seed: int) -> dict[str, np.ndarray]:
    """An update of any scale, with heavy tails, zeros and the largest numbers in between."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(5)

    def leaf(shape: tuple[int, ...]) -> np.ndarray:
        x = rng.standard_cauchy(shape) if kind < 3 else rng.normal(size=shape)
        x = np.where(rng.random(shape) < 0.2, 0, x) * 10.0 ** rng.uniform(-6, 8)
        if kind == 3:
            x = np.full(shape, 10.0 ** rng.uniform(-40, 18))
        return np.asarray(x, np.float32)

    return {name: leaf(shape) for name, shape in SHAPES.items()}


def test_no_contribution_is_longer_than_the_clip_over_10_000_hostile_updates() -> None:
    zeros = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    old = {name: np.float32(np.random.default_rng(1).normal(size=shape)) for name, shape in SHAPES.items()}
    bound, within, parameters = 0.0, np.zeros(0), sum(int(np.prod(shape)) for shape in SHAPES.values())
    add = jax.jit(jax.vmap(lambda trained, sent: PRIVATE.add(context(), broadcast_of(sent), trained, jnp.ones(()))))
    updates = [hostile(seed) for seed in range(10_000)]
    trained = {name: np.stack([u[name] for u in updates]) for name in SHAPES}
    clip = 0.5 * np.sqrt(parameters)
    for sent in (zeros, old):
        many = {name: np.broadcast_to(x, (10_000, *np.shape(x))) for name, x in sent.items()}
        found = add(trained, many)
        squares = sum((np.asarray(x, np.float64) ** 2).reshape(10_000, -1).sum(1) for x in found.update.values())
        assert np.isfinite(squares).all()
        bound = max(bound, float(np.sqrt(squares).max()))
        within = np.unique(found.within) if sent is zeros else within
    assert 0.999 * clip < bound <= clip
    assert within.tolist() == [0.0, 1.0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(-6, 8), st.integers(1, 2**21))
def test_long_sums_do_not_hide_part_of_the_norm(seed: int, scale: float, size: int) -> None:
    rng = np.random.default_rng(seed)
    update = np.float32(np.abs(rng.standard_cauchy(size)) * 10**scale)
    sent = {"a": jnp.zeros(size)}
    found = PRIVATE.add(context(), broadcast_of(sent), {"a": jnp.asarray(update)}, jnp.ones(()))
    length = np.sqrt((np.asarray(found.update["a"], np.float64) ** 2).sum())
    assert length <= 0.5 * np.sqrt(size)


def test_an_update_within_the_clip_is_passed_on_and_weights_do_not_matter() -> None:
    sent = {"a": jnp.ones((3, 2)), "b": jnp.zeros(4)}
    trained = {"a": sent["a"] + 0.1, "b": sent["b"] - 0.2}
    small, same = (PRIVATE.add(context(), broadcast_of(sent), trained, jnp.float32(n)) for n in (64, 640))
    for name in sent:
        np.testing.assert_allclose(small.update[name], (trained[name] - sent[name]) * (1 - privacy.SLACK), rtol=1e-5)
        np.testing.assert_array_equal(small.update[name], same.update[name])
    assert (float(small.within), float(small.clients)) == (1, 1)


def test_idle_rows_are_neither_clipped_with_nor_noised() -> None:
    sent, present = {"a": jnp.zeros((4, 3))}, {"a": jnp.array([True, True, False, False])}
    trained = {"a": jnp.full((4, 3), 9.0).at[3].set(jnp.nan)}
    found = PRIVATE.add(context(), broadcast_of(sent, present), trained, jnp.ones(()))
    np.testing.assert_array_equal(found.update["a"][2:], 0)
    assert np.sqrt((np.asarray(found.update["a"]) ** 2).sum()) == pytest.approx(0.5 * np.sqrt(6), rel=1e-3)
    state = PRIVATE.init(broadcast_of(sent, present))
    _, after, measured = PRIVATE.finish(context(noise=1.0), state, broadcast_of(sent, present), sent, found)
    np.testing.assert_array_equal(after["a"][2:], 0)
    assert float(measured["clip_norm"]) == pytest.approx(0.5 * np.sqrt(6))


def test_noise_has_its_deviation_and_is_new_in_every_round_and_leaf() -> None:
    sent = {"a": jnp.zeros((50, 40)), "b": jnp.zeros(1000)}
    state, count = PRIVATE.init(broadcast_of(sent)), 3000
    none = privacy.Contribution(sent, jnp.zeros(()), jnp.zeros(()))
    finish = jax.jit(lambda c: PRIVATE.finish(c, state, broadcast_of(sent), sent, none)[1:])
    drawn = []
    for key in range(50):
        after, measured = finish(context(clip=0.01, noise=0.7, key=key, expected=4))
        drawn.append(np.concatenate([np.ravel(x) for x in after.values()]))
        assert float(measured["noise_norm"]) == pytest.approx(np.linalg.norm(drawn[-1]), rel=1e-4)
        assert float(measured["share_clipped"]) == float(measured["signal_norm"]) == 0
    deviation = 0.7 * 0.01 * np.sqrt(count) / 4  # multiplier * clip * sqrt(d) / expected
    everything = np.stack(drawn)
    assert everything.std() == pytest.approx(deviation, rel=0.01)
    assert abs(everything.mean()) < 4 * deviation / np.sqrt(everything.size)
    correlations = np.corrcoef(everything)[np.triu_indices(50, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(count)  # of 1,225 pairs
    assert abs(np.corrcoef(everything[:, :1000].ravel(), everything[:, 2000:].ravel())[0, 1]) < 4 / np.sqrt(50_000)


def test_an_adapted_clip_follows_the_quantile() -> None:
    """Andrew et al., 2021: the clip's logarithm falls by 0.2 times the share within it beyond the quantile."""
    sent = {"a": jnp.zeros(4)}
    state = ADAPTED.init(broadcast_of(sent))
    for within in (4, 0):
        summed = privacy.Contribution(sent, jnp.float32(within), jnp.float32(4))
        after, *_ = ADAPTED.finish(context(quantile=0.6), state, broadcast_of(sent), sent, summed)
        assert float(after.scale) == pytest.approx(np.exp(-0.2 * (within / 4 - 0.6)))
        fixed, *_ = PRIVATE.finish(context(quantile=0.6), state, broadcast_of(sent), sent, summed)
        assert float(fixed.scale) == 1
    wide = context()._replace(shared=jnp.float32(2))
    assert float(privacy.clip_norm(wide, broadcast_of(sent))) == 2 * float(
        privacy.clip_norm(context(), broadcast_of(sent))
    )
    noisy = [
        ADAPTED.finish(context(count_noise=3.0, key=k), state, broadcast_of(sent), sent, summed)[0] for k in range(40)
    ]
    logs = np.log([float(s.scale) for s in noisy])
    assert logs.std() == pytest.approx(0.2 * 3 / 4, rel=0.5)  # noise on the count over the expected clients


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation.aggregator": "ldawa"}, "federation.aggregator: ldawa uses more than the mean"),
        ({"objective.name": "simclr", "additions.dictionary": 4}, "additions.dictionary: 4 uploads embeddings"),
        (
            {"federation.client_start": "fedema", "objective.name": "byol", "strategy.name": "end_to_end"},
            "federation.client_start: fedema keeps models on clients",
        ),
        ({"strategy.pacing": "adaptive", "privacy.epsilon": 2.0}, "strategy.pacing: adaptive ends stages by"),
    ],
)
def test_what_releases_more_than_the_noisy_sum_is_refused(changes: dict[str, Any], message: str) -> None:
    config = small_config(**{"privacy__clip": 0.01} | {k.replace(".", "__"): v for k, v in changes.items()})
    with pytest.raises(ConfigError, match=f"^{message}.*; accepted: .*, or (no )?privacy"):
        check_method(config)


def test_a_sweep_over_promises_and_clips_shares_its_programs() -> None:
    changes: list[dict[str, Any]] = [
        {"privacy__epsilon": 1.0}, {"privacy__epsilon": 8.0, "privacy__clip": 0.2}, {"privacy__noise_multiplier": 2.0},
        {"privacy__epsilon": 2.0, "privacy__delta": 1e-3, "privacy__noise_cohort": 40},
        {"privacy__epsilon": 2.0, "federation__sampling": "poisson"},
    ]  # fmt: skip
    programs = {program_config(small_config(**{"privacy__clip": 0.1} | more)) for more in changes}
    assert len(programs) == 1
    for other in ({"privacy__clip": 0.0}, {"privacy__quantile": 0.5}, {"privacy__canaries": 20}):
        assert program_config(small_config(**{"privacy__clip": 0.1} | other)) not in programs


def test_batch_normalisation_is_refused() -> None:
    sizes = {"model__name": "resnet18", "model__patch_size": 0, "model__heads": 0, "model__depth": 2}
    with pytest.raises(ConfigError, match=r"^model.name: resnet18 averages statistics .*; accepted: a model without"):
        check_method(small_config(**sizes, privacy__clip=0.01))


SET: dict[str, Any] = {"privacy.clip": 0.1, "privacy.epsilon": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"privacy.epsilon": 8.0},
            r"privacy.epsilon: 8.0 needs privacy.clip, which is 0; accepted: privacy.clip above",
        ),
        ({"privacy.noise_cohort": 50}, r"privacy.noise_cohort: 50 needs privacy.clip, which is 0"),
        ({"privacy.clip": 0.1, "privacy.epsilon": 8.0, "privacy.noise_multiplier": 1.0}, "privacy.epsilon: 8.0 and"),
        (
            {"privacy.clip": 0.1, "privacy.epsilon": 1.0, "privacy.noise_cohort": 3},
            r"privacy.noise_cohort: 3 is fewer .*; accepted: 0, or at",
        ),
        (SET | {"privacy.delta": 0.25}, r"privacy.delta: 0.25 is not between 1e-12 and 1 / 4 clients; accepted: 0, or"),
        (
            SET | {"privacy.delta": 1e-13},
            r"privacy.delta: 1e-13 is not between 1e-12 and 1 / 4 clients; accepted: 0, or",
        ),
        (
            {"privacy.clip": 0.1, "privacy.delta": 0.01},
            "privacy.delta: 0.01 is set, and there is no noise; accepted: 0",
        ),
        ({"privacy.clip": 0.1, "privacy.noise_cohort": 8}, "privacy.noise_cohort: 8 is set, and there is no noise"),
        (
            {"privacy.clip": 0.1, "privacy.noise_multiplier": 0.01},
            "privacy.noise_multiplier: 0.01 is less than protects",
        ),
        (
            SET | {"partition.clients": 1},
            "partition.clients: 1 client cannot be hidden among others; accepted: at least 2",
        ),
        (SET | {"privacy.count_noise": 1.0}, "privacy.count_noise: 1.0 is set, and privacy.quantile is 0"),
        ({"privacy.clip": -1.0}, r"privacy.clip: -1.0 is out of range; accepted: at least 0"),
        ({"federation.sampling": "uniform"}, r"federation.sampling: unknown 'uniform'; accepted: fixed, poisson"),
        (
            {"federation.sampling": "poisson", "additions.dictionary": 4},
            "additions.dictionary: 4 embeddings need slots .*; accepted: 0, or federation.sampling fixed",
        ),
    ],
)
def test_settings_that_do_not_fit_each_other_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_method(small_config(**{k.replace(".", "__"): v for k, v in changes.items()}))


def test_a_secure_sum_does_not_depend_on_order_and_is_the_sum() -> None:
    config = small_config(privacy__clip=0.5, privacy__secure_sum_bits=16)
    aggregator = privacy.private(WEIGHTED_MEAN, config)
    sent = {"a": jnp.zeros((30, 20)), "b": jnp.zeros(40)}
    rng, bound = np.random.default_rng(0), 0.5 * np.sqrt(640)
    updates = [
        {k: jnp.asarray(rng.normal(size=x.shape) * 10.0**s, jnp.float32) for k, x in sent.items()}
        for s in (-2, 0, 1, 3)
    ]
    added = []
    for i, update in enumerate(updates):
        own = context()._replace(key=jax.random.key(i))
        found = aggregator.add(own, broadcast_of(sent), update, jnp.ones(()))
        assert {x.dtype for x in jax.tree.leaves(found.update)} == {np.dtype(np.int32)}
        step = float(privacy.step_of(own, 16))
        length = step * np.sqrt(sum((np.asarray(x, np.float64) ** 2).sum() for x in found.update.values()))
        assert length <= bound
        added.append(found)
    forth, back = (jax.tree.map(lambda *x: sum(x[1:], x[0]), *group) for group in (added, added[::-1]))
    np.testing.assert_array_equal(forth.update["a"], back.update["a"])
    state = aggregator.init(broadcast_of(sent))
    _, after, measured = aggregator.finish(context(), state, broadcast_of(sent), sent, forth)
    plain = [PRIVATE.add(context(), broadcast_of(sent), update, jnp.ones(())) for update in updates]
    expected = sum(np.asarray(p.update["a"]) for p in plain) / 4
    assert np.abs(np.asarray(after["a"]) - expected).max() < step + 0.02 * np.abs(expected).max()
    assert int(measured["wrapped"]) == 0


def test_noise_comes_before_the_modulus() -> None:
    """A sum at the end of the range and its neighbour beyond it differ by one step, modulo the range, noise or not."""
    config = small_config(privacy__clip=0.5, privacy__noise_multiplier=1.0, privacy__secure_sum_bits=8)
    aggregator, sent = privacy.private(WEIGHTED_MEAN, config), {"a": jnp.zeros(500)}
    state, own = aggregator.init(broadcast_of(sent)), context(noise=1.0, key=3)
    ends = []
    for number in (127, 128):
        summed = privacy.Contribution({"a": jnp.full(500, number, jnp.int32)}, jnp.zeros(()), jnp.ones(()))
        ends.append(np.asarray(aggregator.finish(own, state, broadcast_of(sent), sent, summed)[1]["a"]))
    steps = (ends[1] - ends[0]) * 4 / float(privacy.step_of(own, 8))
    assert set(np.round(steps).astype(int) % 256) == {1}
    assert np.unique(np.round(ends[0], 4)).size > 20  # of noise


def test_what_is_beyond_the_range_wraps_around_and_is_counted() -> None:
    total = {"a": jnp.array([0, 127, 128, -128, -129, 300], jnp.int32)}
    found, wrapped = privacy.from_integers(total, jnp.float32(0.5), 8)
    np.testing.assert_array_equal(found["a"], np.array([0, 127, -128, -128, 127, 44]) / 2)
    assert int(wrapped) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"privacy__secure_sum_bits": 7},
            r"privacy.secure_sum_bits: 7 are too few for a sum of 4 clients; accepted: 0, or 8",
        ),
        (
            {"privacy__secure_sum_bits": 25},
            r"privacy.secure_sum_bits: 25 is out of range; accepted: at least 0 and at most 24",
        ),
        (
            {"privacy__secure_sum_bits": 16, "federation__compression": "int8"},
            "federation.compression: int8 does not go with privacy.secure_sum_bits 16",
        ),
        ({"privacy__secure_sum_bits": 16, "privacy__clip": 0.0}, "privacy.secure_sum_bits: 16 needs privacy.clip"),
    ],
)
def test_secure_sums_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_method(small_config(**{"privacy__clip": 0.1} | changes))
