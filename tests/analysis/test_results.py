"""Runs read back, settings, means and paired differences, against numbers worked out by hand."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from runs import MIB, SEEDS, write_run
from scipy.stats import t as student

import lwfedssl_jax
from lwfedssl_jax.analysis import comparisons, results, statistics, tables
from lwfedssl_jax.analysis.settings import Setting, group_by_setting
from lwfedssl_jax.config import ConfigError


@pytest.fixture(scope="module")
def nine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("nine")
    for strategy, accuracies in SEEDS.items():
        for seed, accuracy in enumerate(accuracies):
            write_run(
                top / "runs" / f"{strategy}-{seed}",
                {"linear_probe_5": accuracy, "knn": 0.5},
                strategy__name=strategy,
                runtime__seed=seed,
            )
    return top


def test_a_run_is_a_row(nine: Path) -> None:
    found = lwfedssl_jax.load_results(nine)
    assert len(found) == 9
    row = found.set_index("name").loc["layerwise-1"]
    assert row["path"] == str(nine / "runs" / "layerwise-1")
    assert row["finished"]
    assert (row["strategy.name"], row["runtime.seed"], row["evaluation.labels_per_class"]) == ("layerwise", 1, "5 20 0")
    assert (row["accuracy.linear_probe_5"], row["std.knn"], row["untrained.knn"]) == (0.76, 0.125, 0.25)
    assert (row["traffic_bytes"], row["end_to_end.traffic_bytes"]) == (10 * MIB, 40 * MIB)
    assert (row["flops_paper_rule"], row["flops_executed"], row["peak_memory_bytes"]) == (0.5e9, 0.75e9, 4 * MIB)
    assert (row["measured_bytes_per_client"], row["rounds"], row["seconds"]) == (80, 4, 8)
    assert results.load_results(nine, nine / "runs").equals(found)
    lines = results.load_metrics(nine / "runs" / "layerwise-1")
    assert len(lines) == 8
    assert lines.loc[lines["event"].isna(), "loss"].tolist() == [3, 2, 1, 0]


def test_unfinished_and_damaged_runs_are_rows(tmp_path: Path) -> None:
    whole = {"knn": 0.5}
    write_run(tmp_path / "unfinished")
    for name in ("summary", "no_protocol", "config", "metrics", "without"):
        write_run(tmp_path / name, whole)
    (tmp_path / "summary" / "summary.json").write_text("{")
    (tmp_path / "no_protocol" / "summary.json").write_text('{"evaluation": 3}')
    (tmp_path / "config" / "config.json").write_bytes(b"\xff")
    (tmp_path / "without" / "config.json").unlink()
    with (tmp_path / "metrics" / "metrics.jsonl").open("a") as file:
        file.write('{"round": 5, "lo')
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model": "of another program"}')
    found = results.load_results(tmp_path).set_index("name")
    assert found["fault"].to_dict() == {
        "unfinished": "unfinished after 2 of 4 rounds",
        "summary": "summary.json is damaged",
        "no_protocol": "summary.json is damaged",
        "config": "config.json is damaged",
        "without": "config.json is missing",
        "metrics": "",
    }
    assert found["finished"].equals(found["fault"] == "")
    assert found.loc["unfinished", "rounds"] == 2
    assert math.isnan(found.loc["unfinished", "traffic_bytes"])


def test_runs_of_a_sweep_keep_its_order_names_and_failures(tmp_path: Path) -> None:
    runs = [
        {"directory": f"runs/{n}", "overrides": {"partition.beta": b}, "seed": 0, "label": f"beta = {b}"}
        for n, b in (("z", 0.1), ("a", 0.5), ("bad", 0.0), ("later", 5.0))
    ]
    content = {"name": "mine", "about": "", "runs": runs, "failed": {"runs/bad": "partition.beta: too small"}}
    for run in runs[:2]:
        write_run(tmp_path / run["directory"], {"knn": 0.5}, partition__beta=run["overrides"]["partition.beta"])
    (tmp_path / "sweep.json").write_text(json.dumps(content))
    found = results.load_results(tmp_path)
    assert found["name"].tolist() == ["z", "a", "bad", "later"]
    assert found["fault"].tolist() == ["", "", "partition.beta: too small", "not started"]
    assert [s.label for s in group_by_setting(found)[1]] == ["beta = 0.1", "beta = 0.5"]
    assert results.sweep_name(tmp_path) == "mine"
    write_run(tmp_path / "runs" / "earlier", {"knn": 0.5}, partition__beta=9.0)
    assert results.load_results(tmp_path)["name"].tolist() == ["z", "a", "bad", "later"]
    (tmp_path / "sweep.json").write_text('{"runs": [3]}')
    assert results.load_results(tmp_path)["name"].tolist() == ["a", "earlier", "z"]


def test_runs_on_different_data_are_different_settings(tmp_path: Path) -> None:
    for number, (name, digest) in enumerate((("a", "11"), ("b", "11"), ("c", "22"), ("old", ""))):
        write_run(tmp_path / name, {"knn": 0.5}, runtime__seed=number)
        content = json.loads((tmp_path / name / "config.json").read_text())
        content |= {"data": {"images": digest, "labels": "33"}} if digest else {}
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    rows, settings = group_by_setting(results.load_results(tmp_path))
    assert [setting.label for setting in settings] == ["fingerprint 11 33", "fingerprint 22 33", "fingerprint none"]
    assert rows.groupby("setting").size().to_dict() == {
        "fingerprint 11 33": 2,
        "fingerprint 22 33": 1,
        "fingerprint none": 1,
    }
    write_run(tmp_path / "wider", {"knn": 0.5}, model__width=96)
    found = results.load_results(tmp_path)
    some = found[found["name"].isin(["a", "wider"])]
    assert [setting.values for setting in group_by_setting(some)[1]] == [
        {"model.width": 192, "data.fingerprint": "11 33"}, {"model.width": 96, "data.fingerprint": ""}
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_directory_without_a_run_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"DIR: .*{name} .*accepted"):
        results.load_results(tmp_path / name)


def label(*changes: dict[str, Any]) -> list[str]:
    usual = {"finished": True, "label": "", "config_file": "", "runtime.seed": 0, "strategy.name": "layerwise"}
    rows = [usual | {"path": f"runs/{i}"} | c for i, c in enumerate(changes)]
    return [s.label for s in group_by_setting(pd.DataFrame(rows))[1]]


def test_labels_hold_what_tells_settings_apart() -> None:
    assert label({}) == ["layerwise"]
    assert label({}, {"runtime.seed": 1}) == ["layerwise"]
    beta, layers = "partition.beta", "strategy.layers_per_stage"
    assert label({beta: 0.1}, {beta: 0.5}) == ["beta 0.1", "beta 0.5"]
    assert label({}, {"strategy.name": "progressive", beta: 0.5}) == ["layerwise", "progressive"]  # beta tells no more
    assert label({"additions.terms": ""}, {"additions.terms": "proximal=1"}) == ["terms none", "terms proximal=1"]
    usual = [{layers: 1, "strategy.name": s} for s in ("layerwise", "progressive", "end_to_end")]
    assert label(*usual, {layers: 2})[2:] == ["end_to_end", "layerwise, layers per stage 2"]
    assert label({beta: 0.12345678}, {beta: 0.12345679}) == ["beta 0.12345678", "beta 0.12345679"]
    assert label({"fleet.devices": None}, {"fleet.devices": ""}) == ["devices unknown", "devices none"]  # older, newer
    named = {"label": "small"}, {"label": "large", beta: 0.5}
    assert label(*named) == ["small", "large"]
    assert label(named[0], named[1] | {"path": "other/1"}) == ["beta unknown", "beta 0.5"]  # of two sweeps
    assert label({"config_file": "0123456789"}, {"config_file": ""}) == ["config file 01234567", "config file by name"]


def test_a_seed_counts_once(nine: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "again", {"linear_probe_5": 0.1}, strategy__name="layerwise", runtime__seed=1)
    runs, settings = group_by_setting(results.load_results(nine, tmp_path))
    assert [s.label for s in settings] == list(SEEDS)
    assert len(runs) == 9
    mean, std, count = statistics.over_seeds(runs).loc["end_to_end", "accuracy.linear_probe_5"]
    assert (mean, count) == (pytest.approx(0.83), 3)
    assert std == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2))


def test_settings_that_are_nearly_alike_keep_their_runs(tmp_path: Path) -> None:
    for seed in (0, 1):
        for beta in (0.12345678, 0.12345679):
            write_run(tmp_path / f"{seed}-{beta}", {"knn": beta}, partition__beta=beta, runtime__seed=seed)
    runs, settings = group_by_setting(results.load_results(tmp_path))
    assert len(runs) == 4
    assert statistics.over_seeds(runs)["accuracy.knn", "count"].tolist() == [2, 2]
    assert len({s.label for s in settings}) == 2


def test_differences_are_paired_over_seeds(nine: Path) -> None:
    runs, settings = group_by_setting(results.load_results(nine))
    below, even, above = comparisons.compare_all(runs, settings, ["linear_probe_5"])["linear_probe_5"]
    assert [(d.setting, d.against) for d in (below, even, above)] == [
        ("layerwise", "end_to_end"), ("progressive", "end_to_end"), ("progressive", "layerwise"),
    ]  # fmt: skip
    values = np.array([0.04, 0.06, 0.11])
    error = math.sqrt(((values - 0.07) ** 2).sum() / 2 / 3)
    half = 4.302652729911275 * error  # of Student's t with 2 degrees of freedom
    assert below.mean == pytest.approx(-0.07)
    assert (below.low, below.high) == (pytest.approx(-0.07 - half), pytest.approx(-0.07 + half))
    assert below.p == pytest.approx(2 * student.sf(0.07 / error, 2))
    assert even.mean == pytest.approx(0)
    assert above.p < below.p < even.p
    assert above.p_holm == pytest.approx(3 * above.p)
    assert below.p_holm == pytest.approx(max(3 * above.p, 2 * below.p))
    assert str(below) == ("layerwise is 7.0 points below end_to_end (95 % CI -2.0 to 16.0, adjusted p = 0.17, 3 seeds)")


def test_without_spread_or_seeds_nothing_is_tested(nine: Path) -> None:
    runs, settings = group_by_setting(results.load_results(nine))
    same = comparisons.compare_all(runs, settings, ["knn"])["knn"]
    assert all(d.mean == 0 and math.isnan(d.p) and math.isnan(d.p_holm) for d in same)
    assert same[0].why_not == "the same in all 3 seeds: no test"
    one = runs[(runs["strategy.name"] != "layerwise") | (runs["runtime.seed"] == 2)]
    assert statistics.paired(one, "layerwise", "end_to_end", "linear_probe_5").why_not == "1 common seed: no test"
    none = runs[(runs["strategy.name"] == "layerwise") == (runs["runtime.seed"] == 2)]
    apart = statistics.paired(none, "layerwise", "end_to_end", "linear_probe_5")
    assert str(apart) == "layerwise and end_to_end share no seed"


def test_holm_by_hand() -> None:
    nan = float("nan")
    assert statistics.holm([0.04, nan, 0.01, 0.03]) == pytest.approx([0.06, nan, 0.03, 0.06], nan_ok=True)
    assert statistics.holm([0.7, 0.9]) == [1, 1]
    assert statistics.holm([]) == []


def test_many_settings_stand_against_the_end_to_end_that_is_nearest() -> None:
    names = [(s, b, d) for d in ("digits", "other") for b in (0.1, 0.5) for s in ("layerwise", "end_to_end")]
    settings = [
        Setting(f"{s} {b} {d}", s, "", {"strategy.name": s, "partition.beta": b, "data.name": d}) for s, b, d in names
    ]
    pairs = [(a.label, b.label) for a, b in statistics.pairs_of(settings)]
    assert pairs == [(f"layerwise {b} {d}", f"end_to_end {b} {d}") for s, b, d in names if s == "layerwise"]
    alike = [s._replace(strategy="layerwise") for s in settings]
    assert {b.label for _, b in statistics.pairs_of(alike)} == {alike[0].label}


def test_every_format_says_the_same(nine: Path, tmp_path: Path) -> None:
    runs, settings = group_by_setting(results.load_results(nine))
    table = tables.settings_table(runs, settings)
    assert table.words["linear probe, 5 labels per class (%)"].tolist() == [
        "83.0 ± 3.6", "76.0 ± 0.0", "83.0 ± 3.0", "25.0 ± 0.0",
    ]  # fmt: skip
    assert table.words["traffic (MiB)"].tolist() == ["40.00", "10.00 (0.25x)", "20.00 (0.50x)", "-"]
    tables.write(table, tmp_path)
    markdown = (tmp_path / "settings.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown]
    assert cells[0] == list(table.words.columns)
    assert cells[2:] == table.words.to_numpy().tolist()
    tex = (tmp_path / "settings.tex").read_text().splitlines()
    body = [line for line in tex if line.endswith(r"\\")]
    said = [[c.strip() for c in line.removesuffix(r"\\").split("&")] for line in body]
    plain = [[c.replace(r"$\pm$", "±").replace(r"\_", "_").replace(r"\%", "%") for c in row] for row in said]
    assert plain == [cells[0], *cells[2:]]
    assert [line for line in tex if "rule" in line] == [r"\toprule", r"\midrule", r"\bottomrule"]
    numbers = pd.read_csv(tmp_path / "settings.csv")
    accuracy = zip(numbers["linear_probe_5 %"], numbers["linear_probe_5 % std"], strict=True)
    assert [f"{mean:.1f} ± {std:.1f}" for mean, std in accuracy] == [row[2] for row in cells[2:]]
    assert numbers["traffic_bytes"].tolist()[:3] == [40 * MIB, 10 * MIB, 20 * MIB]


def test_costs_are_in_the_papers_form() -> None:
    whole = {"flops_paper_rule": 585.6e9, "flops_executed": 2e12, "peak_memory_bytes": 8 * 2**30}
    strategies = {
        "end_to_end": whole | {"total_bytes": 8400 * MIB},
        "layerwise": whole | {"total_bytes": 1660 * MIB, "flops_paper_rule": 139.4e9, "peak_memory_bytes": None},
    }
    words = tables.resources_table(pd.DataFrame(), [], strategies).words.set_index("strategy")
    assert words["communication (1000 MiB)"].tolist() == ["8.40", "1.66 (0.20x)"]
    assert words["multiply-adds, paper's rule (G)"].tolist() == ["585.60", "139.40 (0.24x)"]
    assert words["peak memory (GiB)"].tolist() == ["8.00", "-"]


def test_latex_and_markdown_take_any_character(tmp_path: Path) -> None:
    words = pd.DataFrame({"a_b": ["50 % & {#1} ~^ \\x $ 1 ± 2 | 3"]})
    tables.write(tables.Table("odd", words, words), tmp_path)
    line = (tmp_path / "odd.tex").read_text().splitlines()[4]
    said = r"50 \% \& \{\#1\} \textasciitilde \textasciicircum \space \textbackslash x \$ 1 $\pm$ 2 | 3 \\"
    assert line == said
    assert r"1 ± 2 \| 3" in (tmp_path / "odd.md").read_text()
