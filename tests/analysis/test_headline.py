"""The first sentences of a report: the untrained encoder, chance, seeds, protocols and worlds."""

from pathlib import Path
from typing import Any

from runs import write_run

from lwfedssl_jax.analysis import comparisons, headline, results, statistics, tables
from lwfedssl_jax.analysis.settings import group_by_setting


def test_chance_is_told_by_the_p_that_is_adjusted_for_all_comparisons(tmp_path: Path) -> None:
    accuracies = {"end_to_end": (0.80, 0.80, 0.80), "layerwise": (0.80, 0.70, 0.88), "progressive": (0.85, 0.87, 0.89)}
    for strategy, reached in accuracies.items():
        for seed, accuracy in enumerate(reached):
            run = tmp_path / f"{strategy}-{seed}"
            write_run(run, {"knn": accuracy}, strategy__name=strategy, runtime__seed=seed)
    runs, settings = group_by_setting(results.load_results(tmp_path))
    found = comparisons.compare_all(runs, settings, ["knn"])
    _, said = headline.headline(runs, settings, ["knn"], found)
    assert "7.0 points above end_to_end (95 % CI 2.0 to 12.0, adjusted p = 0.078, 3 seeds)" in said
    assert said.endswith("This may be chance: the adjusted p is not below 0.05.")
    _, said = headline.headline(runs, settings, ["knn"], {})  # of many settings not every pair is compared
    assert "(95 % CI 2.0 to 12.0, not tested: chosen after the fact, 3 seeds)" in said
    assert "chance" not in said


def write_all(top: Path, accuracies: Any, **changes: Any) -> Any:
    """Runs of strategies with these accuracies by protocol and seed."""
    for strategy, by_protocol in accuracies.items():
        for seed, values in enumerate(zip(*by_protocol.values(), strict=True)):
            scores = dict(zip(by_protocol, values, strict=True))
            name = f"{strategy}-{seed}-{len([*top.iterdir()])}"
            write_run(top / name, scores, strategy__name=strategy, runtime__seed=seed, **changes)
    runs, settings = group_by_setting(results.load_results(top))
    names = [*next(iter(accuracies.values()))]
    return list(headline.headline(runs, settings, names, comparisons.compare_all(runs, settings, names)))


def test_what_does_not_beat_the_untrained_encoder_is_not_ahead(tmp_path: Path) -> None:
    """Case 15 of users: layerwise was "best" with 66.2 %, the untrained encoder at 67.2 %."""
    first, second = write_all(
        tmp_path,
        {
            "layerwise": {"linear_probe_5": (0.662,), "knn": (0.5,)},
            "end_to_end": {"linear_probe_5": (0.6,), "knn": (0.7,)},
        },
        untrained=0.672,
    )
    assert first == (
        "Nothing beats the untrained encoder: the most accurate setting, layerwise, reached 66.2 % (linear probe, "
        "5 labels per class; 1 seed, ± 12.5 over draws of labels; untrained: 67.2 %, within that spread)."
    )
    assert second == "Protocols disagree: by kNN, something does (end_to_end, 70.0 %)."


def test_protocols_that_disagree_are_named_and_seeds_below_untrained_counted(tmp_path: Path) -> None:
    first, second, third = write_all(
        tmp_path,
        {
            "layerwise": {"linear_probe_5": (0.8, 0.2), "knn": (0.6, 0.6), "other": (0.2, 0.1)},
            "end_to_end": {"linear_probe_5": (0.3, 0.3), "knn": (0.7, 0.7), "other": (0.1, 0.1)},
        },
    )
    assert (
        "layerwise has the highest accuracy: 50.0 ± 42.4 % (linear probe, 5 labels per class; mean of 2 seeds; "
        in first
    )
    assert "untrained: 25.0 %, above it in 1 of 2 seeds)" in first
    assert second == (
        "Protocols disagree: by kNN, end_to_end has the highest (70.0 %); by kNN, nothing beats the untrained encoder."
    )
    assert third.startswith("layerwise is 20.0 points above end_to_end")


