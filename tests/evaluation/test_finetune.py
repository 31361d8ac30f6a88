"""Fine-tuning: what it learns, its schedule, and what a run writes of it."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import encoding, small_config
from rich.console import Console

from lwfedssl_jax.analysis import terminal
from lwfedssl_jax.config import EvaluationConfig
from lwfedssl_jax.evaluation import finetune
from lwfedssl_jax.evaluation.frozen import scores
from lwfedssl_jax.experiment import train as experiment
from lwfedssl_jax.simulation import events, setup
from lwfedssl_jax.workdir import WorkDir

CONFIG = small_config(
    data__synthetic_examples=100,
    evaluation__fine_tune_epochs=20,
    evaluation__fine_tune_warmup_epochs=2,
    evaluation__fine_tune_learning_rate=1e-2,
    evaluation__fine_tune_batch_size=32,
)


@pytest.fixture(scope="module")
def run() -> setup.Prepared:
    return setup.prepare(CONFIG)


def train(run: setup.Prepared, params: Any, depth: int = 3, seed: int = 0) -> list[np.ndarray]:
    config = dataclasses.replace(CONFIG.evaluation, fine_tune_epochs=3)
    job = finetune.FineTuneJob(run.task, config, run.dataset, params, depth, seed)
    state = finetune.train_state(job, lambda _: None)
    return [np.asarray(x) for x in jax.tree.leaves((state.weights["head"], state.weights["encoder"]["norm"]))]


def test_it_learns_from_scratch_and_compiles_once(run: setup.Prepared, compiled: list[str]) -> None:
    params, heard = setup.initial_params(run), []
    job = finetune.FineTuneJob(run.task, CONFIG.evaluation, run.dataset, params, 3, 0)
    result = finetune.fine_tune(job, encoding(run), heard.append)
    assert result["accuracy"] > 0.55  # of three classes
    assert (heard[2], len(heard)) == ("fine-tuning, epoch 3 of 20", 20)
    assert {k: result[k] for k in ("epochs", "warmup_epochs", "learning_rate", "batch_size", "views")} == {
        "epochs": 20,
        "warmup_epochs": 2,
        "learning_rate": 1e-2,
        "batch_size": 32,
        "views": "RandAugment(2 operations, magnitude 9 of 30)",
    }
    assert compiled.count("jit(_step)") == 1


def test_images_without_a_label_are_not_trained_on(run: setup.Prepared) -> None:
    params, data = setup.initial_params(run), run.dataset
    more = data._replace(
        train_images=np.concatenate([data.train_images[:3] + 9, data.train_images]),
        train_labels=np.concatenate([np.full(3, -1, np.int32), data.train_labels]),
    )
    for a, b in zip(train(run, params), train(run._replace(dataset=more), params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_same_seed_gives_the_same_bits_and_layers_past_the_depth_do_not_count(run: setup.Prepared) -> None:
    params = jax.device_get(setup.initial_params(run))
    later = params | {"encoder": dict(params["encoder"])}
    later["encoder"]["blocks"] = jax.tree.map(lambda x: np.concatenate([x[:1], x[1:] + 7]), params["encoder"]["blocks"])
    one = train(run, params, depth=1)
    for a, b in zip(one, train(run, later, depth=1), strict=True):
        np.testing.assert_array_equal(a, b)
    for other in (train(run, params, depth=1, seed=1), train(run, later, depth=2)):
        assert np.abs(one[1] - other[1]).max() > 1e-4


def test_the_last_batchs_padding_does_not_count(run: setup.Prepared) -> None:
    """A step of 30 samples moves the weights as much whatever the other two are."""
    params = jax.device_get(setup.initial_params(run))
    fixed = finetune.FineTuneSetup(run.task.encoder, run.task.recipe, run.task.dtype, CONFIG.evaluation, 4)
    state = finetune._start(fixed, {k: params[k] for k in ("encoder", "statistics")}, jax.random.key(0), (8, 3))
    images, labels = run.dataset.train_images[:32], run.dataset.train_labels[:32]
    mask = np.arange(32) < 30
    at = np.array([1, 0, 3], np.int32)
    one = finetune._step(fixed, state, images, labels, mask, jax.random.key(0), at)
    other_images, other_labels = images.copy(), labels.copy()
    other_images[30:], other_labels[30:] = 0, 0
    other = finetune._step(fixed, state, other_images, other_labels, mask, jax.random.key(0), at)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_schedule() -> None:
    rate = finetune.schedule(EvaluationConfig(fine_tune_epochs=40), steps_per_epoch=5)
    assert rate(0) == 0
    assert rate(25) == pytest.approx(0.5e-3)
    assert rate(50) == pytest.approx(1e-3)
    assert rate(125) == pytest.approx(0.5e-3)
    assert rate(199) == pytest.approx(1e-3 * (1 + np.cos(np.pi * 149 / 150)) / 2, rel=1e-2)
    assert rate(200) == pytest.approx(0, abs=1e-9)


def test_scores_by_hand() -> None:
    # Class 0: 3 of 4 found, 3 of 3 right. Class 1: 1 of 1, 1 of 3. Class 2: 0 of 1, never predicted.
    result = scores(np.array([0, 0, 0, 0, 1, 2]), np.array([0, 0, 0, 1, 1, 1]))
    assert result == {
        "accuracy": pytest.approx(4 / 6),
        "mean_per_class_accuracy": pytest.approx((3 / 4 + 1 + 0) / 3),
        "precision": pytest.approx((1 + 1 / 3 + 0) / 3),
        "recall": pytest.approx((3 / 4 + 1 + 0) / 3),
        "f1": pytest.approx((6 / 7 + 1 / 2 + 0) / 3),
    }
    # A class that is not among the true ones has no accuracy, but spoils the others' means.
    result = scores(np.array([0, 0]), np.array([0, 3]))
    assert (result["mean_per_class_accuracy"], result["recall"]) == (0.5, 0.25)


class Interrupting:
    """Presses Ctrl-C when fine-tuning says this."""

    def __init__(self, when: str = "") -> None:
        self.when = when
        self.heard: list[str] = []

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.FineTuning):
            self.heard.append(event.what)
            if event.what == self.when:
                raise KeyboardInterrupt


def test_a_run_writes_lines_and_summary_and_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(
        federation__rounds=1,
        strategy__name="end_to_end",
        evaluation__labels_per_class=(),
        evaluation__neighbours=0,
        evaluation__fine_tune_epochs=2,
        evaluation__fine_tune_warmup_epochs=1,
    )
    path = tmp_path / "run"

    def continued(when: str = "") -> list[str]:
        listener = Interrupting(when)
        with pytest.raises(KeyboardInterrupt) if when else contextlib.nullcontext():
            experiment.train(config, WorkDir(path, config), listener)
        return listener.heard

    epochs = [f"{start}fine-tuning, epoch {i} of 2" for start in ("", "from scratch: ") for i in (1, 2)]
    assert continued(epochs[0]) == epochs[:1]
    assert continued(epochs[2]) == epochs[:3]
    assert continued() == epochs[2:]
    summary = WorkDir(path, config).summary or {}
    lines = WorkDir(path, config).metrics()
    judged = [line for line in lines if "accuracy" in line]
    assert [(x["protocol"], x["round"], x["depth"], x.get("baseline")) for x in judged] == [
        ("fine_tune", 1, 3, None),
        ("fine_tune", 0, 3, "scratch"),
    ]
    assert [line["round"] for line in lines if "event" not in line] == [1]
    trained, scratch = summary["evaluation"]["fine_tune"], summary["baselines"]["scratch"]["fine_tune"]
    assert (trained["accuracy"], scratch["accuracy"]) == (judged[0]["accuracy"], judged[1]["accuracy"])
    assert summary["baselines"]["untrained"] == {}
    assert {"f1", "precision", "recall", "mean_per_class_accuracy", "epochs"} <= set(scratch)
    assert (path / "plots" / "accuracy.png").stat().st_size > 5000
    console = Console(record=True, width=200)
    console.print(terminal.summary_tables(summary))
    row = next(line for line in console.export_text().splitlines() if "fine-tuning" in line)
    assert f"{100 * scratch['accuracy']:.1f} (scratch)" in row
    assert f"{100 * trained['accuracy']:.1f}" in row
