"""The scripts under examples/ run, with small settings."""

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, SMALL, small_config

import lwfedssl_jax as lw
from lwfedssl_jax.cli import main
from lwfedssl_jax.method.objectives import OBJECTIVES

EXAMPLES = ROOT / "examples"
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
def own_entries() -> Iterator[None]:
    """What the example enters is gone after the test."""
    names = runpy.run_path(str(EXAMPLES / "own_objective.py"))
    yield
    for table in ("OBJECTIVES", "STRATEGIES", "AGGREGATORS", "TERMS"):
        for name in ("barlow_twins", "newest_two", "half_way", "small_weights"):
            names[table].pop(name, None)


@pytest.mark.usefixtures("own_entries")
def test_a_config_with_entries_of_its_own_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options: list[str] = []
    for name, value in TINY.items():
        if name != "objective.name":
            options += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    assert main(["train", str(EXAMPLES / "own_objective.py"), *options, "--workdir", "mine"]) == 0
    (row,) = lw.load_results("mine").to_dict("records")
    assert (row["objective.name"], row["strategy.name"]) == ("barlow_twins", "newest_two")
    assert row["finished"]


@pytest.mark.usefixtures("own_entries")
def test_the_examples_objective_ignores_padding_and_has_a_finite_gradient_for_one_sample() -> None:
    loss = OBJECTIVES["barlow_twins"].loss
    z = jnp.sin(jnp.arange(2 * 4 * 3, dtype=jnp.float32)).reshape(2, 4, 3)
    for real in (1, 3):
        mask = jnp.arange(4) < real
        gradient = jax.grad(lambda z, mask=mask: loss(z, z, mask, 1.0))(z)
        chex.assert_tree_all_finite(gradient)
        assert not gradient[:, real:].any()
        padded = z.at[:, real:].set(7.0)
        np.testing.assert_allclose(loss(z, z, mask, 1.0), loss(padded, padded, mask, 1.0), rtol=1e-6)


def test_the_example_is_the_documentations() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)
    assert block == (EXAMPLES / "own_objective.py").read_text()


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
