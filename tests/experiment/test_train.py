"""Whole runs: what they write, how often they compile, how they continue."""

import contextlib
import json
import signal
from pathlib import Path
from typing import Any, get_type_hints

import chex
import jax
import numpy as np
import pytest
from conftest import small_config
from PIL import Image
from runs import Interrupting, train
from safetensors.numpy import load_file

from lwfedssl_jax import load_encoder
from lwfedssl_jax.analysis import terminal
from lwfedssl_jax.config import Config, ConfigError, override
from lwfedssl_jax.costs.ledger import make_ledger
from lwfedssl_jax.evaluation import frozen
from lwfedssl_jax.evaluation.label_free import LabelFree
from lwfedssl_jax.experiment import ledgers
from lwfedssl_jax.experiment import train as experiment
from lwfedssl_jax.experiment.active import ActiveRun
from lwfedssl_jax.simulation import events, rounds, setup
from lwfedssl_jax.simulation import simulator as simulator_module
from lwfedssl_jax.workdir import WorkDir, checkpoint

REAL_KNOWN_TRACES = ledgers.known_traces  # replaced during tests


@pytest.fixture(scope="module")
def cache() -> setup.Cache:
    """For runs of this module whose programs are the same, and nothing of them replaced."""
    return setup.Cache()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, cache: setup.Cache) -> tuple[Config, Path]:
    config = small_config(federation__rounds=5, federation__clients_per_round=3, evaluation__every=2)
    path = tmp_path_factory.mktemp("runs") / "whole"
    train(config, path, cache=cache)
    return config, path


def test_work_directory(finished: tuple[Config, Path]) -> None:
    _, path = finished
    written = json.loads((path / "config.json").read_text())
    assert written["config"]["federation"]["rounds"] == 5
    assert {"jax", "flax", "python"} <= set(written["versions"])
    assert written["device"].startswith("cpu")
    for plot in ("clients", "loss", "accuracy", "client_distance", "resources", "views", "neighbours"):
        assert (path / "plots" / f"{plot}.png").stat().st_size > 5000
    assert "linear probe" in (path / "report.html").read_text()
    summary = json.loads((path / "summary.json").read_text())
    assert (summary["strategy"], summary["objective"], summary["rounds"]) == ("layerwise", "simclr", 5)
    assert set(summary["evaluation"]) == set(summary["baselines"]["untrained"]) == {"linear_probe_5", "knn"}
    assert 0 < summary["evaluation"]["knn"]["accuracy"] <= 1
    assert summary["resources"]["peak_memory_bytes"] > 0
    assert set(summary["strategies"]) == {"layerwise", "progressive", "end_to_end"}


def test_ledgers_of_one_cache_share_what_they_trace(cache: setup.Cache) -> None:
    assert REAL_KNOWN_TRACES(cache) is REAL_KNOWN_TRACES(cache) is not REAL_KNOWN_TRACES(setup.Cache())


def test_the_encoder_that_is_left_has_the_summarys_accuracy(finished: tuple[Config, Path]) -> None:
    config, path = finished
    encode, dataset = load_encoder(path), setup.prepare(config).dataset
    found = frozen.evaluate(config.evaluation, dataset, encode(dataset.train_images), encode(dataset.test_images))
    summary = json.loads((path / "summary.json").read_text())
    assert {k: v["accuracy"] for k, v in found.items()} == {k: v["accuracy"] for k, v in summary["evaluation"].items()}


def test_lanes_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulator_module, "memory_limit", lambda mesh: 1000)
    monkeypatch.setattr(setup, "memory_limit", lambda mesh: 1000)
    with pytest.raises(ConfigError, match=r"runtime.lanes: 2 need .* accepted: "):
        train(small_config(runtime__lanes=2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_metrics_have_a_line_a_round_and_evaluations_when_due(finished: tuple[Config, Path]) -> None:
    _, path = finished
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in lines if "event" not in line]
    assert [(line["round"], line["stage"]) for line in rounds] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)]
    for line in rounds:
        assert set(line) == {
            "round", "stage", "loss", "client_distance", "clients", "dropped", "left_out", "cannot_afford",
            "too_few_examples", "examples", "examples_left_out", "steps",
            "download_bytes", "upload_bytes", "seconds", "lane_utilisation",
        }  # fmt: skip
        assert line["clients"] == 3
        assert line["seconds"] > 0
    evaluations = [(line["round"], line["depth"]) for line in lines if line.get("event") == "evaluation"]
    assert list(dict.fromkeys(evaluations)) == [(0, 3), (2, 1), (4, 2), (5, 3)]


