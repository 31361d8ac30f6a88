"""TensorBoard's and Weights & Biases' files, read back: what metrics.jsonl says, once, whatever interrupted the run."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.experiment import trackers, train
from lwfedssl_jax.experiment.checks import check
from lwfedssl_jax.experiment.trackers import TRACKERS, Tracker, Tracking, line_values, summary_values
from lwfedssl_jax.simulation.events import Listener
from lwfedssl_jax.workdir import WorkDir

Points = dict[tuple[str, int], float]


class Killed(Listener):
    """Ends a run as a crash does, in a round after the last checkpoint."""

    def round(self, line: dict[str, Any]) -> None:
        if line["round"] == 5:
            raise RuntimeError("killed")


def expected(lines: list[dict[str, Any]]) -> Points:
    """What a tracker is to show but for the traffic."""
    return {(name, line["round"]): value for line in lines for name, value in line_values(line).items()}


def of_tensorboard(folder: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    points = [((tag, e.step), e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]
    assert len(points) == len(dict(points))
    return dict(points)


def records_of_wandb(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, at, record = file.read_bytes(), 7, b""
    while at < len(content):
        if 32768 - at % 32768 < 7:  # the rest of a block
            at += 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def of_wandb(file: Path) -> tuple[Points, dict[str, Any], Any]:
    """The points, the summary and the record of the run."""
    points: Points = {}
    summary: dict[str, Any] = {}
    for record in records_of_wandb(file):
        if record.HasField("run"):
            run = record.run
        for item in record.history.item:
            name, step = item.key or item.nested_key[0], record.history.step.num
            assert (name, step) not in points
            if name[0] != "_":
                points[name, step] = json.loads(item.value_json)
        for item in record.summary.update:
            summary[item.key or item.nested_key[0]] = json.loads(item.value_json)
    return points, summary, run


def test_a_run_that_was_killed_shows_every_round_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    config = small_config(
        objective__name="simclr",
        strategy__name="progressive",
        model__depth=2,
        federation__rounds=5,
        evaluation__labels_per_class=(),
        runtime__trackers=("tensorboard", "wandb"),
    )
    path = tmp_path / "run"
    with pytest.raises(RuntimeError, match="killed"):
        train.train(config, WorkDir(path, config), Killed())
    before = WorkDir(path, config).metrics()
    assert [line["round"] for line in before if "event" not in line] == [1, 2, 3, 4, 5]
    heard = expected([line for line in before if line["round"] < 5])
    assert heard.items() <= of_wandb(*(path / "wandb").glob("offline-run-*/run-*.wandb"))[0].items()
    assert {key: pytest.approx(value, rel=1e-6) for key, value in heard.items()}.items() <= of_tensorboard(
        path / "tensorboard"
    ).items()

    summary = train.train(config, WorkDir(path, config))
    lines = WorkDir(path, config).metrics()
    points = expected(lines)
    total = summary["resources"]["total_bytes"] / 2**20
    shown = of_tensorboard(path / "tensorboard")
    assert shown.pop(("round/traffic_mib", 5)) == pytest.approx(total)
    in_all = {key[0]: shown.pop(key) for key in [*shown] if key[0].startswith("summary/")}
    assert {key: value for key, value in shown.items() if key[0] != "round/traffic_mib"} == pytest.approx(points)
    values = summary_values(summary)
    assert values["accuracy/knn"] == summary["evaluation"]["knn"]["accuracy"]
    assert in_all == pytest.approx({f"summary/{name}": value for name, value in values.items()})

    runs = [of_wandb(file) for file in sorted((path / "wandb").glob("offline-run-*/run-*.wandb"))]
    assert [run.run_id for *_, run in runs] == [(path / "wandb" / "run_id").read_text()] * 2
    shown, in_all, run = runs[-1]
    assert shown.pop(("round/traffic_mib", 5)) == pytest.approx(total)
    assert {key: value for key, value in shown.items() if key[0] != "round/traffic_mib"} == points
    assert {name: in_all[name] for name in values} == values
    assert (run.project, run.display_name) == ("lwfedssl_jax", "run")
    assert {item.key: json.loads(item.value_json) for item in run.config.update}["federation"]["rounds"] == 5
    assert capfd.readouterr() == ("", "")
    assert train.train(config, WorkDir(path, config)) == summary  # which opens no tracker
    assert len([*(path / "wandb").glob("offline-run-*")]) == 2


class Hearing(Listener):
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, what: str) -> None:
        self.notes.append(what)


def failing(when: str) -> Tracker:
    def fail(now: str) -> None:
        if now == when:
            raise OSError(28, "No space left on device")

    fail("open")
    return Tracker(lambda step, values: fail("log"), lambda values: fail("finish"))


@pytest.mark.parametrize("when", ["open", "log", "finish"])
def test_a_tracker_that_fails_is_left_out_and_said_once(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, dict[str, float]]] = []
    finished: list[dict[str, float] | None] = []
    monkeypatch.setitem(TRACKERS, "failing", lambda config, directory: failing(when))
    monkeypatch.setitem(
        TRACKERS,
        "whole",
        lambda config, directory: Tracker(lambda step, values: logged.append((step, values)), finished.append),
    )
    config = small_config(runtime__trackers=("failing", "whole"))
    check(config)
    workdir, listener = WorkDir(tmp_path, config), Hearing()
    sent = {"clients": 3, "dropped": 1, "download_bytes": 4 * 2**20, "upload_bytes": 0}
    workdir.append({"event": "evaluation", "round": 0, "protocol": "knn", "accuracy": 0.25})
    run: Any = None
    with Tracking(config, workdir, listener) as tracking:
        tracking.start(run, 0)
        tracking.round({"round": 1, "loss": 2.0, **sent})
        tracking.round({"round": 2, "loss": None, **sent})
        tracking.evaluation({"event": "evaluation", "round": 0, "protocol": "f", "baseline": "scratch", "accuracy": 1})
    assert logged == [
        (0, {"evaluation/knn": 0.25}),
        (1, {"round/loss": 2.0, **{f"round/{k}": v for k, v in sent.items()}, "round/traffic_mib": 1.0}),
        (2, {**{f"round/{k}": v for k, v in sent.items()}, "round/traffic_mib": 2.0}),
        (2, {"scratch/f": 1}),
    ]
    assert finished == [None]
    assert listener.notes == [
        "runtime.trackers: failing failed and is left out from here on (OSError: [Errno 28] No space left on device)"
    ]


def test_a_full_disk_is_an_error_of_tensorboard_at_once(tmp_path: Path) -> None:
    tracker = TRACKERS["tensorboard"](small_config(), tmp_path)
    (file,) = (tmp_path / "tensorboard").iterdir()
    tracker.log(0, {"a": 1.0})
    size = file.stat().st_size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            tracker.log(1, {"a": 2.0})
    tracker.finish(None)
    assert file.stat().st_size > size


def test_listeners_hear_everything_through_it(tmp_path: Path) -> None:
    heard: list[str] = []
    methods = [name for name in vars(Listener) if not name.startswith("_")]
    inner: Any = Listener()
    for name in methods:
        setattr(inner, name, lambda *_, name=name: heard.append(name))
    with Tracking(small_config(), None, inner) as tracking:
        line = {"round": 1, "event": "evaluation", "protocol": "knn", "accuracy": 0.5}
        given: dict[str, tuple[Any, ...]] = {"start": (None, 0), "steps": (1, 1, 2), "round": (line,)}
        given |= {"evaluation": (line,), "finished": ({},)}
        for name in methods:
            getattr(tracking, name)(*given.get(name, ("what",)))
    assert heard == methods


def test_trackers_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"runtime.trackers: unknown 'wandbs'; accepted: tensorboard, wandb"):
        check(small_config(runtime__trackers=("tensorboard", "wandbs")))
    check(small_config(runtime__trackers=("tensorboard", "wandb")))
    monkeypatch.setattr(sys, "path", [])  # where installed packages are found
    with pytest.raises(ConfigError, match=r'wandb is not installed; accepted: pip install "lwfedssl_jax\[wandb\]"'):
        check(small_config(runtime__trackers=("tensorboard", "wandb")))


def test_every_extra_is_a_tracker_that_the_package_offers() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    assert TRACKERS.keys() & project["optional-dependencies"].keys() >= trackers.EXTRAS
