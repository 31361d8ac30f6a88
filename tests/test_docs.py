"""docs/results.md is what its script makes of the records."""

import importlib
from pathlib import Path

import pytest
from conftest import ROOT

from lwfedssl_jax.config import digest


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
