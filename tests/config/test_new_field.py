"""A field that a later version adds, at its default, orphans no finished run."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from runs import write_run

from lwfedssl_jax.analysis.results import load_results
from lwfedssl_jax.analysis.settings import group_by_setting
from lwfedssl_jax.config import Config, ConfigError, digest, from_dict, override, resolve, sections, to_dict
from lwfedssl_jax.config.model_sizes import MODELS, VitSize
from lwfedssl_jax.experiment.train import train
from lwfedssl_jax.plan.measured import measured_accuracies
from lwfedssl_jax.sweep import Sweep
from lwfedssl_jax.sweep.grid import make_runs
from lwfedssl_jax.workdir import WorkDir
from lwfedssl_jax.workdir.directory import default_workdir

RUN = {"federation.rounds": 4, "model.depth": 2}  # of write_run


def config(**changes: Any) -> Config:
    return resolve(override(sections.Config(), RUN | {k.replace("__", "."): v for k, v in changes.items()}))


def add_field(monkeypatch: pytest.MonkeyPatch, section: str) -> None:
    """``section.new`` exists from now on, and is 3; among the sizes of a model 0 stands for it."""
    old = type(getattr(Config(), section))
    default = 0 if section == "model" else 3
    new = dataclasses.make_dataclass(old.__name__, [("new", int, default)], bases=(old,), frozen=True)
    if section == "model":
        size = dataclasses.make_dataclass("VitSize", [("new", int, 3)], bases=(VitSize,), frozen=True)
        monkeypatch.setitem(MODELS, "vit_tiny", size(**dataclasses.asdict(MODELS["vit_tiny"])))
    field = section, new, dataclasses.field(default_factory=new)
    grown = dataclasses.make_dataclass("Config", [field], bases=(Config,), frozen=True)
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("lwfedssl_jax.") and getattr(module, "Config", None) is Config:
            monkeypatch.setattr(module, "Config", grown)


@pytest.mark.parametrize("section", ["optimizer", "model", "runtime"])
def test_a_new_field_orphans_no_finished_run(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (planned,) = make_runs(Sweep(base=config()))
    path = default_workdir("mine", config())
    write_run(path, {"knn": 0.75})
    summary = json.loads((path / "summary.json").read_text())

    add_field(monkeypatch, section)
    assert getattr(config(), section).new == 3
    assert default_workdir("mine", config()) == path
    assert default_workdir("mine", config(**{f"{section}__new": 4})) != path
    assert train(config(), WorkDir(path, config())) == summary
    with pytest.raises(ConfigError, match=rf"a run of another config: {section}.new is 3 there, 4 here; accepted: "):
        WorkDir(path, config(**{f"{section}__new": 4}))

    write_new_run(tmp_path / "runs" / "newer", {"knn": 0.25}, runtime__seed=1)
    write_new_run(tmp_path / "runs" / "other", {"knn": 0.5}, **{f"{section}__new": 4})
    results = load_results(tmp_path)
    runs, settings = group_by_setting(results)
    assert [len(group) for _, group in runs.groupby("setting")] == [2, 1]
    assert {s.label for s in settings} == {"new 3", "new 4"}
    if section != "runtime":  # in which runs that are compared may differ
        found = measured_accuracies(config(), results.to_dict("records"), "knn").found.values()
        assert [measured.by_seed for measured in found] == [{0: 0.75, 1: 0.25}] * 2  # with remat and without

    (again,) = make_runs(Sweep(base=config()))
    assert again.directory == planned.directory


def write_new_run(path: Path, accuracy: dict[str, float], **changes: Any) -> None:
    """A run that has the new field."""
    write_run(path, accuracy, runtime__seed=changes.get("runtime__seed", 0))
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | {"config": to_dict(config(**changes))}))


def test_sizes_and_trackers_do_not_change_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = digest(resolve(Config()))
    assert digest(Config()) == usual  # resolved or not
    for changes, same in (
        ({"runtime.trackers": ("tensorboard",)}, True),
        ({"model.width": 192}, True),  # the named model's own
        ({"model.width": 96}, False),
        ({"model.name": "vit_micro"}, False),
        ({"model.name": "resnet18"}, False),
        ({"runtime.seed": 1}, False),
    ):
        assert (digest(resolve(override(Config(), changes))) == usual) is same, changes
    assert digest(Config(), "code") != usual
    monkeypatch.setitem(MODELS, "vit_mine", VitSize(64, 7, 4, patch_size=7))  # which does not fit the default image
    assert digest(override(Config(), {"model.name": "vit_mine"})) != usual


def test_a_config_comes_back_from_plain_data() -> None:
    config = resolve(override(Config(), {"evaluation.labels_per_class": (5,), "model.name": "resnet18"}))
    assert from_dict(to_dict(config)) == config
    assert from_dict({}) == resolve(Config())
    later = {"data": {"name": "digits", "later": 1}, "later": {"field": 2}}
    assert from_dict(later) == resolve(Config())
    assert from_dict({"model": {"name": "vit_of_another_file", "width": 5}}).model.width == 5
    for damaged in (None, [], {"model": "vit_tiny"}, {"data": None}):
        with pytest.raises(TypeError, match="is not a section of a config"):
            from_dict(damaged)  # type: ignore[arg-type]
