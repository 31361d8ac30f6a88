"""Evaluation on other data sets than the clients'."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_config
from rich.console import Console
from runs import train
from safetensors.numpy import load_file

from lwfedssl_jax import load_results
from lwfedssl_jax.analysis import terminal
from lwfedssl_jax.analysis.settings import group_by_setting
from lwfedssl_jax.analysis.tables import settings_table
from lwfedssl_jax.analysis.wording import protocol_words
from lwfedssl_jax.config import ConfigError, to_dict
from lwfedssl_jax.experiment.checks import check
from lwfedssl_jax.experiment.datasets import load_run_data
from lwfedssl_jax.simulation import setup
from lwfedssl_jax.simulation.events import ignore
from lwfedssl_jax.workdir import WorkDir

FINE_TUNING: dict[str, Any] = {
    "evaluation__fine_tune_epochs": 2,
    "evaluation__fine_tune_warmup_epochs": 1,
    "evaluation__fine_tune_batch_size": 64,
    "evaluation__fine_tune_labels_per_class": (4, 0),
    "evaluation__draws": 2,
}


def scores_of(path: Path, config: Any) -> list[tuple[int, str]]:
    return [
        (line["round"], line["protocol"]) for line in WorkDir(path, config).metrics() if "@" in line.get("protocol", "")
    ]


@pytest.mark.usefixtures("cheap_views")
def test_an_encoder_is_evaluated_on_other_data_and_not_trained_on_them(tmp_path: Path) -> None:
    """Of other channels, sizes and labels."""
    cache = setup.Cache()
    plain, config = small_config(), small_config(evaluation__data=("digits",))
    without, summary = train(plain, tmp_path / "plain", cache=cache), train(config, tmp_path / "both", cache=cache)
    expected, found = (
        load_file(tmp_path / "plain/encoder.safetensors"),
        load_file(tmp_path / "both/encoder.safetensors"),
    )
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert summary["evaluation"] == without["evaluation"]
    assert without["transfer"] == {}
    assert set(summary["transfer"]["digits"]) == set(summary["evaluation"])
    assert summary["transfer"]["digits"]["knn"]["accuracy"] > 0.2  # of ten classes
    assert set(summary["baselines"]["untrained"]) == {"knn", "knn@digits", "linear_probe_5", "linear_probe_5@digits"}
    scores = scores_of(tmp_path / "both", config)
    assert {number for number, _ in scores} == {0, 3}
    assert scores.count((3, "knn@digits")) == 1

    rows, settings = group_by_setting(load_results(tmp_path / "both"))
    assert rows["accuracy.knn@digits"].item() == summary["transfer"]["digits"]["knn"]["accuracy"]
    assert {"kNN (%)", "kNN, on digits (%)"} <= set(settings_table(rows, settings).words.columns)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(terminal.summary_tables(summary))
    row = next(line for line in console.export_text().splitlines() if "kNN, on digits" in line)
    assert f"{100 * summary['transfer']['digits']['knn']['accuracy']:.1f}" in row
    assert protocol_words("linear_probe_5@npz:/a@b.npz") == "linear probe, 5 labels per class, on npz:/a@b.npz"
    assert protocol_words("fine_tune_4@digits") == "fine-tuning, 4 labels per class, on digits"


@pytest.mark.usefixtures("cheap_views")
def test_fine_tuning_with_few_labels_on_each_data_set_beside_scratch(tmp_path: Path) -> None:
    config = small_config(
        federation__rounds=1, strategy__name="end_to_end", evaluation__labels_per_class=(), evaluation__neighbours=0,
        evaluation__data=("digits",), **FINE_TUNING,
    )  # fmt: skip
    summary = train(config, tmp_path / "run")
    names = ("fine_tune_4", "fine_tune", "fine_tune_4@digits", "fine_tune@digits")
    assert set(summary["baselines"]["scratch"]) == set(names)
    few, every = (summary["transfer"]["digits"][name] for name in names[:2])
    assert (few["labels_per_class"], few["draws"], every["labels_per_class"], every["draws"]) == (4, 2, "all", 1)
    assert few["std"] > every["std"] == 0


@pytest.mark.usefixtures("cheap_views")
def test_at_every_evaluation_on_request(tmp_path: Path) -> None:
    config = small_config(evaluation__labels_per_class=(), evaluation__data=("digits",), evaluation__data_when="always")
    train(config, tmp_path / "run")
    assert scores_of(tmp_path / "run", config) == [(number, "knn@digits") for number in range(4)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("synthetic",), "evaluation.data: 'synthetic' is data.name; accepted: other data sets"),
        (("digits", "digits"), "evaluation.data: 'digits' appears twice"),
        (("digit",), r"evaluation.data: unknown 'digit'; accepted: digits, synthetic, .*"),
        (("npz:/nowhere.npz",), r"evaluation.data: 'npz:/nowhere.npz' is not a file; accepted: "),
    ],
)
def test_bad_names_are_refused_before_anything_is_written(names: tuple, message: str, tmp_path: Path) -> None:
    def run() -> None:
        config = small_config(evaluation__data=names)
        check(config)
        train(config, tmp_path / "run")

    with pytest.raises(ConfigError, match=f"^{message}"):
        run()
    assert not (tmp_path / "run").exists()


def test_a_protocol_that_other_data_do_not_allow_names_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"{s}_images": rng.integers(0, 255, (30, 8, 8), dtype=np.uint8) for s in ("train", "test")}
    np.savez(tmp_path / "small.npz", **arrays, **{f"{s}_labels": np.arange(30)[:, None] % 3 for s in ("train", "test")})
    config = small_config(
        evaluation__labels_per_class=(), evaluation__neighbours=55, evaluation__data=(f"npz:{tmp_path}/small.npz",)
    )
    with pytest.raises(
        ConfigError, match=r"^evaluation.data: 'npz:.*': evaluation.neighbours: 55 .* accepted: 0 to 30"
    ):
        train(config, tmp_path / "run")


@pytest.mark.usefixtures("cheap_views", "cache_home")
def test_labels_of_the_validation_split_are_used_instead(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = {"train": 60, "val": 12, "test": 15}
    arrays = {f"{s}_images": rng.integers(0, 255, (n, 8, 8), dtype=np.uint8) for s, n in sizes.items()}
    np.savez(tmp_path / "med.npz", **arrays, **{f"{s}_labels": np.arange(n)[:, None] % 3 for s, n in sizes.items()})
    sizes_of = {"data__name": f"npz:{tmp_path}/med.npz", "evaluation__neighbours": 0, "federation__rounds": 3}
    few = small_config(evaluation__labels_per_class=(5,), evaluation__labelled_split="val", **sizes_of)
    with pytest.raises(ConfigError, match=r"^evaluation.labels_per_class: 5 is more than .*; accepted: 0 to 4"):
        train(few, tmp_path / "few")
    config = small_config(evaluation__labels_per_class=(0,), evaluation__labelled_split="val", **sizes_of)
    other = small_config(evaluation__labels_per_class=(0,), **sizes_of)
    cache = setup.Cache()
    by_val, by_train = train(config, tmp_path / "val", cache=cache), train(other, tmp_path / "train", cache=cache)
    assert by_val["label_free"] == by_train["label_free"]  # the same encoder
    assert by_val["evaluation"] != by_train["evaluation"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"labels_per_class": (5, 5)},
            r"evaluation.labels_per_class: 5 appears twice in \(5, 5\); accepted: each number",
        ),
        (
            {"fine_tune_labels_per_class": (5,)},
            r"fine_tune_labels_per_class: \(5,\) is set, and .*epochs is 0; accepted",
        ),
        ({"fine_tune_epochs": 20, "fine_tune_labels_per_class": ()}, r"fine_tune_labels_per_class: \(\) has no number"),
    ],
)
def test_numbers_of_labels_that_do_nothing_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(**{f"evaluation__{name}": value for name, value in changes.items()})


@pytest.mark.usefixtures("cache_home")
def test_the_same_images_under_two_names_are_refused_and_changed_ones_are_named(tmp_path: Path) -> None:
    def write(seed: int) -> None:
        images = np.random.default_rng(seed).integers(0, 255, (30, 8, 8), dtype=np.uint8)
        labels = np.arange(30)[:, None] % 3
        np.savez(tmp_path / "a.npz", train_images=images, train_labels=labels, test_images=images, test_labels=labels)

    write(0)
    (tmp_path / "b.npz").symlink_to(tmp_path / "a.npz")
    names = (f"npz:{tmp_path}/a.npz", f"npz:{tmp_path}/b.npz")
    twice = small_config(evaluation__labels_per_class=(), evaluation__data=names)
    with pytest.raises(ConfigError, match=r"^evaluation.data: '.*' has the images and labels of another one; accepted"):
        train(twice, tmp_path / "run")
    once = small_config(evaluation__data=names[:1])
    (tmp_path / "run").mkdir()
    about = {"config": to_dict(once), "data": load_run_data(once, ignore, setup.Cache()).fingerprint}
    (tmp_path / "run" / "config.json").write_text(json.dumps(about))
    write(1)
    message = r"begun on other data: evaluation.data 'npz:.*' had images \w+ labels \w+ there and has images \w+ labels"
    with pytest.raises(ConfigError, match=message):
        WorkDir(tmp_path / "run", once).check_data(load_run_data(once, ignore, setup.Cache()).fingerprint)
