"""What reports, terminals and commands say about private runs."""

import html
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config
from rich.console import Console
from runs import write_run

from lwfedssl_jax import cli
from lwfedssl_jax.analysis import comparisons, headline, report, results, tables, terminal
from lwfedssl_jax.analysis.settings import group_by_setting
from lwfedssl_jax.costs import privacy
from lwfedssl_jax.costs.operations import stage_parts

PRIVATE: dict[str, Any] = {
    "privacy__clip": 0.01, "privacy__noise_multiplier": 1.0, "federation__sampling": "poisson",
    "federation__clients_per_round": 2,
}  # fmt: skip


def write_private(path: Path, accuracy: float, noise_only: float, **changes: Any) -> None:
    """A finished run of a private config, with the promise of a small one."""
    fields = PRIVATE | changes
    write_run(path, {"knn": accuracy}, untrained=0.5, **fields)
    config = small_config(**fields)
    costs = [{"stage": i, "trainable_parameters": 10_000} for i in (1, 2, 3)]
    promise = privacy.promise(config, [part.stage for part in stage_parts(config)], costs)
    summary = json.loads((path / "summary.json").read_text())
    summary["baselines"]["noise_only"] = {"knn": {"accuracy": noise_only}}
    (path / "summary.json").write_text(json.dumps(summary | {"privacy": promise}))


def test_what_training_adds_to_the_noise_is_said(tmp_path: Path) -> None:
    for seed, noise in enumerate((0.70, 0.58)):
        write_private(tmp_path / f"a{seed}", 0.60, noise, strategy__name="layerwise", runtime__seed=seed)
        write_private(tmp_path / f"b{seed}", 0.55, noise, strategy__name="end_to_end", runtime__seed=seed)
    runs, settings = group_by_setting(results.load_results(tmp_path))
    found = comparisons.compare_all(runs, settings, ["knn"])
    first, noise, tuned, *_ = headline.headline(runs, settings, ["knn"], found)
    assert first.startswith("layerwise has the highest accuracy: 60.0")
    assert noise == (
        "The noise of layerwise alone gives 64.0 %; training adds nothing: -4.0 points (above it in 1 of 2 seeds)."
    )
    assert tuned.startswith("Under noise, strategies can be compared only if privacy.clip was tuned for each of them")
    words = tables.settings_table(runs, settings).words
    assert [row for row in words["setting"] if row.startswith("noise only, nothing learnt")]


def test_other_epsilons_are_other_worlds_and_clips_are_not(tmp_path: Path) -> None:
    write_private(tmp_path / "a", 0.6, 0.5)
    write_private(tmp_path / "b", 0.7, 0.5, privacy__noise_multiplier=0.5)
    write_private(tmp_path / "c", 0.8, 0.5, privacy__clip=0.02)
    runs, settings = group_by_setting(results.load_results(tmp_path))
    said = list(headline.headline(runs, settings, ["knn"], comparisons.compare_all(runs, settings, ["knn"])))
    worlds = [sentence for sentence in said if "has the highest accuracy" in sentence or "reached" in sentence]
    assert len(worlds) == 2


def test_the_page_has_the_promise_and_what_it_does_not_cover(tmp_path: Path) -> None:
    write_private(tmp_path / "a", 0.6, 0.55)
    write_private(tmp_path / "b", 0.6, 0.55, privacy__noise_cohort=40)
    page = report.write_report([tmp_path], tmp_path / "out").read_text(encoding="utf-8")
    for text in ("What is promised to a client", "-differentially private for whole clients", *privacy.NOT_COVERED):
        assert text in html.unescape(page)
    assert "That is of a federation of 80 clients, 40 per round" in page
    table = (tmp_path / "out" / "tables" / "privacy.md").read_text(encoding="utf-8")
    assert "†" in table
    assert "2 of 4, poisson" in table
    write_private(tmp_path / "c", 0.7, 0.5, privacy__noise_multiplier=0.5)
    write_run(tmp_path / "d", {"knn": 0.75}, federation__clients_per_round=2)
    page = report.write_report([tmp_path], tmp_path / "out").read_text(encoding="utf-8")
    assert "against epsilon, mean" in page
    assert [*(tmp_path / "out" / "plots").glob("accuracy_against_epsilon_knn.*")]
    write_run(tmp_path / "plain" / "a", {"knn": 0.5})
    plain = report.write_report([tmp_path / "plain"], tmp_path / "plain" / "out").read_text(encoding="utf-8")
    assert "What is promised" not in plain


