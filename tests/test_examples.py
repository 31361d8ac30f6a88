"""The scripts under examples/, and the folder that `new` copies from there, run, with small settings."""

import contextlib
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from conftest import ROOT, SMALL, small_config
from images import picture

import lwfedssl_jax as lw
from lwfedssl_jax.cli import main
from lwfedssl_jax.config import MODELS
from lwfedssl_jax.data.views import RECIPES
from lwfedssl_jax.method.aggregation import AGGREGATORS
from lwfedssl_jax.method.objectives import OBJECTIVES
from lwfedssl_jax.method.stages import STRATEGIES
from lwfedssl_jax.method.terms import TERMS
from lwfedssl_jax.models import ARCHITECTURES
from lwfedssl_jax.sweep.grid import load_sweep

EXAMPLES = ROOT / "examples"
OWN = ["barlow_twins", "newest_two", "my_mixer"]
TABLES: tuple[dict[str, Any], ...] = (
    OBJECTIVES, STRATEGIES, AGGREGATORS, TERMS, MODELS, ARCHITECTURES, RECIPES
)  # fmt: skip
TINY: dict[str, Any] = SMALL | {"model.depth": 1, "federation.rounds": 1, "federation.local_epochs": 1}


def run_script(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_strategies_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_script("compare_strategies.py", monkeypatch, *(f"{name}={value}" for name, value in TINY.items()))
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "strategy"
    assert [row.split()[0] for row in rows] == ["layerwise", "progressive", "end_to_end"]
    assert len({row.split(maxsplit=1)[1] for row in rows}) == 1  # with one layer, all strategies are the same
    assert len(lw.load_results("runs/compare")) == 3


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    """The folder that `new` makes; what its files enter is gone after the test."""
    assert main(["new", str(tmp_path / "mine")]) == 0
    path, tables = list(sys.path), TABLES
    with contextlib.ExitStack() as stack:
        for table in tables:
            stack.enter_context(mock.patch.dict(table))
        yield tmp_path / "mine"
    sys.path[:] = path


def test_from_new_to_embed(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder is refused nowhere: it is priced, trains, is found by a sweep, and its encoder computes features."""
    config = str(own / "config.py")
    tiny = ["--model.width", "8", "--model.depth", "3", "--federation.rounds", "3", "--federation.local-epochs", "1",
            "--strategy.name", "newest_two", "--evaluation.labels-per-class", "0", "--strategy.first-stage-share", "0",
            "--evaluation.neighbours", "0",
            "--objective.hidden-dim", "8", "--objective.output-dim", "8"]  # fmt: skip
    assert main(["resources", config, *tiny, "--json", "--no-memory"]) == 0
    costs = json.loads(capsys.readouterr().out)["strategies"]
    between = [costs[name]["total_bytes"] for name in ("layerwise", "newest_two", "progressive")]
    assert between == sorted(set(between))
    tiny += ["--model.depth", "2", "--federation.rounds", "2"]
    assert main(["train", config, *tiny, "--workdir", str(tmp_path / "run")]) == 0
    (row,) = lw.load_results(tmp_path / "run").to_dict("records")
    assert (row["objective.name"], row["strategy.name"], row["model.name"]) == (
        "barlow_twins",
        "newest_two",
        "my_mixer",
    )
    assert row["finished"]
    picture(tmp_path / "all" / "a.png", 5)
    words = ["embed", str(tmp_path / "run"), str(tmp_path / "all"), "--out", str(tmp_path / "f.npz")]
    assert main([*words, "--config", config]) == 0
    runs = load_sweep(str(own / "sweep.py")).runs
    assert [run.config.strategy.name for run in runs[::2]] == ["layerwise", "newest_two", "end_to_end"]
    assert main(["new", str(own)]) == 2
    assert f"error: DIR: {own} is not empty; accepted: a new or empty folder" in capsys.readouterr().err


def test_the_folders_own_tests_pass(own: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(own), str(own)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    result = subprocess.run(command, cwd=own, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout
    assert "2 passed" in result.stdout


def test_the_documentation_shows_these_files() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(encoding="utf-8"), re.DOTALL)
    assert blocks == [(EXAMPLES / "new" / name).read_text(encoding="utf-8") for name in ("model.py", "method.py")]


@pytest.mark.parametrize("missing", ["timm", "torch"])
def test_without_torch_there_is_one_line(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "torch":
        pytest.importorskip("timm")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(SystemExit, match=rf'{missing} is not installed; accepted: pip install -e "\.\[torch\]"'):
        run_script("encoder_in_torch.py", monkeypatch, "runs/mine")


def test_the_encoder_is_read_in_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("timm")
    config = small_config(**{name.replace(".", "__"): value for name, value in TINY.items()})
    lw.train(config, tmp_path / "mine", progress=False)
    run_script("encoder_in_torch.py", monkeypatch, str(tmp_path / "mine"))
    said = capsys.readouterr().out
    assert f"8 images, {config.model.width} features each" in said
    assert float(said.split()[-1]) < 1e-4
