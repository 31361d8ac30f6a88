"""From Python: the README's example as it stands, and the notebook as it is committed."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SMALL, small_config

import lwfedssl_jax as lw
from lwfedssl_jax import api
from lwfedssl_jax.analysis import style
from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.experiment import progress
from lwfedssl_jax.simulation.events import Evaluated, Finished, StepsDone
from lwfedssl_jax.workdir import WorkDir


def test_the_readmes_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compiled: list[str]
) -> None:
    (example,) = [b for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S) if "as lw" in b]
    load_config = api.load_config

    def small(name: str, overrides: Mapping[str, Any] | None = None) -> Config:
        return load_config(name, {**SMALL, **(overrides or {}), "federation.rounds": 3})

    monkeypatch.setattr(api, "load_config", small)
    monkeypatch.setattr(sys, "argv", ["no", "--options"])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    run = names["run"]
    out, err = capsys.readouterr()
    assert float(out) == run.summary["evaluation"]["knn"]["accuracy"]
    assert "3 stages, 3 rounds" in err
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    assert run.summary["strategy"] == "progressive"

    metrics = run.metrics
    assert metrics.index.tolist() == [0, 1, 2, 3]
    assert np.isfinite(metrics["loss"][1:]).all()
    assert metrics["accuracy.knn"].iloc[-1] == run.summary["evaluation"]["knn"]["accuracy"]
    assert metrics["accuracy.knn"].iloc[0] == run.summary["baselines"]["untrained"]["knn"]["accuracy"]
    assert run.resources.loc["layerwise", "total_bytes"] < run.resources.loc["progressive", "total_bytes"]
    assert run.encoder()(np.zeros((2, 8, 8, 3), np.uint8)).shape == (2, 8)
    assert lw.load_results("runs")["accuracy.knn"].tolist() == [run.summary["evaluation"]["knn"]["accuracy"]]

    compiled.clear()
    again = lw.train(names["config"], "runs/mine")
    assert (again, compiled, capsys.readouterr()) == (run, [], ("", ""))
    (axes,) = again.plot(run, protocol="knn").axes
    assert axes.lines[0].get_ydata()[-1] == 100 * run.summary["evaluation"]["knn"]["accuracy"]
    assert again.plot()._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="protocol: unknown 'nn'; accepted: linear_probe_5, knn"):
        run.plot(protocol="nn")


def test_a_config_is_checked_where_it_is_made() -> None:
    with pytest.raises(ConfigError, match=r"strategy.name: unknown 'layers'"):
        lw.load_config("quickstart", {"strategy.name": "layers"})
    with pytest.raises(ConfigError, match=r"federation.round: no such field"):
        lw.load_config("quickstart", {"federation.round": 3})


def test_importing_the_package_does_not_import_jax() -> None:
    command = "import sys, lwfedssl_jax; assert not {'jax', 'pandas', 'matplotlib'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", command], check=True, cwd=ROOT)


def test_jax_may_be_in_use_already(tmp_path: Path) -> None:
    command = "import jax; jax.devices(); from lwfedssl_jax import api; api.set_up(); print(jax.device_count())"
    environment = {"PATH": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", command], check=True, cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert (done.stdout, done.stderr) == ("1\n", "")


class Output:
    """IPython's handle of an output."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def update(self, data: dict[str, str], raw: bool) -> None:
        assert raw
        self.shown.append(data["text/plain"])


def test_a_notebook_keeps_two_lines_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import IPython.display
    from rich.console import Console

    output = Output()
    monkeypatch.setattr(IPython.display, "display", lambda *_, **__: output)
    with progress.NotebookProgress(Console(quiet=True)) as hear:
        hear.say("layerwise, simclr")
        for _ in range(1000):
            hear(StepsDone(1, 1, 2))
        hear(Evaluated({"round": 1, "depth": 1, "protocol": "knn", "accuracy": 0.5}))
        hear(Finished({"rounds": 3, "seconds": 1.2}))
    assert output.shown[-1].split("\n") == ["layerwise, simclr", "3 rounds in 1 s", ""]
    assert len(output.shown) < 10


def test_the_notebook_is_committed_as_it_ran() -> None:
    """`.ci/run` runs it."""
    file = ROOT / "examples" / "quickstart.ipynb"
    assert file.stat().st_size < 300_000
    cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"execute_result", "display_data"}  # no error, no warning
    assert sum("image/png" in output["data"] for output in outputs) == 2
    texts = [output["data"]["text/plain"] for output in outputs]
    assert not re.search(r"/(home|tmp|root|usr)/", json.dumps(texts))
    assert all(cell["outputs"] for cell in cells)


def test_the_default_directory_is_the_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(config: Config, workdir: WorkDir, hear: object = None) -> dict[str, Any]:
        return {"strategy": config.strategy.name, "rounds": 3, "evaluation": {}}

    monkeypatch.setattr(api.experiment, "train", train)
    monkeypatch.chdir(tmp_path)
    runs = [lw.train(small_config(runtime__seed=seed), progress=False) for seed in (0, 0, 1)]
    assert runs[0].directory == runs[1].directory != runs[2].directory
    assert runs[0].directory.parent == Path("runs")
    with pytest.raises(ConfigError, match=r"protocol: .* was not evaluated; accepted: a run whose images have labels"):
        runs[0].plot()
    assert style.STYLES
