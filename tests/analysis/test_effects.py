"""Worlds, factors and main effects, by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
from runs import write_run

from lwfedssl_jax.analysis import comparisons, effects, report, results, statistics
from lwfedssl_jax.analysis.settings import group_by_setting

STRATEGIES = ("layerwise", "progressive", "end_to_end")
RATES = (0.01, 0.1)


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three strategies and two learning rates, which change with the batch size; each has an effect of its own."""
    top = tmp_path_factory.mktemp("grid")
    for i, strategy in enumerate(STRATEGIES):
        for j, rate in enumerate(RATES):
            for seed in range(3):
                accuracy = 0.5 + 0.1 * i + 0.05 * j + 0.01 * seed * (1 + i)
                changes: dict[str, Any] = {"optimizer__learning_rate": rate, "optimizer__batch_size": 32 * (1 + j)}
                run = top / f"{i}{j}{seed}"
                write_run(run, {"knn": accuracy}, strategy__name=strategy, runtime__seed=seed, **changes)
    return top


def test_fields_that_change_together_are_one_factor(grid: Path) -> None:
    _, settings = group_by_setting(results.load_results(grid))
    strategy, rate = effects.factors(settings)
    assert (strategy.name, strategy.levels) == ("strategy", [*STRATEGIES])
    assert rate.name == "batch size and learning rate"
    assert rate.levels == ["batch size 32, learning rate 0.01", "batch size 64, learning rate 0.1"]
    assert effects.grid_of(settings) == (strategy, rate)
    assert effects.grid_of(settings[1:]) is None


def test_effects_are_paired_over_seeds_and_all_other_factors(grid: Path) -> None:
    runs, settings = group_by_setting(results.load_results(grid))
    layerwise, progressive, rate = effects.main_effects(runs, settings, "knn")
    assert (layerwise.setting, layerwise.against, layerwise.factor) == ("layerwise", "end_to_end", "strategy")
    assert (layerwise.pairs, layerwise.seeds) == (2, 3)
    assert layerwise.mean == pytest.approx(-0.2 - 0.02)
    assert progressive.mean == pytest.approx(-0.1 - 0.01)
    assert (rate.against, rate.pairs) == ("batch size 32, learning rate 0.01", 3)
    assert rate.mean == pytest.approx(0.05)
    assert rate.why_not == "the same in all 3 seeds: no test"
    assert "on average over 2 pairs of settings" in str(layerwise)
    (found,) = comparisons.compare_all(runs, settings, ["knn"]).values()
    assert [d.p_holm for d in found[:2]] == pytest.approx(statistics.holm([layerwise.p, progressive.p]))
    unpaired = runs[runs["runtime.seed"] != 1]
    assert effects.main_effects(unpaired, settings, "knn")[0].seeds == 2


def test_the_page_has_a_heat_map_and_effects_by_factor(grid: Path, tmp_path: Path) -> None:
    text = report.write_report([grid], tmp_path).read_text()
    assert "Each value of a field is compared with a reference" in text
    assert "accounts for all 2 tests" in text
    assert (tmp_path / "plots" / "accuracy_grid_1.svg").is_file()


def test_worlds_are_data_partition_and_fleet_and_data_are_never_compared(tmp_path: Path) -> None:
    for i, (data, beta) in enumerate((("digits", 0.1), ("digits", 0.5), ("synthetic", 0.1))):
        for strategy in STRATEGIES:
            changes: dict[str, Any] = {"partition__kind": "dirichlet", "partition__beta": beta, "data__name": data}
            for seed in range(2):
                write_run(tmp_path / f"{i}{strategy}{seed}", {"knn": 0.5 + 0.1 * seed * i}, strategy__name=strategy,
                          runtime__seed=seed, **changes)  # fmt: skip
    runs, settings = group_by_setting(results.load_results(tmp_path))
    assert [(w.name, len(w.settings)) for w in effects.worlds(settings)] == [
        ("digits, beta 0.1", 3), ("digits, beta 0.5", 3), ("synthetic, beta 0.1", 3)
    ]  # fmt: skip
    compared = comparisons.compare_all(runs, settings, ["knn"])["knn"]
    assert [d.factor for d in compared] == ["strategy", "strategy", "beta", "", "", ""]
    assert not any("digits" in d.setting and "synthetic" in d.against for d in compared)


def test_runs_on_other_data_of_the_same_name_are_not_compared(tmp_path: Path) -> None:
    for strategy, data in (("layerwise", "aaa"), ("end_to_end", "bbb"), ("progressive", "aaa")):
        for seed in range(2):
            run = tmp_path / f"{strategy}{seed}"
            write_run(run, {"knn": 0.5 + 0.1 * seed}, strategy__name=strategy, runtime__seed=seed)
            about = json.loads((run / "config.json").read_text())
            (run / "config.json").write_text(json.dumps(about | {"data": {"images": data}}))
    runs, settings = group_by_setting(results.load_results(tmp_path))
    assert {s.label for s in settings} == {"layerwise", "end_to_end", "progressive"}
    (only,) = comparisons.compare_all(runs, settings, ["knn"])["knn"]
    assert {only.setting, only.against} == {"layerwise", "progressive"}
    assert len(effects.worlds(settings)) == 2


def test_a_pair_without_common_seeds_does_not_count(grid: Path) -> None:
    runs, settings = group_by_setting(results.load_results(grid))
    one = (runs["strategy.name"] == "layerwise") & (runs["optimizer.learning_rate"] == 0.01)
    effect, *_ = effects.main_effects(runs[~one | (runs["runtime.seed"] > 5)], settings, "knn")
    assert (effect.setting, effect.pairs, effect.seeds) == ("layerwise", 1, 3)
