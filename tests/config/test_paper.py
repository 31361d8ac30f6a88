"""The paper's settings: sweeps instead of the configs that were removed, and its figures beside the ledger's."""

import csv
import functools
from pathlib import Path

import pytest
from conftest import ROOT, known_traces

from lwfedssl_jax.cli import main
from lwfedssl_jax.cli.options import TrainOptions, parse
from lwfedssl_jax.config import CONFIG_DIR, REPLACED, SWEEPS, Config, ConfigError, available, load, resolve
from lwfedssl_jax.costs.ledger import all_strategies, make_ledger
from lwfedssl_jax.sweep import Sweep
from lwfedssl_jax.sweep.directory import SweepDirectory
from lwfedssl_jax.sweep.grid import load_sweep, make_runs

PAGE = ROOT / "docs" / "paper_figures.md"
REMOVED = list(csv.DictReader((CONFIG_DIR / REPLACED).read_text().splitlines()))
BETA_1 = "paper/vit_tiny_mocov3_layerwise_beta_1"
INSTEAD = "paper/vit_tiny_mocov3 --partition.kind dirichlet --partition.beta 1, or the sweep paper/beta"


@functools.cache
def config_of(command: str) -> Config:
    """The config that CONFIG and its options give on the command line, resolved."""
    return resolve(parse(TrainOptions, command.split()).config)


def rows(heading: str) -> list[dict[str, str]]:
    """The table under a heading of docs/paper_figures.md, one entry per row: its cells by column."""
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    columns, _, *body = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(columns, cells, strict=True)) for cells in body]


ACCURACIES, COSTS = rows("Accuracy"), rows("Costs")
COMMAND = "CONFIG and options"
BY_COMMAND = {row[COMMAND]: row for row in COSTS}


@pytest.mark.parametrize("sweep", sorted({row["sweep"] for row in REMOVED}))
def test_a_sweep_has_one_run_for_each_config_that_it_replaces(sweep: str) -> None:
    runs = [run.config for run in load_sweep(sweep).runs]
    replaced = [config_of(row["instead"]) for row in REMOVED if row["sweep"] == sweep]
    assert len(runs) == len(replaced)
    assert set(runs) == set(replaced)


def test_removed_names_are_gone_and_the_sweeps_that_replace_them_exist() -> None:
    names = {name for name, _ in available()}
    assert not names & {row["removed"] for row in REMOVED}
    assert {f"{SWEEPS}/{row['sweep']}" for row in REMOVED} <= {n for n in names if n.startswith(f"{SWEEPS}/paper/")}
    assert all(f"`{row['sweep']}`" in PAGE.read_text() for row in REMOVED)
    assert len({row["removed"] for row in REMOVED}) == len({row["instead"] for row in REMOVED}) == len(REMOVED)
    assert sum(name.startswith("paper/") for name in names) <= 25


@pytest.mark.parametrize("name", [BETA_1, f"configs/{BETA_1}.py", str(CONFIG_DIR.resolve() / f"{BETA_1}.py")])
@pytest.mark.parametrize("command", ["train", "resources", "plan"])
def test_a_removed_name_is_refused_with_what_replaces_it(
    command: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, name]) == 2
    assert capsys.readouterr().err == f"error: CONFIG: {name} was replaced; accepted: {INSTEAD}\n"


def test_a_sweep_around_a_removed_name_is_refused_likewise() -> None:
    with pytest.raises(ConfigError) as error:
        make_runs(Sweep(BETA_1))
    assert str(error.value) == f"SWEEP: base: {BETA_1} was replaced; accepted: {INSTEAD}"


