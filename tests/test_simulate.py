"""Whole runs: what they write, how often they compile, how they continue."""

import contextlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import known_traces, run_round, small_config
from PIL import Image
from safetensors.numpy import load_file

from lwfedssl_jax import load_encoder, tree
from lwfedssl_jax.analysis import terminal
from lwfedssl_jax.config import Config, ConfigError, override, resolve
from lwfedssl_jax.costs import ledger
from lwfedssl_jax.evaluation import frozen
from lwfedssl_jax.experiment import train as experiment
from lwfedssl_jax.experiment.active import ActiveRun
from lwfedssl_jax.simulation import events, feed, setup
from lwfedssl_jax.simulation import simulator as simulator_module
from lwfedssl_jax.simulation.cohort import draw_cohort, pack_cohort
from lwfedssl_jax.simulation.simulator import Simulator
from lwfedssl_jax.workdir import WorkDir, checkpoint


class Interrupting:
    """Sends this process a signal in the middle of a round, or as soon as it has ended."""

    def __init__(self, number: int, when: str = "after", sent: signal.Signals = signal.SIGINT) -> None:
        self.number, self.when, self.sent = number, when, sent
        self.notices: list[str] = []
        self.heard_after = 0

    def __call__(self, event: events.Event) -> None:
        match event:
            case events.StepsDone() if self.notices:
                self.heard_after += 1
            case events.StepsDone(number) if (number, self.when) == (self.number, "within"):
                signal.raise_signal(self.sent)
            case events.RoundDone(line) if (line["round"], self.when) == (self.number, "after"):
                signal.raise_signal(self.sent)
            case events.Note(text):
                self.notices.append(text)


def train(
    config: Config, path: Path, hear: events.Hear = events.ignore, cache: setup.Cache | None = None
) -> dict[str, Any]:
    return experiment.train(config, WorkDir(path, config), hear, cache)


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
    for plot in ("clients", "loss", "accuracy", "client_distance", "resources"):
        assert (path / "plots" / f"{plot}.png").stat().st_size > 5000
    assert "linear probe" in (path / "report.html").read_text()
    summary = json.loads((path / "summary.json").read_text())
    assert (summary["strategy"], summary["objective"], summary["rounds"]) == ("layerwise", "simclr", 5)
    assert set(summary["evaluation"]) == set(summary["baselines"]["untrained"]) == {"linear_probe_5", "knn"}
    assert 0 < summary["evaluation"]["knn"]["accuracy"] <= 1
    assert summary["resources"]["peak_memory_bytes"] > 0
    assert set(summary["strategies"]) == {"layerwise", "progressive", "end_to_end"}


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
            "examples", "steps",
            "download_bytes", "upload_bytes", "seconds", "lane_utilisation",
        }  # fmt: skip
        assert line["clients"] == 3
        assert line["seconds"] > 0
    evaluations = [(line["round"], line["depth"]) for line in lines if line.get("event") == "evaluation"]
    assert list(dict.fromkeys(evaluations)) == [(0, 3), (2, 1), (4, 2), (5, 3)]


@pytest.mark.usefixtures("cheap_views")
@pytest.mark.parametrize("strategy", ["layerwise", "progressive", "end_to_end"])
def test_ledger_equals_the_bytes_rounds_really_passed(strategy: str) -> None:
    """The ledger counts shapes; here the arrays themselves are weighed, as sent and as put back."""
    config = small_config(strategy__name=strategy)
    run = setup.prepare(config)
    params = setup.initial_params(run)
    simulator = Simulator([run])
    for stage, row in zip(run.stages, ledger.make_ledger(config, known_traces())["per_stage"], strict=True):
        sent = sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree.take(params, tree.rows(stage.trainable))))
        after, _, line = run_round(simulator, stage, simulator.stack.place(params), None, stage.number)
        changed = sum(
            int((np.asarray(a) != np.asarray(b)).reshape(n, -1).any(axis=1).sum()) * (np.asarray(a).nbytes // n)
            for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True)
            for n in [len(a) if a.shape[:1] == (config.model.depth,) else 1]
        )
        assert row["download_bytes"] == row["rounds"] * sent
        assert row["upload_bytes"] == row["rounds"] * changed
        # When a stage begins, everybody fetches the average of the layer that the one before has finished.
        finished = sum(
            x.nbytes // x.shape[0]
            for mask, x in zip(jax.tree.leaves(stage.frozen), jax.tree.leaves(params), strict=True)
            if np.ndim(mask) and mask[stage.frozen_depth - 1]
        )
        if stage.number == 2 and strategy == "layerwise":
            finished += sum(np.asarray(x).nbytes for x in jax.tree.leaves(params["encoder"]["embedding"]))
        assert line["download_bytes"] == config.partition.clients * (sent + finished)
        assert line["upload_bytes"] == config.partition.clients * sent
        params = after


