"""Strategies as stages."""

import jax
import numpy as np
import pytest
from conftest import small_config

from lwfedssl_jax.config import Config, ConfigError, override
from lwfedssl_jax.method.stages import Stage, alike, make_stages, spread
from lwfedssl_jax.method.task import init_params, make_task, param_layers
from lwfedssl_jax.tree import Tree


def stages_of(config: Config) -> list[Stage]:
    task = make_task(config)
    return make_stages(config, param_layers(task, jax.eval_shape(lambda: init_params(task, jax.random.key(0)))))


def block_rows(mask: Tree) -> list[bool]:
    return mask["encoder"]["blocks"]["qkv"]["kernel"].tolist()


@pytest.mark.parametrize(
    ("strategy", "trainable", "frozen"),
    [
        ("layerwise", [[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 0, 0], [1, 0, 0], [1, 1, 0]]),
        ("progressive", [[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[0, 0, 0]] * 3),
        ("end_to_end", [[1, 1, 1]], [[0, 0, 0]]),
    ],
)
def test_blocks_of_each_stage(strategy: str, trainable: list, frozen: list) -> None:
    stages = stages_of(small_config(strategy__name=strategy))
    assert [block_rows(s.trainable) for s in stages] == trainable
    assert [block_rows(s.frozen) for s in stages] == frozen


@pytest.mark.parametrize("strategy", ["layerwise", "progressive"])
def test_embedding_goes_with_layer_one_and_heads_and_norm_with_every_stage(strategy: str) -> None:
    first, *later = stages_of(small_config(strategy__name=strategy, objective__name="byol"))
    assert first.trainable["encoder"]["embedding"]["position"]
    for stage in [first, *later]:
        always = [stage.trainable[k] for k in ("projection", "prediction")] + [stage.trainable["encoder"]["norm"]]
        assert all(map(bool, jax.tree.leaves(always)))
    for stage in later:
        assert bool(stage.trainable["encoder"]["embedding"]["position"]) == (strategy == "progressive")
        assert bool(stage.frozen["encoder"]["embedding"]["position"]) == (strategy == "layerwise")


@pytest.mark.parametrize(("k", "depths", "new"), [(2, [2, 3], [[1, 1, 0], [0, 0, 1]]), (3, [3], [[1, 1, 1]])])
def test_layers_per_stage_with_a_remainder(k: int, depths: list, new: list) -> None:
    stages = stages_of(small_config(strategy__layers_per_stage=k))
    assert [s.depth for s in stages] == depths
    assert [block_rows(s.trainable) for s in stages] == new


def test_strategies_that_are_the_same_run_are_named() -> None:
    config = small_config(model__depth=3, strategy__layers_per_stage=3)
    assert alike(config) == (
        "strategy.layers_per_stage 3 is the whole encoder: end_to_end, layerwise, progressive are the same run."
    )
    assert alike(override(config, {"strategy.layers_per_stage": 2})) == ""
    assert alike(override(config, {"strategy.name": "end_to_end", "strategy.layers_per_stage": 1})) == ""


def test_every_parameter_is_trained_in_exactly_one_layerwise_stage_or_all() -> None:
    stages = stages_of(small_config())
    times = jax.tree.map(lambda *masks: sum(m.astype(int) for m in masks), *[s.trainable for s in stages])
    assert {int(n) for x in jax.tree.leaves(times) for n in np.ravel(x)} == {1, len(stages)}


def test_rounds_are_spread_with_nothing_lost() -> None:
    assert spread(10, 3) == [4, 3, 3]
    assert spread(180, 12) == [15] * 12
    stages = stages_of(small_config(federation__rounds=8))
    assert [s.rounds for s in stages] == [3, 3, 2]
    assert [s.first_round for s in stages] == [0, 3, 6]


def test_a_parameter_without_a_layer_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"\['stray'\] belongs to layer 9; accepted: 0 .*, 1 to 3, or -1 to -3"):
        make_stages(small_config(), {"stray": np.array(9)})
