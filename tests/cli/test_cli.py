"""The command line: help, lists, JSON, and one line for every kind of bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from lwfedssl_jax import __version__, cli
from lwfedssl_jax.config import Config, ConfigError, available, load, override, resolve, to_dict
from lwfedssl_jax.workdir import WorkDir, directory

TINY = [
    "--data.name", "synthetic", "--data.image-size", "8", "--data.synthetic-examples", "60", "--model.width", "8",
    "--model.depth", "2", "--model.heads", "2", "--federation.rounds", "2", "--federation.local-epochs", "1",
    "--objective.hidden-dim", "8", "--objective.output-dim", "4", "--evaluation.labels-per-class", "5",
    "--evaluation.neighbours", "5",
]  # fmt: skip


@pytest.mark.parametrize("arguments", [["--help"], ["list", "--help"]])
def test_help_names_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in cli.COMMANDS)


@pytest.mark.parametrize("command", ["train", "resources", "plan"])
def test_help_of_a_command_names_every_section(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--strategy.name", "--federation.rounds", "--evaluation.every", "--runtime.remat"):
        assert option in out


def test_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [name for name, _ in available()]
    assert cli.main(["list", "quickstart", "*mocov3_end*"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(
        [n for n in names if "quickstart" in n or "mocov3_end" in n]
    )
    assert cli.main(["list", "nothing"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: list: nothing matches 'nothing'; accepted: a part of a name, such"
    )
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["list"]) == 0
    lines = re.sub("\x1b[^m]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 60
    assert {"sweeps/paper", "paper"} <= set(lines)


def test_the_program_is_called_as_the_user_called_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for called, name in (
        ("run.py", "python run.py"),
        ("/usr/bin/lwfedssl", "lwfedssl"),
        ("/x/lwfedssl_jax/__main__.py", "python -m lwfedssl_jax"),
    ):
        monkeypatch.setattr(sys, "argv", [called])
        assert cli.main(["--help"]) == 0
        assert f"usage: {name} [COMMAND ...]" in capsys.readouterr().out
        assert cli.main(["train", "--help"]) == 0
        assert f"usage: {name} train CONFIG [" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lwfedssl_jax {__version__}\n"
    assert cli.main(["completion", "bash"]) == 0
    completion = capsys.readouterr().out
    assert "--strategy.name" in completion
    assert all(word in completion for word in ("calibrate", "--at-start", "--insecure"))
    assert cli.main(["completion", "fish"]) == 2
    assert capsys.readouterr().err == "error: completion: unknown shell 'fish'; accepted: bash, zsh\n"


def test_resources_json_holds_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["resources", "quickstart", *TINY, "--json", "--no-memory"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert set(plain) == {"config", "bytes_per_parameter", "strategies", "refused"}
    assert plain["refused"] == {}
    assert plain["config"]["model"]["depth"] == 2
    assert set(plain["strategies"]) == {"end_to_end", "layerwise", "progressive"}
    for strategy in plain["strategies"].values():
        assert set(strategy) == {
            "download_bytes", "upload_bytes", "total_bytes", "worst_case_total_bytes", "flops_paper_rule",
            "flops_executed", "flops_recomputed", "server_flops_executed", "client_state_bytes", "peak_memory_bytes",
            "per_stage",
        }  # fmt: skip
        assert set(strategy["per_stage"][0]) == {
            "stage", "rounds", "depth", "trainable_parameters", "download_bytes", "upload_bytes", "frozen_bytes",
            "flops_paper_rule", "flops_executed", "flops_recomputed", "server_flops_executed", "peak_memory_bytes",
        }  # fmt: skip


def test_resources_says_why_a_strategy_has_no_column(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--strategy.name", "end_to_end", "--objective.name", "mocov3", "--federation.client-start", "fedu"]
    assert cli.main(["resources", "quickstart", *TINY, *options, "--no-memory"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for strategy in ("layerwise", "progressive"):
        assert f"{strategy} cannot run with this config: federation.client_start: fedu keeps whole models" in said
    assert "end_to_end cannot" not in said


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_resources_draws_a_picture(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / f"costs{suffix}"
    assert cli.main(["resources", "quickstart", *TINY, "--no-memory", "--plot", str(file)]) == 0
    assert "end_to_end" in capsys.readouterr().out
    assert file.stat().st_size > 5000


def test_train_prints_progress_and_a_table_and_then_only_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], compiled: list[str]
) -> None:
    command = ["train", "quickstart", *TINY, "--workdir", str(tmp_path / "run")]
    assert cli.main(command) == 0
    out, err = capsys.readouterr()
    assert "compiling the round, 4 lanes" in err
    assert "2 stages, 2 rounds, 10 clients" in err
    assert "samples/s" in err
    assert "untrained %" in out
    assert "end_to_end" in out
    compiled.clear()
    assert cli.main(command) == 0
    assert "finished" in capsys.readouterr().out
    assert compiled == []


BAD = [
    (["fly"], "COMMAND: unknown 'fly'; accepted: train, resources, plan, sweep, report, e"),
    (["trian"], "COMMAND: unknown 'trian'; accepted: train"),
    (["train"], "CONFIG: must be the first argument of train, found nothing"),
    (["train", "--workdir", "x"], "CONFIG: must be the first argument of train, found '--workdir'"),
    (["train", "quick"], "CONFIG: 'quick' is not a config; accepted: a name of `list`, such as"),
    (["train", "quickstart_sweep"], "CONFIG: quickstart_sweep is a sweep; accepted: a config's name (`sweep quickst"),
    (["train", "mine.py"], "CONFIG: mine.py does not exist; accepted: the path of a .py file"),
    (["list", "no_such"], "list: nothing matches 'no_such'"),
    (["train", "quickstart", "--strategy.nam", "x"], "--strategy.nam: unknown option; accepted: --strategy"),
    (["train", "quickstart", "--strategy.name", "x"], "strategy.name: unknown 'x'; accepted: end_to_end, layer"),
    (["train", "quickstart", "--federation.rounds", "x"], "--federation.rounds: 'x' is not valid; accepted: a whole n"),
    (["train", "quickstart", "--federation.rounds"], "--federation.rounds: missing value; accepted: --federation.rou"),
    (["train", "quickstart", "--runtime.remat", "maybe"], "--runtime.remat: unknown 'maybe'; accepted: 'True', 'Fal"),
    (
        ["train", "quickstart", "--evaluation.labels-per-class", "a"],
        "--evaluation.labels-per-class: 'a' is not valid; accepted: whole numbers",
    ),
    (["train", "quickstart", "--runtime.lanes", "it's"], '--runtime.lanes: "it\'s" is not valid; accepted: a who'),
    (["train", "quickstart", "--federation.rounds", "0"], "federation.rounds: 0 is out of range; accepted: at least 1"),
    (["train", "quickstart", "--federation.rounds", "3"], "federation.rounds: 3 rounds are fewer than the 6 stages"),
    (["train", "quickstart", "--model.heads", "3"], "model.heads: 3 does not divide model.width 64"),
    (["train", "quickstart", "--model.patch-size", "3"], "model.patch_size: 3 does not divide data.image_size 16"),
    (["train", "quickstart", "--federation.clients-per-round", "11"], "federation.clients_per_round: 11 is more than"),
    (["train", "quickstart", "--partition.clients", "5000"], "partition.clients: 5000 clients are more than the 1437"),
    (["train", "quickstart", "--evaluation.labels-per-class", "200"], "evaluation.labels_per_class: 200 is more than"),
    (["train", "quickstart", "--data.image-size", "100000"], "data.image_size: 100000 is out of range; accepted: at"),
    (["train", "quickstart", "--data.name", "imagenet"], "data.name: unknown 'imagenet'; accepted: digits"),
    (["train", "quickstart", "--data.name", "tfds:nothing_here"], "data.name: 'tfds:nothing_here' is not installed"),
    (["train", "../configs/quickstart"], "CONFIG: '../configs/quickstart' is not a config"),
    (["resources", "quickstart", "--federation.rounds", "1"], "federation.rounds: 1 rounds are fewer than the 6"),
    (["resources", "quickstart", "--strategy.name", "x"], "strategy.name: unknown 'x'; accepted: end_to_end, layer"),
    (["resources", "quickstart", "--federation.aggregator", "x"], "federation.aggregator: unknown 'x'; accepted: fed"),
    (["resources", "quickstart", "--partition.kind", "x"], "partition.kind: unknown 'x'; accepted: iid, dirichlet"),
    (["resources", "quickstart", "--additions.calibration-steps", "5"], "additions.calibration_steps: 5 steps need"),
    (["resources", "quickstart", "--plot", "costs.doc"], "--plot: costs.doc cannot be drawn; accepted: a file in an"),
    (["resources", "quickstart", "--plot", "no/costs.png"], "--plot: no/costs.png cannot be drawn; accepted: a file"),
    (["resources", "quickstart", "--data.name", "imagenet"], "data.name: unknown 'imagenet'; accepted: digits"),
    (["train", "quickstart", "--fleet.devices", "x.csv"], "fleet.devices: x.csv cannot be read (No such file or dir"),
    (["train", "quickstart", "--fleet.devices", "phone"], "fleet.devices: 'phone' does not have count; accepted: NAM"),
    (["train", "quickstart", "--fleet.deadline-seconds", "5"], "fleet.deadline_seconds: 5.0 needs classes in fleet"),
    (["plan", "quickstart"], "--memory-gb: missing; accepted: --memory-gb X --gflops X --uplink-mbps X --downlink-m"),
    (["plan", "quickstart", "--gflops", "5"], "--memory-gb: missing, but --gflops needs it; accepted: --memory"),
    (["plan", "quickstart", "--memory-gb", "-1"], "--memory-gb: -1.0 is out of range; accepted: 1e-06 to 1e+12"),
    (["plan", "quickstart", "--memory-gb", "1", "--gflops", "nan"], "--gflops: nan is out of range; accepted: 1e-06"),
    (["plan", "quickstart", "--memory-gb", "x"], "--memory-gb: 'x' is not valid; accepted: a number"),
    (["plan", "quickstart", "--devices", "no.csv"], "--devices: no.csv cannot be read (No such file or directory); a"),
    (["plan", "quickstart", "--devices", "no.csv", "--watts", "3"], "--devices: no.csv cannot be combined with --watt"),
    (["plan", "quickstart", "--memory-gb", "1", "--examples", "0"], "--examples: '0' is out of range; accepted: "),
    (["plan", "quickstart", "--data.name", "folder:none", "--memory-gb", "1"], "--examples: missing, and the"),
    (["plan", "quickstart", "--memory-gb", "1", "--protocol", "knn"], "--protocol: knn needs --results; accepted"),
    (["plan", "quickstart", "--memory-gb", "1", "--results", "no"], "--results: no is not a directory; accepted: a"),
    (["plan", "quickstart", "--memory-gb", "1", "--plot", "costs.doc"], "--plot: costs.doc cannot be drawn; accepte"),
    (["plan", "quickstart", "--memory-gb", "1", "--fleet.deadline-seconds", "5"], "fleet.deadline_seconds: 5.0 need"),
    (["plan", "quickstart", "--memory-gb", "1", "--federation.rounds", "0"], "federation.rounds: 0 is out of range;"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    compiled: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"error: {message}")
    assert out == ""
    assert compiled == []
    assert list(tmp_path.iterdir()) == []


def test_bad_work_directories(tmp_path: Path, capsys: pytest.CaptureFixture[str], compiled: list[str]) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "vit"}')

    config = override(load("quickstart"), {"runtime.seed": 5})
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").write_text(json.dumps({"config": to_dict(resolve(load("quickstart")))}))
    (tmp_path / "half" / "summary.json").write_text("{}")
    (tmp_path / "other" / "config.json").write_text(json.dumps({"config": to_dict(resolve(config))}))
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for name, message in {
        "file": "is not a directory; accepted: a new or empty directory",
        "file/below": "cannot be written; accepted: a directory you can write to",
        "notes": "contains files but no run; accepted: a new or empty directory",
        "other": "contains a run of another config: runtime.seed is 5 there, 0 here",
        "broken": "cannot be read",
        "foreign": "contains files but no run",
        "half": "is not the summary of a run; accepted: remove it",
    }.items():
        assert cli.main(["train", "quickstart", "--workdir", str(tmp_path / name)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: --workdir: {tmp_path / name}")
        assert message in line
    assert cli.main(["train", "quickstart", "--workdir", "/proc/no/such"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert compiled == []


def test_default_work_directory_is_one_for_each_config() -> None:

    config = load("quickstart")
    assert directory.default_workdir("quickstart", config) == directory.default_workdir(
        "quickstart", load("quickstart")
    )
    assert directory.default_workdir("quickstart", config) != directory.default_workdir(
        "quickstart", override(config, {"runtime.seed": 1})
    )


def test_run_py_starts_without_a_heavy_import_and_stays_short(tmp_path: Path) -> None:
    assert len((ROOT / "run.py").read_text().splitlines()) < 60
    heavy = "('tensorflow_datasets', 'matplotlib', 'jax')"
    code = f"import sys, lwfedssl_jax.cli; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    done = subprocess.run([sys.executable, "run.py", "fly"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_a_changed_config_file_is_another_run(tmp_path: Path) -> None:
    """It may hold an objective: the same values do not make it the same run."""
    config = resolve(Config())
    paths = {directory.default_workdir("mine.py", config, code) for code in ("", "a", "b")}
    assert len(paths) == 3
    WorkDir(tmp_path / "run", config, "a").open(1, 1, {})
    WorkDir(tmp_path / "run", config, "a")
    with pytest.raises(ConfigError, match=r"another config file, or of this one before it was changed; accepted: "):
        WorkDir(tmp_path / "run", config, "b")
