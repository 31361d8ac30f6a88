"""Options of a plan, their prices, and what it recommends."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, known_traces, small_config
from fleets import LARGE_BOX, PAPER, SMALL_PHONE, advise, chosen, option

from lwfedssl_jax.config import Config, ConfigError, flat, join_lists, load, override, resolve, to_dict
from lwfedssl_jax.costs import ledger as ledger_module
from lwfedssl_jax.costs import operations, stored
from lwfedssl_jax.costs.ledger import ledgers_of, make_ledger
from lwfedssl_jax.costs.memory import lower_step
from lwfedssl_jax.plan import measured, recommend
from lwfedssl_jax.plan.frontier import frontier
from lwfedssl_jax.plan.make import over_common_seeds
from lwfedssl_jax.plan.measured import Measured
from lwfedssl_jax.plan.options import Option, each_option
from lwfedssl_jax.plan.published import closest, unlike


def test_the_largest_share_decides_then_the_published_accuracy_then_time_then_traffic() -> None:
    layerwise, growing = option("layerwise", 0.9, 0.9), option("progressive", 0.5, 1.5)
    whole = option("end_to_end", 1.0)
    assert chosen(whole, layerwise, growing)[0] is whole
    assert chosen(layerwise, growing)[0] is layerwise
    slow, dear, good = (option("progressive", 0.5, 0.6, **x) for x in ({"flops": 2e9}, {"traffic": 2000}, {}))
    assert chosen(whole, layerwise, slow, dear, good)[0] is good
    assert chosen(slow, dear)[0] is dear
    best, reason = chosen(option("layerwise", 2.0), growing)
    assert best
    assert best.strategy == "progressive"
    assert "25 % of the clients, the most that any option reaches, can take part in every stage" in reason
    assert "Left out: stage 1: none; stage 2: 3 clients with 75 % of the images." in reason
    assert (
        "phone: every option needs 1.5 GB or more (progressive, 1 layer per stage), 0.5 GB above what it has" in reason
    )


def test_measured_accuracy_goes_before_the_published_order() -> None:
    whole, growing = option("end_to_end", 0.9), option("progressive", 0.5, 0.9)
    layerwise = option("layerwise", 0.5, 0.5, measured=Measured(dict.fromkeys(range(3), 0.9)))
    excluding = option("end_to_end", 2.0, measured=Measured({0: 0.99}))
    best, reason = chosen(whole, growing, layerwise, excluding, protocol="knn")
    assert best is layerwise
    assert "highest measured accuracy (kNN; 90.0 ± 0.0 %; mean of 3 seeds)" in reason
    best, reason = chosen(whole, growing, excluding, protocol="knn")
    assert best is growing
    assert "none of them is ranked by kNN" in reason


def test_what_is_not_shown_to_be_better_is_said() -> None:
    def reached(strategy: str, *accuracies: float) -> Option:
        return option(strategy, 0.5, measured=Measured(dict(enumerate(accuracies))))

    best, near = reached("progressive", 0.80, 0.84, 0.85), reached("end_to_end", 0.81, 0.82, 0.85)
    far, once = reached("layerwise", 0.70, 0.74, 0.76), reached("other", 0.79)
    found, reason = chosen(far, near, best, protocol="knn")
    assert found is best
    assert "It is not shown to be better than end_to_end (+0.3 points, adjusted p = 0.74)." in reason
    assert "not shown to be better than other (+1.0 points, 1 common seed: no test)" in chosen(best, once)[1]
    assert "not shown" not in chosen(best, far)[1]
    assert "not shown" not in chosen(best, best._replace(remat=True))[1]
    assert "not shown to be better than end_to_end" in chosen(best, best._replace(strategy="end_to_end"))[1]
    elsewhere = option("other", 0.5, measured=Measured({7: 0.1}))
    assert (
        "better than end_to_end (+0.3 points, adjusted p = 0.74); other (no common seed: no test)."
        in (chosen(best, near, elsewhere)[1])
    )
    shared = option("other", 0.5, measured=Measured({0: 0.82, 1: 0.861, 2: 0.87, 3: 0.1}))
    assert "not shown to be better than other (-2.0 points, adjusted p = " in chosen(best, shared)[1]


def test_options_are_ranked_over_common_seeds() -> None:
    """A single lucky seed neither wins against means over several, nor takes seeds from their comparison."""

    def ranked(**accuracies: dict[int, float]) -> tuple[Option | None, str]:
        named = {"one": "layerwise", "two": "progressive", "three": "end_to_end"}
        made = [option(named[name], 0.5, measured=Measured(found)) for name, found in accuracies.items()]
        return chosen(*over_common_seeds(made), protocol="knn")

    lucky, steady, worse = {0: 0.52}, {0: 0.53, 1: 0.46}, {0: 0.40, 1: 0.41}
    best, reason = ranked(one=lucky, two=steady)
    assert best
    assert best.strategy == "progressive"
    assert "accuracy (kNN; 53.0 %; 1 seed). It is not shown to be better than layerwise (+1.0 points, 1 com" in reason
    best, reason = ranked(one={0: 0.9}, two=steady, three=worse)
    assert best
    assert best.strategy == "progressive"
    assert "49.5 ± 4.9 %; mean of 2 seeds)" in reason
    assert "Not ranked, for lack of a run with each of the seeds 0, 1: layerwise (90.0 %; 1 seed)" in reason
    best, _ = ranked(one={0: 0.5}, two={1: 0.6})
    assert best
    assert best.strategy == "progressive"  # no seed in common: each by its own


def test_the_shallow_control_is_compared_over_common_seeds() -> None:
    best = option("layerwise", 0.5, 0.5, measured=Measured({0: 0.5, 1: 0.6}))
    control = {1: Measured({0: 0.6, 1: 0.7, 2: 0.1}, {0: 0.4, 1: 0.4})}
    said = chosen(best, option("end_to_end", 0.5), protocol="knn", shallow=control)[1]
    assert (
        "An encoder with 1 layer, trained end to end in as many rounds, is as accurate, or more, with 65.0 ± 7.1 %"
        in said
    )
    assert "Of the 1 measured option with this share (without a rank: 1), it has the highest" in said
    assert "reached 15.0" in chosen(best, protocol="knn", shallow={1: Measured({0: 0.1, 1: 0.2})})[1]
    assert "An encoder" not in chosen(best, protocol="knn", shallow={1: Measured({7: 0.9})})[1]


def test_why_one_of_equals_is_chosen() -> None:
    quick, frugal = option("progressive", 0.5), option("progressive", 0.5, traffic=900, flops=2e9)
    assert "; among equals it takes the least time" in chosen(quick, frugal)[1]
    alike = [quick._replace(seconds=0.0, remat=remat) for remat in (False, True)]
    assert "among equals" not in chosen(*alike)[1]
    assert "; among equals it takes the least traffic" in chosen(*alike, frugal._replace(seconds=0.0))[1]
    few, many = option("progressive", 2.0), option("progressive", 0.5, flops=9e9)
    assert "; among equals most clients can take part in it" in chosen(few, many, aim="accuracy")[1]


def test_that_nothing_beats_the_untrained_encoder_is_said_first() -> None:
    def reached(strategy: str, untrained: float) -> Option:
        return option(strategy, 0.5, measured=Measured({0: 0.5}, {0: untrained}))

    reason = chosen(reached("layerwise", 0.5), reached("progressive", 0.6), protocol="knn")[1]
    assert reason.startswith("No measured option is more accurate than its untrained encoder. layerwise: ")
    assert "50.0 %; 1 seed; untrained: 50.0 %)" in reason
    assert "No measured" not in chosen(reached("layerwise", 0.5), reached("progressive", 0.4), protocol="knn")[1]
    unknown = option("progressive", 0.5, measured=Measured({0: 0.4}))
    assert "No measured" not in chosen(reached("layerwise", 0.5), unknown, protocol="knn")[1]
    better = option("progressive", 0.5, measured=Measured({0: 0.4}, {0: 0.3}))
    assert (
        "It is not more accurate than its own untrained encoder"
        in (chosen(reached("layerwise", 0.5), better, protocol="knn")[1])
    )


def test_what_lacks_seeds_is_not_chosen_as_measured_where_the_ranked_do_not_fit() -> None:
    lucky = option("layerwise", 0.5, measured=Measured({0: 0.9}))
    large = [option(name, 9.0, measured=Measured({0: 0.5, 1: 0.5})) for name in ("end_to_end", "other")]
    best, reason = chosen(*over_common_seeds([lucky, option("progressive", 0.5), *large]), protocol="knn")
    assert best
    assert best.strategy == "progressive"
    assert "none of them is ranked by kNN" in reason
    assert "Not ranked, for lack of a run with each of the seeds 0, 1: layerwise (90.0 %; 1 seed)" in reason


def test_where_nothing_fits_the_nearest_is_said() -> None:
    best, reason = chosen(option("end_to_end", 8.0), option("layerwise", 4.0, 4.5))
    assert best is None
    assert reason.startswith("No class can take part in every stage of any option.")
    assert "phone: every option needs 4.5 GB or more (layerwise, 1 layer per stage), 3.5 GB above" in reason
    assert "optimizer.batch_size 256 or less" in reason  # of 512; the box has two thirds of what it needs


def test_options_are_distinct() -> None:
    found, refused = each_option(small_config(model__depth=4, federation__rounds=3))
    each = [("end_to_end", 4), *((name, 2) for name in ("layerwise", "progressive"))]
    assert set(found) == {(name, k, remat) for name, k in each for remat in (False, True)}
    assert set(refused) == {f"{name}, 1 layer per stage" for name in ("layerwise", "progressive")}
    assert all((c.strategy.name, c.strategy.layers_per_stage, c.runtime.remat) == key for key, c in found.items())


def test_options_together_are_priced_as_each_alone() -> None:
    found, _ = each_option(small_config(model__depth=2))
    assert ledgers_of(found, memory=False) == {key: make_ledger(config) for key, config in found.items()}


def test_what_options_share_is_traced_once() -> None:
    found, _ = each_option(small_config(model__depth=2))
    known: dict[Any, Any] = {}
    steps = [lower_step(c, part, known)[0] for c in found.values() for part in operations.stage_parts(c)]
    assert len(steps) == 2 * (1 + 2 + 2)
    assert len({step.as_text() for step in steps}) == len(known) == 2 * 3  # layer 1, layer 2, both; remat or not


def test_published_accuracies_rank_options_and_the_settings_that_differ_are_named() -> None:
    table = closest(PAPER)
    assert table.accuracy("progressive", 6) == 0.6572
    assert table.accuracy("progressive", 5) == table.accuracy("progressive", 4) == 0.647
    assert table.accuracy("layerwise", 2) > table.accuracy("end_to_end", 12) > table.accuracy("layerwise", 1)
    assert table.accuracy("a_users_own", 1) is None
    assert unlike(PAPER, table) == ["data.name tfds:cifar10 (published: COCO's images)"]
    drawn = closest(override(PAPER, {"partition.clients": 40, "federation.clients_per_round": 9}))
    assert "25 of 100 clients per round" in drawn.setting
    assert drawn.accuracy("end_to_end", 12) == 0.7185
    assert drawn.accuracy("layerwise", 3) == drawn.accuracy("layerwise", 1) == 0.8433  # progressive gains 0.1 points
    gain = 0.8808 - 0.8653  # of progressive, the smaller one: the order of one layer per stage is kept
    assert drawn.accuracy("layerwise", 6) == pytest.approx(0.8433 + gain)
    assert drawn.accuracy("progressive", 6) == pytest.approx(0.8518 + gain)
    _, _, results = (ROOT / "docs" / "results.md").read_text().partition("## 25 of 100 clients")
    for points, claim in (("5.4", "layerwise above end_to_end"), ("1.4", "progressive above end_to_end")):
        assert points in drawn.own_study
        assert re.search(rf"{claim} .*rounds \| -{points} .*contradicted", results)
    assert not table.own_study
    assert not closest(override(PAPER, {"federation.dropout": 0.2})).own_study
    assert "25 % drop out" in closest(override(PAPER, {"federation.dropout": 0.2})).setting
    assert "ResNet-18" in closest(resolve(load("paper/resnet18_mocov3_layerwise"))).setting
    quick = resolve(load("quickstart"))
    assert "partition.kind dirichlet (published: iid)" in unlike(quick, closest(quick))
    assert "strategy.first_stage_share 0.72 (published: even stages)" in unlike(quick, closest(quick))


def test_the_most_layers_that_fit_win_and_the_next_steps_are_named() -> None:
    """As with the paper's config and 4 GB: progressive with 6 layers and remat, without remat layerwise with 4."""
    layerwise = [option("layerwise", 0.1 * k, 0.1 * k, layers=k, flops=k * 1e9) for k in (1, 4, 6)]
    growing = [
        option("progressive", 0.6, 2, layers=6),
        option("progressive", 0.6, 0.9, layers=6, remat=True, flops=9e9),
    ]
    found = advise(*layerwise, *growing)
    assert found.option is growing[1]
    assert found.reason.startswith("progressive, 6 layers per stage, with runtime.remat: all clients")
    assert "highest published accuracy, 65.7 % (arXiv 2401.11647, on other data)" in found.reason
    assert "Without runtime.remat, the choice is layerwise, 6 layers per stage, 100 % of the clients." in found.reason
    assert found.up is None
    assert found.down is layerwise[2]
    words = recommend.step_words(layerwise[2], growing[1], [SMALL_PHONE, LARGE_BOX])
    assert words.startswith("layerwise, 6 layers per stage: -1.1 points of published accuracy; time ")
    assert "the same traffic per device; peak memory 0.6 GB instead of 0.9 GB" in words
    assert advise(*layerwise, *growing, aim="cheapest").option is layerwise[0]
    assert advise(*layerwise, growing[0], aim="accuracy").option is growing[0]
    assert advise(*layerwise, growing[0]).option is layerwise[2]
    up = advise(*layerwise, growing[0]).up
    assert up is growing[0]
    assert "25 % instead of 100 % of the clients throughout (none of phone)" in recommend.step_words(
        up, layerwise[2], [SMALL_PHONE, LARGE_BOX]
    )
    worse = option("layerwise", 0.7, 0.7, layers=6, flops=9e9)
    assert worse not in frontier([*layerwise, worse])
    assert layerwise[2] in frontier([*layerwise, worse])