def test_a_best_below_its_own_untrained_encoder_is_no_verdict_on_the_others(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"knn": 0.80}, untrained=0.82, strategy__name="end_to_end")
    write_run(tmp_path / "b", {"knn": 0.78}, untrained=0.70)
    runs, settings = group_by_setting(results.load_results(tmp_path))
    said = list(headline.headline(runs, settings, ["knn"], comparisons.compare_all(runs, settings, ["knn"])))
    assert said[0].startswith("end_to_end has the highest accuracy: 80.0 %")
    assert said[1] == "end_to_end does not beat its own untrained encoder, which others do."


def test_an_effect_that_has_the_names_of_two_settings_is_not_their_difference(tmp_path: Path) -> None:
    for strategy, accuracy in (("progressive", 0.9), ("end_to_end", 0.6), ("layerwise", 0.5)):
        for seed in range(2):
            write_run(tmp_path / f"{strategy}{seed}", {"knn": accuracy}, strategy__name=strategy, runtime__seed=seed)
    for strategy, accuracy in (("progressive", 0.1), ("end_to_end", 0.7)):
        for seed in range(2):
            changes: dict[str, Any] = {"strategy__name": strategy, "optimizer__batch_size": 16}
            write_run(tmp_path / f"x{strategy}{seed}", {"knn": accuracy + 0.01 * seed}, runtime__seed=seed, **changes)
    runs, settings = group_by_setting(results.load_results(tmp_path))
    compared = comparisons.compare_all(runs, settings, ["knn"])
    assert any(d.factor == "strategy" and d.setting == "progressive" for d in compared["knn"])
    said = list(headline.headline(runs, settings, ["knn"], compared))
    assert said[1].startswith("progressive, batch size 512 is 30.0 points above end_to_end")


def test_settings_are_ranked_over_the_seeds_that_they_share(tmp_path: Path) -> None:
    """A run with one lucky seed is neither first, nor do its seeds differ from those of the differences beside it."""
    reached = {"layerwise": (0.5, 0.3), "end_to_end": (0.52,), "progressive": (0.4, 0.41)}
    for strategy, accuracies in reached.items():
        for seed, accuracy in enumerate(accuracies):
            changes: dict[str, Any] = {"strategy__name": strategy, "runtime__seed": seed}
            write_run(tmp_path / f"{strategy}{seed}", {"knn": accuracy}, 0.2 + 0.1 * seed, **changes)
    runs, settings = group_by_setting(results.load_results(tmp_path))
    first, second, third = headline.headline(runs, settings, ["knn"], comparisons.compare_all(runs, settings, ["knn"]))
    assert first.startswith("progressive has the highest accuracy: 40.5 ± 0.7 % (kNN; mean of 2 seeds; untrained: 25.0")
    assert second.startswith("progressive is 0.5 points above layerwise (95 % CI ")
    assert third == "Not ranked, for lack of runs with seeds that others have: end_to_end (52.0 %, 1 seed)."
    assert statistics.common_seeds([[0, 1, 2], range(4), range(4)]) == {0, 1, 2}
    assert statistics.common_seeds([[0, 1, 2]] * 5 + [[0]]) == {0, 1, 2}
    assert statistics.common_seeds([[0], [1], [2]]) == statistics.common_seeds([[0, 1]]) == frozenset()
    (baseline,) = tables.baselines(runs, settings)  # one, although their means differ
    assert (baseline.label, baseline.seeds) == ("untrained", 2)


def test_best_is_within_a_world(tmp_path: Path) -> None:
    accuracies = {"layerwise": {"knn": (0.5, 0.6)}, "end_to_end": {"knn": (0.4, 0.5)}}
    write_all(tmp_path, accuracies, partition__kind="dirichlet", partition__beta=0.1)
    better = {name: {"knn": (0.8, 0.9)} for name in ("layerwise", "end_to_end")}
    said = write_all(tmp_path, better, partition__kind="dirichlet", partition__beta=5.0)
    assert said[0].startswith("beta 0.1: layerwise, beta 0.1 has the highest accuracy: 55.0")
    assert [sentence for sentence in said if sentence.startswith("beta 5: ")]
    runs, settings = group_by_setting(results.load_results(tmp_path))
    compared = comparisons.compare_all(runs, settings, ["knn"])["knn"]
    assert len(compared) == 2  # a pair in each world
