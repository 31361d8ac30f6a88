"""docs/extending.md runs as it stands there; docs/results.md is what its script makes of the records."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL

from lwfedssl_jax.config import digest, load, override, resolve
from lwfedssl_jax.costs import ledger
from lwfedssl_jax.experiment import train
from lwfedssl_jax.method import aggregation, objectives, stages, terms
from lwfedssl_jax.simulation import setup
from lwfedssl_jax.workdir import WorkDir

PAGE = ROOT / "docs" / "extending.md"


TABLES = (terms.TERMS, aggregation.AGGREGATORS, objectives.OBJECTIVES, stages.STRATEGIES)


@pytest.fixture
def registered() -> Iterator[None]:
    """Whatever the test enters is gone after it."""
    before = [dict(table) for table in TABLES]
    yield
    for table, entries in zip(TABLES, before, strict=True):
        table.clear()
        table.update(entries)  # type: ignore[arg-type]


@pytest.mark.usefixtures("registered")
def test_the_example_trains_and_is_priced(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(PAGE.read_text().splitlines()) < 80
    file = tmp_path / "mine.py"
    file.write_text(example)
    small = {k: v for k, v in SMALL.items() if k not in ("objective.name", "strategy.name")}
    config = resolve(override(load(str(file)), small))
    run = setup.prepare(config)
    assert [(s.frozen_depth, s.depth) for s in run.stages] == [(0, 1), (0, 2), (1, 3)]
    summary = train.train(config, WorkDir(tmp_path / "run", config))
    assert summary["strategy"] == "newest_two"
    assert np.isfinite([line["loss"] for line in WorkDir(tmp_path / "run", config).metrics() if "loss" in line]).all()
    ledgers = ledger.all_strategies(config, memory=False)
    between = [ledgers[name]["total_bytes"] for name in ("layerwise", "newest_two", "progressive")]
    assert between == sorted(between)
    assert len(set(between)) == 3


def test_the_results_page_is_what_the_records_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails: `python benchmarks/studies.py report`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    studies, page = (importlib.import_module(name) for name in ("studies", "studies_page"))
    monkeypatch.setattr(studies, "PAGE", tmp_path / "results.md")
    monkeypatch.setattr(page, "figures", lambda: None)
    page.write_page()
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text()
    asked = {digest(run.config) for name in studies.STUDIES for run in studies.runs_of(name)}
    assert set(studies.recorded()) <= asked
    for name, study in studies.STUDIES.items():
        assert len(set(study.questions)) == len(study.questions), f"{name} asks a question twice"
        labels = {run.label for run in studies.runs_of(name)} | set(study.beside)
        assert {label for q in study.questions for label in (q.better, q.worse)} <= labels