def row(config: Config, accuracy: float, **changes: Any) -> dict[str, Any]:
    fields = join_lists(flat(to_dict(config)))
    scores = {"accuracy.knn": accuracy, "accuracy.linear_probe_all": accuracy + 0.1, "accuracy.fine_tune": math.nan}
    return fields | scores | {"finished": True} | {name.replace("__", "."): v for name, v in changes.items()}


def test_accuracies_are_means_over_runs_that_are_like_the_config() -> None:
    config = small_config()
    rows = [
        row(config, 0.5),
        row(config, 0.7, runtime__seed=1, runtime__remat=True),
        row(config, 0.1, finished=False),
        row(config, 0.1, partition__beta=9.0),
        row(config, 0.1, fleet__devices="phone count=1 memory_gb=1"),
        row(config, 0.6, strategy__name="end_to_end"),
        row(config, 0.1, strategy__pacing="adaptive"),
    ]
    layers, whole = ((0, 1, 1), (1, 2, 1), (2, 3, 1)), ((0, 3, 3),)  # with the rounds of each stage
    found = {layers: Measured({0: 0.5, 1: 0.7}), whole: Measured({0: 0.6})}
    assert found[layers].accuracy == pytest.approx(0.6)
    assert found[layers].std == pytest.approx(math.sqrt(0.02))
    assert math.isnan(found[whole].std)
    both = {(stages, remat): measured for stages, measured in found.items() for remat in (False, True)}
    assert measured.measured_accuracies(config, rows, "knn")[:3] == ("knn", False, both)
    control = row(config, 0.65, strategy__name="end_to_end", model__depth=1, runtime__seed=1)
    elsewhere = row(
        config, 0.9, strategy__name="end_to_end", model__depth=2, fleet__devices="phone count=1 memory_gb=1"
    )
    longer = row(config, 0.9, strategy__name="end_to_end", model__depth=2, federation__rounds=99)
    assert measured.measured_accuracies(config, [*rows, control, longer, elsewhere], "knn").shallow == {
        1: Measured({1: 0.65})
    }
    assert measured.measured_accuracies(config, rows, None).protocol == "knn"  # as a report leads
    on_fleet = small_config(fleet__devices=("phone count=1 memory_gb=1",))
    assert measured.measured_accuracies(on_fleet, rows, "knn")[:3] == (
        "knn", True, {(layers, False): Measured({0: 0.1})}
    )  # fmt: skip
    hurried = row(config, 0.9, fleet__devices=rows[4]["fleet.devices"], fleet__deadline_seconds=60.0)
    assert measured.measured_accuracies(on_fleet, [*rows, hurried], "knn").found == {
        (layers, False): Measured({0: 0.1})
    }
    assert measured.measured_accuracies(on_fleet, [rows[0], hurried], "knn")[1] is False
    before_fleets = row(config, 0.5, fleet__devices=math.nan, fleet__deadline_seconds=math.nan)
    assert measured.measured_accuracies(config, [before_fleets], "knn").found[layers, False] == Measured({0: 0.5})
    other = row(config, 0.5) | {"data.fingerprint": "22"}
    assert measured.measured_accuracies(config, [*rows, other], "knn").found
    rows[0] |= {"data.fingerprint": "11"}
    assert not measured.measured_accuracies(config, [*rows, control | {"data.fingerprint": "22"}], "knn").shallow
    with pytest.raises(
        ConfigError, match=r"^--results: 5 runs .* trained on 2 different data sets .* '22'\); accepted"
    ):
        measured.measured_accuracies(config, [*rows, other], "knn")
    with pytest.raises(
        ConfigError, match=r"^--protocol: fine_tune has evaluated none .*; accepted: knn, linear_probe_all"
    ):
        measured.measured_accuracies(config, rows, "fine_tune")
    with pytest.raises(ConfigError, match=r"none like this config: partition.beta is 9.0 there, 0.5 here; accepted: "):
        measured.measured_accuracies(config, rows[3:4], None)