def test_a_sweep_in_a_folder_is_found_by_its_whole_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / SWEEPS / "mine").mkdir(parents=True)
    file = tmp_path / SWEEPS / "mine" / "small.py"
    file.write_text('from lwfedssl_jax.sweep import Sweep\nsweep = Sweep("quickstart")\n')
    found = load_sweep("mine/small", tmp_path)
    assert found.name == load_sweep(f"{SWEEPS}/mine/small", tmp_path).name == "mine/small"
    assert load_sweep(str(file)).name == "small"
    with pytest.raises(ConfigError, match=r"SWEEP: 'mine/smal' is not a sweep; accepted: mine/small, or"):
        load_sweep("mine/smal", tmp_path)
    directory = SweepDirectory(Path("runs") / "sweeps" / found.name, found)
    directory.take()
    directory.close()
    assert (tmp_path / "runs" / "sweeps" / "mine" / "small" / "sweep.json").is_file()
    assert main(["train", f"{SWEEPS}/paper/beta"]) == 2
    assert "`sweep paper/beta` runs the sweep" in capsys.readouterr().err


def ours(ledger: dict[str, float]) -> dict[str, str]:
    """The columns of the costs that the ledger fills."""
    traffic, rule, executed = (ledger[key] for key in ("total_bytes", "flops_paper_rule", "flops_executed"))
    return {
        "traffic, ours": f"{traffic / 2**20 / 1000:.2f}",
        "paper's rule, ours": f"{rule / 1e9:.1f}",
        "executed, ours": f"{executed / 1e9:.1f}",
    }


@pytest.mark.parametrize("objective", ["mocov3", "simclr"])
def test_published_traffic_and_operations_within_one_percent_of_the_ledger(objective: str) -> None:
    strategies = all_strategies(resolve(load(f"paper/vit_tiny_{objective}")), memory=False, known=known_traces())
    for name, ledger in strategies.items():
        row = BY_COMMAND[f"paper/vit_tiny_{objective}" + ("" if name == "layerwise" else f"_{name}")]
        assert ledger["total_bytes"] / 2**20 / 1000 == pytest.approx(float(row["traffic, published"]), rel=0.01)
        assert ledger["flops_paper_rule"] / 1e9 == pytest.approx(float(row["paper's rule, published"]), rel=0.01)
        assert ours(ledger).items() <= row.items()
    assert strategies["layerwise"]["flops_executed"] < 0.25 * strategies["end_to_end"]["flops_executed"]


@pytest.mark.parametrize(
    "command",
    [
        "paper/vit_tiny_mocov3 --partition.server-share 0.1 --additions.calibration-steps 10",
        "paper/resnet18_mocov3_layerwise",
        "paper/vit_tiny_simclr_fedca",
    ],
)
def test_the_page_has_the_ledgers_figures(command: str) -> None:
    assert ours(make_ledger(config_of(command), known_traces())).items() <= BY_COMMAND[command].items()


def test_every_row_is_a_config_and_every_config_of_the_paper_has_its_costs() -> None:
    assert len(BY_COMMAND) == len(COSTS)
    for row in (*ACCURACIES, *COSTS):
        if row[COMMAND]:
            strategy = config_of(row[COMMAND]).strategy.name
            words = row["setting"].split(", ")[-1]
            assert strategy in words or words == "centralised"
    assert {name for name, _ in available() if name.startswith("paper/")} <= set(BY_COMMAND)
    for row in ACCURACIES:
        four = [row[name] for name in ("CIFAR-10", "CIFAR-100", "Tiny ImageNet", "Caltech-101")]
        if all(four):
            assert sum(map(float, four)) / 4 == pytest.approx(float(row["mean"]), abs=0.011)


def test_medmnist_costs_what_the_paper_says_and_is_judged_by_validation_labels() -> None:
    config = resolve(load("paper/vit_tiny_mocov3_medmnist"))
    for name, ledger in all_strategies(config, memory=False, known=known_traces()).items():
        row = BY_COMMAND["paper/vit_tiny_mocov3_medmnist" + f" --strategy.name {name}" * (name != "layerwise")]
        assert ours(ledger).items() <= row.items()
        assert ledger["flops_paper_rule"] / 1e9 == pytest.approx(float(row["paper's rule, published"]), rel=0.01)
        assert ledger["total_bytes"] / 2**20 / 1000 == pytest.approx(float(row["traffic, published"]), rel=0.01)
    runs = load_sweep("paper/medmnist").runs
    assert len(runs) == 12
    assert {run.config.evaluation.labelled_split for run in runs} == {"val"}
