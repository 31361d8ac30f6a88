"""The benchmark for accelerators, in small on this machine; and a round on an accelerator, where there is one."""

import json
import os
import re
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


def test_bad_options_are_refused_in_a_line_and_harm_no_results(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "cut").mkdir()
    kept = json.dumps({"tiny": False, "runs": [], "rows": [], "notes": [], "completed": [], "device": "H100"})
    (tmp_path / "full" / "gpu.json").write_text(kept)
    (tmp_path / "cut" / "gpu.json").write_text(kept[:20])
    for arguments, message in (
        (["--out", str(tmp_path / "full")], "error: --out: .* has results; accepted: --keep"),
        (["--tiny", "--keep", "--out", str(tmp_path / "full")], "error: --keep: .* is of a run without --tiny"),
        (["--keep", "--out", str(tmp_path / "cut")], "error: --keep: .* cannot be read"),
        (["--out", str(tmp_path / "full" / "gpu.json")], "error: --out: .* is not a folder"),
        (["--minutes", "-1"], "error: --minutes: -1.0 is out of range; accepted: above 0"),
    ):
        done = subprocess.run([sys.executable, str(SCRIPT), *arguments], text=True, capture_output=True, check=False)
        assert done.returncode == 2
        assert re.match(message, done.stderr)
    assert (tmp_path / "full" / "gpu.json").read_text() == kept


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
    command = [sys.executable, str(SCRIPT), "--only", "parity", "--out", str(tmp_path)]
    environment = os.environ | {"JAX_PLATFORMS": "", "XLA_FLAGS": ""}
    done = subprocess.run(command, text=True, capture_output=True, env=environment, check=False)
    if "JAX finds no accelerator" in done.stderr:
        assert not (tmp_path / "gpu.json").exists()
        pytest.skip("JAX finds no accelerator")
    content = results(tmp_path)
    found = {row["case"]: row["value"] for row in content["rows"]}
    for strategy in ("layerwise", "end_to_end"):
        assert {f"{strategy}, float32", f"{strategy}, the CPU with 1 lane"} <= set(found), content["notes"]
        # The floor is a guess until it has been measured: AdamW's first steps are near rate x sign of the gradient.
        assert found[f"{strategy}, float32"] < 10 * found[f"{strategy}, the CPU with 1 lane"] + 1e-3
