"""Canaries: the audit finds what is accounted for, and faults that are planted."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import small_config

from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.costs import accountant, audit
from lwfedssl_jax.costs.accountant import Releases
from lwfedssl_jax.method import canaries
from lwfedssl_jax.method.aggregation import WEIGHTED_MEAN, Aggregator, Canaries, RoundContext
from lwfedssl_jax.method.privacy import Contribution, private
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.task import Broadcast, Mechanism, make_task

ROUNDS, NUMBER, DELTA = 12, 200, 1e-5
STAGE = Stage(1, 0, ROUNDS, 1, 0, 0, {}, {}, {})
TRAINABLE = {"a": jnp.zeros((50, 20)), "b": jnp.zeros(1000)}
BROADCAST = Broadcast(TRAINABLE, jax.tree.map(lambda _: jnp.array(True), TRAINABLE), {}, 1, 0, 0)


def config_of(number: int = NUMBER) -> Config:
    return small_config(privacy__clip=0.01, privacy__noise_multiplier=1.0, privacy__canaries=number, runtime__seed=5)


CONFIG = config_of()


def audited(
    z: float, *, probability: float = 1.0, same_key: bool = False, aggregator: Aggregator | None = None
) -> audit.Audit:
    """The audit of rounds without any other client."""
    found = canaries.with_canaries(aggregator or private(WEIGHTED_MEAN, CONFIG), CONFIG)
    numbers = Mechanism(*(jnp.float32(x) for x in (0.01, z, 0, 0)))
    hyper = make_task(CONFIG).hyper._replace(mechanism=numbers)
    none = Contribution(jax.tree.map(jnp.zeros_like, TRAINABLE), jnp.zeros(()), jnp.zeros(()))
    state = found.init(BROADCAST)
    finish = jax.jit(lambda context: found.finish(context, state, BROADCAST, TRAINABLE, none)[2])
    lines: list[dict[str, Any]] = []
    for number in range(1, ROUNDS + 1):
        uploads = jnp.asarray(canaries.uploads(CONFIG, STAGE, number, probability))
        key, one = jax.random.key(1 if same_key else number), jnp.ones((), jnp.float32)
        of_round = Canaries(uploads, jax.random.key(99))
        context = RoundContext(jnp.int32(number), key, hyper, jnp.float32(20), one, of_round)
        lines.append({"round": number, canaries.COSINES: np.asarray(finish(context)[canaries.COSINES])})
    epsilon = accountant.epsilon_of((Releases(probability, 1.0, ROUNDS),), z, DELTA)
    return audit.audit(CONFIG, [STAGE], lines, epsilon, DELTA) | {"accounted": epsilon}  # type: ignore[return-value]


@pytest.mark.parametrize("z", [1.0, 4.0])
def test_the_estimate_is_what_is_accounted(z: float) -> None:
    found: Any = audited(z)
    assert found["estimate"] == pytest.approx(found["accounted"], rel=0.25)
    assert found["estimate_from"] < found["accounted"]
    assert not found["broken"]
    assert 0 < found["at_least"] < found["accounted"] or z == 4
    assert f"{found['accounted']:.3g} was accounted. That does not prove" in found["says"]


def test_sampling_hides_canaries() -> None:
    found: Any = audited(1.0, probability=0.2)
    assert not found["broken"]
    assert found["estimate_from"] <= found["accounted"] < 8
    assert audited(1.0)["estimate"] > 2 * found["estimate"]


def test_noise_that_repeats_is_found() -> None:
    found = audited(4.0, same_key=True)
    assert found["broken"]
    assert found["estimate"] > 20
    assert "the mechanism does not do what is promised" in found["says"]


def by_examples(aggregator: Aggregator) -> Aggregator:
    """A fault: clipped updates are weighted by the examples of their clients."""

    def add(context: Any, broadcast: Any, trained: Any, examples: jax.Array) -> Contribution:
        found = aggregator.add(context, broadcast, trained, examples)
        return found._replace(update=jax.tree.map(lambda x: examples / 200 * x, found.update))

    return aggregator._replace(add=add)


def without_clip(aggregator: Aggregator) -> Aggregator:
    """A fault: updates are summed as they are."""

    def add(context: Any, broadcast: Any, trained: Any, examples: jax.Array) -> Contribution:
        found = aggregator.add(context, broadcast, trained, examples)
        return found._replace(update=jax.tree.map(jnp.subtract, trained, broadcast.trainable))

    return aggregator._replace(add=add)


@pytest.mark.parametrize("fault", [by_examples, without_clip])
def test_an_aggregator_that_lets_more_through_is_found(fault: Any) -> None:
    found = audited(4.0, aggregator=fault(private(WEIGHTED_MEAN, CONFIG)))
    assert found["broken"]


def test_half_of_the_canaries_are_in_and_signs_are_balanced() -> None:
    inside = canaries.inside(CONFIG)
    assert inside.sum() == NUMBER / 2
    signs = canaries.signs(CONFIG, STAGE)
    assert (signs.sum(1) == 0).all()
    assert set(signs.ravel()) == {-1, 1}
    assert len({tuple(row) for row in signs}) > 100
    for number in (1, 2):
        uploads = canaries.uploads(CONFIG, STAGE, number, 1.0)
        np.testing.assert_array_equal(uploads, np.where(inside, signs[:, number - 1], 0))
    share = np.mean([np.abs(canaries.uploads(CONFIG, STAGE, n, 0.25))[inside].mean() for n in range(1, 13)])
    assert share == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"privacy__canaries": 21}, "privacy.canaries: 21 cannot be compared in two halves; accepted: 0, or an even"),
        (
            {"privacy__canaries": 20, "privacy__noise_multiplier": 1.0, "privacy__noise_cohort": 40},
            "privacy.canaries: 20 would audit the simulated",
        ),
        ({"privacy__canaries": 20, "privacy__clip": 0.0}, "privacy.canaries: 20 needs privacy.clip, which is 0"),
    ],
)
def test_canaries_that_tell_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        small_config(**{"privacy__clip": 0.01} | changes)