@pytest.mark.usefixtures("cheap_views")
@pytest.mark.parametrize(("strategy", "programs"), [("layerwise", 2), ("progressive", 1), ("end_to_end", 1)])
def test_one_program_for_all_stages(
    strategy: str, programs: int, tmp_path: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a second one for the embedding of layerwise's first stage; cohorts of any size, a round without reporters.

    A client's step is traced once for each program.
    """
    chex.clear_trace_counter()
    monkeypatch.setattr(rounds, "client_step", chex.assert_max_traces(rounds.client_step, programs))
    config = small_config(
        strategy__name=strategy,
        federation__rounds=8,
        federation__clients_per_round=2,
        federation__dropout=0.4,
        model__depth=5,
        strategy__layers_per_stage=2,
        evaluation__labels_per_class=(),
    )
    train(config, tmp_path / "run")
    clients = {line["clients"] for line in WorkDir(tmp_path / "run", config).metrics() if "event" not in line}
    assert len(clients) > 1
    for name in ("train_stage", "start_stage", "finish_stage"):
        assert compiled.count(f"jit({name})") == programs


def test_an_interrupted_run_continues_to_the_same_bits(
    finished: tuple[Config, Path], cache: setup.Cache, tmp_path: Path
) -> None:
    config, whole = finished
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    saved = []
    for number, when, sent in ((1, "after", signal.SIGINT), (3, "within", signal.SIGTERM), (4, "after", signal.SIGINT)):
        listener = Interrupting(number, when, sent)
        with pytest.raises(KeyboardInterrupt, match=r"interrupted; the same command continues after round [124]$"):
            train(config, tmp_path / "run", listener, cache)
        assert listener.notices == ["stopping after this call; once more stops at once"]
        assert listener.heard_after == 0
        saved.append(checkpoint.saved_rounds(tmp_path / "run" / "checkpoints")[-1])
    assert saved == [1, 2, 4]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    newest = tmp_path / "run" / "checkpoints" / "4" / checkpoint.MANIFEST
    newest.write_text(newest.read_text().replace("  state/", "  state.", 1))
    listener = Interrupting(0)
    train(config, tmp_path / "run", listener)  # compiled again, as in a new process
    (notice,) = listener.notices
    assert notice.startswith("checkpoint 4 is damaged: not what was saved: ")
    expected, found = load_file(whole / "encoder.safetensors"), load_file(tmp_path / "run" / "encoder.safetensors")
    assert set(expected) == set(found)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)

    def lines(path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in WorkDir(path, config).metrics()]

    assert lines(tmp_path / "run") == lines(whole)


@pytest.mark.usefixtures("cheap_views")
def test_adaptive_stages_are_the_same_after_an_interruption(tmp_path: Path) -> None:
    config = small_config(
        strategy__pacing="adaptive", federation__rounds=10, partition__kind="iid", evaluation__labels_per_class=()
    )
    cache = setup.Cache()
    summary = train(config, tmp_path / "whole", cache=cache)
    for number in (2, 6):
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", Interrupting(number), cache)
    assert train(config, tmp_path / "run", cache=cache)["evaluation"] == summary["evaluation"]

    def lines(path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in WorkDir(path, config).metrics()]

    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    rounds = [line for line in lines(tmp_path / "whole") if "event" not in line]
    used = [sum(line["stage"] == stage for line in rounds) for stage in (1, 2, 3)]
    measured = summary["resources"]["measured"]
    assert (tmp_path / "run" / "plots" / "pacing.png").stat().st_size > 5000
    assert measured["rounds_per_stage"] == used == [row["rounds"] for row in summary["resources"]["per_stage"]]
    planned = make_ledger(config)
    assert used != [row["rounds"] for row in planned["per_stage"]]
    assert summary["resources"]["total_bytes"] != planned["total_bytes"]
    ends = [line["round"] for line in rounds if line["stage_ends"]]
    assert ends == [sum(used[: stage + 1]) for stage in range(3)]
    assert [line["round"] for line in lines(tmp_path / "whole") if line.get("protocol") == "knn"] == [0, *ends]
    assert summary["strategies"]["layerwise"] == {k: v for k, v in summary["resources"].items() if k != "measured"}


def test_a_signal_that_a_callback_swallows_is_not_forgotten(tmp_path: Path) -> None:
    """As JAX's of the garbage collector do, where an exception is lost."""

    def swallow(event: events.Event) -> None:
        if isinstance(event, events.Compiling):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        train(small_config(), tmp_path / "run", swallow)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_run_again(finished: tuple[Config, Path], compiled: list[str]) -> None:
    config, path = finished
    before = (path / "metrics.jsonl").read_bytes()
    summary = train(config, path)
    assert summary == json.loads((path / "summary.json").read_text())
    assert compiled == []
    assert (path / "metrics.jsonl").read_bytes() == before


def test_training_learns(tmp_path: Path) -> None:
    config = small_config(
        strategy__name="end_to_end",
        objective__name="simclr",
        data__synthetic_examples=300,
        federation__rounds=10,
        optimizer__learning_rate=0.3,
    )
    train(config, tmp_path / "run")
    losses = [line["loss"] for line in WorkDir(tmp_path / "run", config).metrics() if "event" not in line]
    assert np.mean(losses[-2:]) < 0.9 * losses[0]


def test_a_loss_that_is_not_finite_stops_the_run_and_says_what_to_lower(
    finished: tuple[Config, Path], cache: setup.Cache, tmp_path: Path
) -> None:
    config = override(finished[0], {"optimizer.learning_rate": 1e30})
    with pytest.raises(
        FloatingPointError, match=r"no client's update is finite in round 1; lower optimizer\.learning_rate"
    ):
        train(config, tmp_path / "loss", cache=cache)


@pytest.mark.usefixtures("cheap_views")
def test_features_that_are_not_finite_stop_the_run_and_it_says_what_to_lower(tmp_path: Path) -> None:
    # One step a client: the loss is still that of the first parameters.
    config = small_config(
        optimizer__learning_rate=1e17,
        optimizer__batch_size=64,
        federation__local_epochs=1,
        federation__rounds=1,
        strategy__name="end_to_end",
        model__depth=1,
    )
    with pytest.raises(FloatingPointError, match=r"features are not finite in round 1; lower optimizer"):
        train(config, tmp_path / "features")


def test_bfloat16_and_remat_run(tmp_path: Path) -> None:
    """Both fields reach the compiled program: losses differ from float32 a little, and not at all under remat."""
    losses = {}
    runs: dict[str, dict[str, Any]] = {
        "plain": {},
        "half": {"runtime__precision": "bfloat16"},
        "remat": {"runtime__remat": True},
    }
    for name, options in runs.items():
        config = small_config(federation__rounds=1, strategy__name="end_to_end", **options)
        with jax.numpy_dtype_promotion("standard"):  # flax's batch normalisation promotes bfloat16
            train(config, tmp_path / name)
        (losses[name],) = (line["loss"] for line in WorkDir(tmp_path / name, config).metrics() if "loss" in line)
    assert losses["plain"] != losses["half"] == pytest.approx(losses["plain"], rel=0.05)
    assert losses["remat"] == pytest.approx(losses["plain"], rel=1e-4)


@pytest.mark.usefixtures("cheap_views", "cache_home")
def test_a_flat_folder_is_trained_on_and_not_evaluated(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "data").mkdir()
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / "data" / f"{i}.png")
    fields = {"data__name": f"folder:{tmp_path}/data", "strategy__name": "end_to_end", "federation__rounds": 1}
    with pytest.raises(ConfigError, match=r"partition\.kind: dirichlet needs labels, .*; accepted here: iid, "):
        setup.prepare(small_config(**fields))
    with pytest.raises(ConfigError, match=r"evaluation\.fine_tune_epochs: 11 needs labels, .*; accepted: 0"):
        train(small_config(**fields, partition__kind="iid", evaluation__fine_tune_epochs=11), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    for _ in range(2):  # the second time from the cache
        run = setup.prepare(small_config(**fields, partition__kind="iid"))
        assert (len(run.dataset.train_images), len(run.dataset.test_images), run.dataset.classes) == (24, 0, 0)
    summary = train(run.config, tmp_path / "run")
    assert summary["evaluation"] == {}
    assert summary["resources"]["measured"]["upload_bytes"] > 0
    assert load_encoder(tmp_path / "run")(run.dataset.train_images).shape == (24, 8)
    assert not (tmp_path / "run" / "plots" / "accuracy.png").exists()
    assert "protocol" not in repr(terminal.summary_tables(summary).renderables[0])


def test_runs_together_are_the_same_runs(tmp_path: Path, compiled: list[str]) -> None:
    """Interrupted, continued, one of them failing on the way; each writes what it would alone, but rounding.

    The learning rates are small: AdamW magnifies rounding, at a rate of 0.1 to 2 % of the distance in round 4.
    """
    numbers = [
        {"runtime__seed": 1, "optimizer__learning_rate": 0.01},
        {"runtime__seed": 2, "optimizer__learning_rate": 3e38},
        {
            "runtime__seed": 3, "optimizer__learning_rate": 0.02, "objective__temperature": 0.5,
            "federation__dropout": 0.3, "evaluation__every": 1,
        },
    ]  # fmt: skip
    same = {"federation__rounds": 4, "strategy__name": "progressive", "objective__name": "simclr", "model__depth": 2}
    configs = [small_config(**same | changes) for changes in numbers]
    members = [ActiveRun(c, WorkDir(tmp_path / str(i), c)) for i, c in enumerate(configs)]
    members[2].listeners.append(Interrupting(2))
    with pytest.raises(KeyboardInterrupt):
        experiment.train_together(members)
    assert isinstance(members[1].error, FloatingPointError)
    assert [checkpoint.saved_rounds(tmp_path / name / "checkpoints")[-1:] for name in "012"] == [[2], [], [2]]
    before = len(compiled)
    members = [ActiveRun(c, WorkDir(tmp_path / str(i), c)) for i, c in enumerate(configs)]
    experiment.train_together(members)
    assert "no client's update is finite in round 1" in str(members[1].error)
    assert compiled[before:].count("jit(train_stage)") == 2  # of the two that go on, and of the one that begins again
    assert [member.summary is None for member in members] == [False, True, False]
    assert [(tmp_path / name / "summary.json").exists() for name in "012"] == [True, False, True]
    together, alone = members[2].summary, train(configs[2], tmp_path / "alone")
    assert together is not None
    assert set(together) == set(alone)
    assert together["resources"]["measured"]["download_bytes"] == alone["resources"]["measured"]["download_bytes"]
    found, expected = (WorkDir(tmp_path / name, configs[2]).metrics() for name in ("2", "alone"))
    assert [set(line) for line in found] == [set(line) for line in expected]
    for line, of_alone in zip(found, expected, strict=True):
        rounded = {"loss", "client_distance", "lane_utilisation", *get_type_hints(LabelFree)} & set(line)
        rounded = {name for name in rounded if of_alone[name] is not None}  # as if nobody reports
        scores = {"seconds", "accuracy", "std", "mean_per_class_accuracy", "precision", "recall", "f1"}
        equal = set(line) - rounded - scores
        assert {k: line[k] for k in equal} == {k: of_alone[k] for k in equal}
        assert {k: line[k] for k in rounded} == pytest.approx({k: of_alone[k] for k in rounded}, rel=0.02)


def test_shared_runs_compile_once_and_write_the_same_bits(tmp_path: Path, compiled: list[str]) -> None:
    shared = setup.Cache()
    configs = [small_config(runtime__seed=seed, optimizer__learning_rate=0.1 + seed / 10) for seed in (0, 1)]
    for config, name in zip(configs, "ab", strict=True):
        before = len(compiled)
        experiment.train(config, WorkDir(tmp_path / name, config), cache=shared)
    assert not {f"jit({name})" for name in ("train_stage", "start_stage", "finish_stage", "forward")} & set(
        compiled[before:]
    )
    train(configs[1], tmp_path / "alone")
    encoders = [(tmp_path / name / "encoder.safetensors").read_bytes() for name in ("a", "b", "alone")]
    assert encoders[0] != encoders[1] == encoders[2]