def test_a_ledger_is_kept_until_something_changes_that_it_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, compiled = resolve(small_config(model__depth=1)), list[str]()
    monkeypatch.setattr(stored.devices, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(ledger_module, "peak_memory", lambda programs, notify: {p.as_text(): 7 for p in programs})

    def cost(config: Config) -> Any:
        compiled.clear()
        return ledgers_of({"it": config}, memory=True, notify=compiled.append, known=known_traces())["it"]

    first = cost(config)
    assert first["peak_memory_bytes"] == 7
    assert compiled
    assert cost(override(config, {"runtime.seed": 5, "evaluation.neighbours": 3})) == first
    assert not compiled
    (file,) = (tmp_path / "ledgers").iterdir()
    cost(override(config, {"optimizer.batch_size": 3}))
    assert compiled
    file.write_text("{")  # damaged
    assert cost(config) == first
    assert compiled
    monkeypatch.setattr(stored, "code_digest", lambda: "another version")
    cost(config)
    assert compiled
    monkeypatch.setitem(stored.STRATEGIES, "mine", lambda layers, k: [(0, layers)])
    assert stored.ledger_file(config) is None  # a user's code may change without a trace
    monkeypatch.setattr(stored.devices, "cache_folder", lambda: None)
    assert stored.read(config) is None


def test_measured_and_published_accuracies_are_not_subtracted() -> None:
    measured = option("end_to_end", 2.0, measured=Measured({0: 0.81}))
    found = advise(option("layerwise", 0.5), measured, protocol="knn")
    assert found.option
    assert (found.option.strategy, found.up, found.down) == ("layerwise", None, None)


def test_without_a_deadline_no_class_is_too_slow() -> None:
    phone_fits, box_only = option("layerwise", 0.5), option("progressive", 2.0)
    _, reason = chosen(phone_fits, box_only, aim="accuracy")
    assert "deadline" not in reason
    assert "phone: it could take part throughout in layerwise" in reason
