"""The benchmark for accelerators, in small on this machine; and a round on an accelerator, where there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.py"


def run(*arguments: str, **environment: str) -> str:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, check=True, text=True, capture_output=True, env=os.environ | environment).stdout


def results(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "gpu.json").read_text())
    return content


def test_the_plan_is_printed_without_jax() -> None:
    hidden = "import runpy, sys; sys.modules |= dict.fromkeys(('jax', 'numpy')); sys.argv = ['gpu.py', '--plan']"
    command = [sys.executable, "-c", f"{hidden}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"]
    out = subprocess.run(command, check=True, text=True, capture_output=True).stdout
    assert "1 machine" in out
    assert "stages" in out


def test_the_whole_benchmark_runs_in_small(tmp_path: Path) -> None:
    """Without the packages that it must not need."""
    blocked = tmp_path / "blocked"
    for name in ("tyro", "tensorflow_datasets"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text(f"raise ImportError('{name} is not installed')\n")
    run("--tiny", "--only", "machine", "--out", str(tmp_path))
    out = run("--tiny", "--keep", "--out", str(tmp_path), PYTHONPATH=str(blocked))
    content = results(tmp_path)
    assert out.endswith((tmp_path / "gpu.md").read_text() + "\n")
    assert [(row["step"], row["case"]) for row in content["rows"]].count(("machine", "copy")) == 1
    assert len(content["runs"]) == 2
    assert "machine" in content["completed"]
    allowed = {"rival: PyTorch is not installed"}
    assert {f"{note['step']}: {note['note']}" for note in content["notes"]} <= allowed
    assert {row["step"] for row in content["rows"]} >= {"parity", "lanes", "stages", "kernels", "clients", "resnet"}
    assert all(row["value"] >= 0 for row in content["rows"])
    assert {row["case"]: row["value"] for row in content["rows"] if row["step"] == "parity"}["layerwise, float32"] == 0


@pytest.mark.gpu
def test_a_round_on_the_accelerator_is_the_cpus_up_to_rounding(tmp_path: Path) -> None:
    """In float32 at the highest precision; `pytest -m gpu -n 0 tests/test_gpu_benchmark.py` runs it."""
    run("--only", "parity", "--out", str(tmp_path), JAX_PLATFORMS="", XLA_FLAGS="")
    content = results(tmp_path)
    if any("JAX finds no accelerator" in note["note"] for note in content["notes"]):
        pytest.skip("JAX finds no accelerator")
    found = {row["case"]: row["value"] for row in content["rows"]}
    for strategy in ("layerwise", "end_to_end"):
        assert {f"{strategy}, float32", f"{strategy}, the CPU with 1 lane"} <= set(found), content["notes"]
        # The floor is a guess until it has been measured: AdamW's first steps are near rate x sign of the gradient.
        assert found[f"{strategy}, float32"] < 10 * found[f"{strategy}, the CPU with 1 lane"] + 1e-3