def test_the_terminal_shows_noise_alone_and_the_promise(tmp_path: Path) -> None:
    write_private(tmp_path / "a", 0.6, 0.55)
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    console = Console(width=150, record=True)
    summary["evaluation"]["knn"] |= {"depth": 3, "neighbours": 20, "classifier": "votes"}
    console.print(terminal.summary_tables(summary))
    shown = " ".join(console.export_text().split())
    assert "noise only %" in shown
    assert "55.0" in shown
    assert "-differentially private for whole clients" in shown


TINY = ["--model.depth", "3", "--model.width", "8", "--model.heads", "2", "--data.image-size", "8"]


def test_resources_says_what_noise_is_over_the_clip(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--privacy.clip", "0.01", "--privacy.noise-multiplier", "2", "--federation.dropout", "0.5"]
    command = ["resources", "quickstart", *TINY, *given, "--no-memory"]
    assert cli.main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name, ledger in found["strategies"].items():
        stages = found["privacy"][name]["per_stage"]
        for stage, cost in zip(stages, ledger["per_stage"], strict=True):
            clients = found["config"]["partition"]["clients"] * 0.5
            assert stage["noise_over_clip"] == pytest.approx(2 * cost["trainable_parameters"] ** 0.5 / clients)
    assert cli.main(command) == 0
    assert "Norm of a round's noise over the clip" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("priced")
def test_a_plan_says_what_an_epsilon_takes(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "quickstart", *TINY, "--memory-gb", "4", "--examples", "100", "--epsilon", "8"]
    assert cli.main([*command, "--delta", "1e-5", "--json"]) == 0
    options = json.loads(capsys.readouterr().out)["options"]
    for option in options:
        found, parameters = option["privacy"], max(s["trainable_parameters"] for s in option["per_stage"])
        assert found["clients"] == pytest.approx(found["noise_multiplier"] * parameters**0.5, abs=1)
    assert len({option["privacy"]["noise_multiplier"] for option in options}) == 1
    assert cli.main(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Privacy: epsilon 8 at delta" in said
    assert "Cohorts of a fixed size hide nobody" in said or "10 of 10 clients" in said


@pytest.mark.usefixtures("priced")
def test_a_plan_names_the_options_in_which_nobody_can_take_part(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "quickstart", *TINY, "--examples", "100", "--epsilon", "8", "--delta", "1e-5"]
    assert cli.main([*command, "--memory-gb", "4", "--json"]) == 0
    options = json.loads(capsys.readouterr().out)["options"]
    needs = sorted({max(s["peak_memory_bytes"] for s in option["per_stage"]) for option in options})
    assert cli.main([*command, "--memory-gb", str((needs[0] + needs[-1]) / 2e9)]) == 0
    said = " ".join(capsys.readouterr().out.split()).partition("Privacy:")[2]
    assert "No client can take part in end_to_end" in said
    assert "1: layerwise, 1 layer per stage" in said
    assert "end_to_end" not in said.partition("No client")[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epsilon", "0"], "--epsilon: 0.0 is out of range; accepted: above 0"),
        (["--epsilon", "8", "--delta", "0.5"], "--delta: 0.5 is not between 1e-12 and 1 / "),
        (
            ["--epsilon", "8", "--federation.aggregator", "ldawa"],
            "--epsilon: 8.0 cannot be had: federation.aggregator: ldawa uses more than the mean",
        ),
        (["--delta", "1e-5"], "--delta: 1e-05 needs --epsilon; accepted: both options, or neither"),
    ],
)
def test_a_plans_epsilon_is_checked(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "quickstart", "--memory-gb", "4", *given]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