@pytest.mark.usefixtures("cheap_views")
@pytest.mark.parametrize(("strategy", "programs"), [("layerwise", 2), ("progressive", 1), ("end_to_end", 1)])
def test_one_program_for_all_stages(strategy: str, programs: int, tmp_path: Path, compiled: list[str]) -> None:
    """And a second one for the embedding of layerwise's first stage; cohorts of any size, a round without reporters."""
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
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run", listener, cache)
        assert listener.notices == ["stopping after this call; once more stops at once"]
        assert listener.heard_after == 0
        saved.append(checkpoint.saved_rounds(tmp_path / "run" / "checkpoints")[-1])
    assert saved == [1, 2, 4]
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    newest = tmp_path / "run" / "checkpoints" / "4" / checkpoint.MANIFEST
    newest.write_text(newest.read_text().replace("  state/", "  state.", 1))
    listener = Interrupting(0)
    train(config, tmp_path / "run", listener, cache)
    (notice,) = listener.notices
    assert notice.startswith("checkpoint 4 is damaged: not what was saved: ")
    expected, found = load_file(whole / "encoder.safetensors"), load_file(tmp_path / "run" / "encoder.safetensors")
    assert set(expected) == set(found)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)

    def lines(path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in line.items() if k != "seconds"} for line in WorkDir(path, config).metrics()]

    assert lines(tmp_path / "run") == lines(whole)


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
        losses[name] = WorkDir(tmp_path / name, config).metrics()[2]["loss"]
    assert losses["plain"] != losses["half"] == pytest.approx(losses["plain"], rel=0.05)
    assert losses["remat"] == pytest.approx(losses["plain"], rel=1e-4)


def test_lanes_default_to_what_the_device_suggests_within_the_cohort() -> None:
    def choose(lanes: int, devices: int) -> tuple[int, int]:
        run = setup.prepare(small_config(runtime__lanes=lanes), jax.devices()[:devices])
        return run.lanes, run.mesh.size

    assert choose(0, 1) == (1, 1)
    assert choose(0, 4) == (4, 4)
    assert choose(3, 1) == (3, 1)
    assert choose(3, 2) == (4, 2)
    assert choose(2, 4) == (2, 2)
    assert choose(9, 1) == (4, 1)


def test_cohorts_are_drawn_without_repeats_and_drop_out_at_the_asked_rate() -> None:
    run = setup.prepare(small_config(partition__clients=20, federation__clients_per_round=10, federation__dropout=0.3))
    drawn = [draw_cohort(run, number) for number in range(200)]
    assert all(len(set(cohort)) == 10 and set(reporting) <= set(cohort) for cohort, reporting in drawn)
    assert np.mean([len(reporting) for _, reporting in drawn]) == pytest.approx(7, abs=0.4)
    assert {c for cohort, _ in drawn for c in cohort} == set(range(20))
    assert drawn[3] == draw_cohort(run, 3)


def test_clients_without_data_are_never_drawn() -> None:
    run = setup.prepare(small_config(partition__clients=80, partition__kind="iid", partition__allow_empty=True))
    cohort, reporting = draw_cohort(run, 1)
    assert cohort == reporting
    assert len(reporting) == 60


def test_calls_of_natural_clients_take_their_images_from_a_mapped_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng, rows = np.random.default_rng(0), ["file,client"]
    for label in ("a", "b", "."):  # the last ones have no label
        (tmp_path / "data" / "train" / label).mkdir(parents=True, exist_ok=True)
        for i in range(12):
            path = tmp_path / "data" / "train" / label / f"{i}.png"
            Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)
            rows.append(f"{path.relative_to(tmp_path / 'data')},{i % 3}")
    shutil.copytree(tmp_path / "data" / "train" / "a", tmp_path / "data" / "test" / "a")
    (tmp_path / "data" / "clients.csv").write_text("\n".join(rows))
    config = small_config(data__name=f"folder:{tmp_path}/data", partition__kind="natural", partition__clients=3)

    heard = list[events.Event]()
    run = setup.prepare(config, hear=heard.append)
    images = run.dataset.train_images
    assert isinstance(images, np.memmap)
    assert run.clients.sizes.tolist() == [12, 12, 12]
    calls = list(pack_cohort(run, [0, 1, 2], 1).calls)
    streamed = feed.streamed(images, np.asarray).serve(iter(calls))  # type: ignore[arg-type]
    for (pixels_WxNxHxWxC, plan, _), (whole, _) in zip(streamed, calls, strict=True):
        by_lane = pixels_WxNxHxWxC[np.arange(run.lanes)[:, None], plan.examples]
        np.testing.assert_array_equal(by_lane, images[whole.examples])
    assert heard[:2] == [events.Loading(f"decoding {done} of 48 images") for done in (36, 48)]


@pytest.mark.usefixtures("cheap_views")
def test_a_flat_folder_is_trained_on_and_not_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
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


def test_a_server_share_that_does_not_fit_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(partition__server_share=0.5)
    assert len(setup.prepare(config).server_images) == 30
    monkeypatch.setattr(simulator_module, "memory_limit", lambda mesh: 15 * 8 * 8 * 3 * 4)
    monkeypatch.setattr(setup, "memory_limit", lambda mesh: 15 * 8 * 8 * 3 * 4)
    with pytest.raises(ConfigError, match=r"partition\.server_share: 0\.5 gives .* GiB.*; accepted: at most 0\.25"):
        setup.prepare(config)


def test_default_config_is_the_papers() -> None:
    config = resolve(Config())
    assert (config.federation.rounds, config.federation.local_epochs, config.optimizer.batch_size) == (180, 3, 512)


def test_runs_together_are_the_same_runs(tmp_path: Path, compiled: list[str]) -> None:
    """Interrupted, continued, one of them failing on the way; each writes what it would alone, but rounding."""
    numbers = [
        {"runtime__seed": 1, "optimizer__learning_rate": 0.01},
        {"runtime__seed": 2, "optimizer__learning_rate": 3e38},
        {
            "runtime__seed": 3,
            "optimizer__learning_rate": 0.02,
            "objective__temperature": 0.5,
            "federation__dropout": 0.3,
        }
        | {"evaluation__every": 1},
    ]
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
        rounded = {"loss", "client_distance", "lane_utilisation"} & set(line)
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
