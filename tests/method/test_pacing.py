"""How long a stage lasts: as listed, as a share, and by the loss."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from conftest import small_config
from test_stages import stages_of

from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.costs.ledger import each_strategy, make_ledger
from lwfedssl_jax.method.checks import check_method
from lwfedssl_jax.method.pacing import end_stage, loss_fall, paced_stages


def lengths(config: Config) -> list[int]:
    return [stage.rounds for stage in stages_of(config)]


def deep(layers: int, rounds: int, **changes: object) -> Config:
    return small_config(model__depth=layers, federation__rounds=rounds, **changes)


def test_listed_rounds_are_of_each_stage() -> None:
    config = deep(3, 9, strategy__rounds_per_stage=(6, 2, 1), strategy__first_stage_share=0.1)
    assert lengths(config) == [6, 2, 1]
    assert [stage.first_round for stage in stages_of(config)] == [0, 6, 8]
    assert [row["rounds"] for row in make_ledger(config)["per_stage"]] == [6, 2, 1]
    by_strategy, refused = each_strategy(config)
    assert not refused
    assert {name: lengths(c) for name, c in by_strategy.items()} == {
        "end_to_end": [9],
        "layerwise": [6, 2, 1],
        "progressive": [6, 2, 1],
    }


@pytest.mark.parametrize(
    ("listed", "k", "expected"),
    [
        ((1, 2, 3, 4, 5, 6), 2, [3, 7, 11]),
        ((1, 2, 3, 4, 5, 6), 3, [6, 15]),
        ((1, 2, 3, 4, 5, 6), 4, [10, 11]),  # stages of four layers and of the two that are left
        ((6, 7, 8), 4, [13, 8]),
        ((10, 11), 6, [21]),
        ((10, 11), 3, [10, 11]),
    ],
)
def test_neighbours_are_added_up_for_stages_of_several_layers(listed: tuple, k: int, expected: list) -> None:
    assert lengths(deep(6, 21, strategy__rounds_per_stage=listed, strategy__layers_per_stage=k)) == expected


def test_a_list_that_does_not_fit_is_refused_and_other_strategies_are_even() -> None:
    listed = {"strategy__rounds_per_stage": (6, 7, 8), "strategy__first_stage_share": 0.8}
    config = deep(6, 21, **listed, strategy__layers_per_stage=3)
    message = r"strategy.rounds_per_stage: \(6, 7, 8\) does not fit the 2 stages of layerwise .*; accepted: 2 numbers"
    with pytest.raises(ConfigError, match=message):
        check_method(config)
    by_strategy, _ = each_strategy(config)
    assert {name: lengths(c) for name, c in by_strategy.items()} == {
        "end_to_end": [21],
        "layerwise": [11, 10],
        "progressive": [11, 10],
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds_per_stage": (6, 2, 2)}, r"rounds_per_stage: \(6, 2, 2\) adds up to 10; accepted: .*rounds 9"),
        ({"rounds_per_stage": (9, 0, 0)}, r"rounds_per_stage: 0 is out of range; accepted: at least 1"),
        (
            {"rounds_per_stage": (6, 2, 1), "pacing": "adaptive"},
            r"strategy.pacing: adaptive does not use .* \(6, 2, 1\)",
        ),
        ({"first_stage_share": 1.0}, r"first_stage_share: 1.0 is out of range; accepted: at least 0 and below 1"),
        ({"pacing": "fast"}, r"strategy.pacing: unknown 'fast'; accepted: fixed, adaptive"),
    ],
)
def test_bad_values_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deep(3, 9, **{f"strategy__{name}": value for name, value in changes.items()})


@pytest.mark.parametrize(
    ("layers", "rounds", "share", "expected"),
    [
        (6, 36, 0.72, [26, 2, 2, 2, 2, 2]),
        (3, 9, 0.0, [3, 3, 3]),
        (3, 9, 0.01, [1, 4, 4]),
        (3, 9, 0.99, [7, 1, 1]),
        (1, 9, 0.5, [9]),
    ],
)
def test_the_first_stage_has_its_share_and_every_stage_a_round(
    layers: int, rounds: int, share: float, expected: list
) -> None:
    assert lengths(deep(layers, rounds, strategy__first_stage_share=share)) == expected


def adaptive_lengths(losses: Sequence[float], layers: int = 4) -> list[int]:
    """After all rounds, one stage after the other as the losses arrive."""
    config = deep(layers, len(losses), strategy__pacing="adaptive")
    planned = stages_of(config)
    stages = paced_stages(config, planned, [])
    for number in range(1, len(losses) + 1):
        stages = end_stage(stages, losses[:number])
        continued = paced_stages(config, planned, losses[:number])
        assert [(s.first_round, s.rounds) for s in stages] == [(s.first_round, s.rounds) for s in continued]
    return [stage.rounds for stage in stages]


def test_a_stage_goes_on_while_the_loss_falls_and_later_ones_get_what_is_left() -> None:
    falling = 4 * np.exp(-0.1 * np.arange(24))  # by 2.4 times its size in 24 rounds at this pace
    assert adaptive_lengths(falling) == [21, 1, 1, 1]
    flat = np.full(24, 2.0)
    assert adaptive_lengths(flat) == [4, 4, 4, 12]
    stops = np.concatenate([falling[:10], np.full(14, falling[9])])
    first, second, third, last = adaptive_lengths(stops)
    assert 10 < first < 15
    assert (second, third, last) == (4, 4, 24 - first - 8)


def test_the_pace_is_relative_to_the_loss_and_to_all_rounds() -> None:
    stages = stages_of(deep(1, 24))
    losses = 5 - 0.05 * np.arange(16)
    window = losses[-12:]  # half of the only stage
    assert loss_fall(stages, losses) == pytest.approx(0.05 * 24 / np.mean(window))
    assert loss_fall(stages, 10 * losses) == pytest.approx(loss_fall(stages, losses))
    assert loss_fall(stages, losses[:2]) is None
    finer = 5 - 0.025 * np.arange(32)  # the same run in rounds of half the work
    assert loss_fall(stages_of(deep(1, 48)), finer) == pytest.approx(loss_fall(stages, losses), rel=0.02)


def test_rounds_without_a_loss_tell_nothing() -> None:
    stages = stages_of(deep(3, 24))  # a window of four rounds
    assert loss_fall(stages, [3, math.nan, 1, 0.5]) == pytest.approx(loss_fall(stages, [3, 2, 1, 0.5]), rel=0.2)
    assert loss_fall(stages, [3, math.nan, math.nan, math.nan]) is None
    assert loss_fall(stages, [0.0] * 4) is None
    assert loss_fall(stages, [-1, -1.1, -1.2, -1.3]) == pytest.approx(24 * 0.1 / 1.15)


def test_all_rounds_are_used_whatever_the_losses() -> None:
    rng = np.random.default_rng(1)
    for total, layers in ((3, 3), (7, 3), (20, 6), (24, 4)):
        for scale in (0.001, 0.1):
            found = adaptive_lengths(3 + np.cumsum(scale * rng.normal(size=total)), layers)
            assert sum(found) == total
            assert min(found) >= 1


def test_fixed_stages_do_not_depend_on_losses() -> None:
    config = deep(3, 9)
    assert [stage.rounds for stage in paced_stages(config, stages_of(config), [2.0] * 9)] == lengths(config)
