"""TensorBoard's and Weights & Biases' files, read back: what metrics.jsonl says, once, whatever interrupted the run."""

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, small_config

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.experiment import trackers, train
from lwfedssl_jax.experiment.active import ActiveRun
from lwfedssl_jax.experiment.checks import check
from lwfedssl_jax.experiment.trackers import TRACKERS, Tracker, Tracking, line_values, summary_values
from lwfedssl_jax.simulation.events import Evaluated, Event, Note, RoundDone, Started
from lwfedssl_jax.workdir import WorkDir

Points = dict[tuple[str, int], float]


def kill(event: Event) -> None:
    """Ends a run as a crash does, in a round after the last checkpoint."""
    if isinstance(event, RoundDone) and event.line["round"] == 5:
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
        train.train(config, WorkDir(path, config), kill)
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


def failing(when: str) -> Tracker:
    def fail(now: str) -> None:
        if now == when:
            raise OSError(28, "No space left on device")

    fail("open")
    return Tracker(lambda step, values: fail("log"), lambda values: fail("finish"))


@pytest.mark.parametrize("when", ["open", "log", "finish"])
def test_a_tracker_that_fails_is_switched_off_and_said_once(
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
    workdir, heard = WorkDir(tmp_path, config), list[Event]()
    sent = {"clients": 3, "dropped": 1, "download_bytes": 4 * 2**20, "upload_bytes": 0}
    workdir.append({"event": "evaluation", "round": 0, "protocol": "knn", "accuracy": 0.25})
    with Tracking(config, workdir, heard.append) as tracking:
        tracking(Started(config, 1, np.array([1]), 1, 1, 0, []))
        tracking(RoundDone({"round": 1, "loss": 2.0, **sent}))
        tracking(RoundDone({"round": 2, "loss": None, **sent}))
        tracking(Evaluated({"round": 0, "event": "evaluation", "protocol": "f", "baseline": "scratch", "accuracy": 1}))
    assert logged == [
        (0, {"evaluation/knn": 0.25}),
        (1, {"round/loss": 2.0, **{f"round/{k}": v for k, v in sent.items()}, "round/traffic_mib": 1.0}),
        (2, {**{f"round/{k}": v for k, v in sent.items()}, "round/traffic_mib": 2.0}),
        (2, {"scratch/f": 1}),
    ]
    assert finished == [None]
    assert heard == [
        Note(
            "runtime.trackers: failing failed and is switched off from here on "
            "(OSError: [Errno 28] No space left on device)"
        )
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


def test_all_listeners_of_a_run_hear_all_of_its_events() -> None:
    first, second = list[Event](), list[Event]()
    run = ActiveRun(small_config(), None, [first.append, second.append])
    for event in (Note("a"), RoundDone({"round": 1})):
        run.hear(event)
    assert first == second == [Note("a"), RoundDone({"round": 1})]


def test_trackers_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"runtime.trackers: unknown 'wandbs'; accepted: tensorboard, wandb"):
        check(small_config(runtime__trackers=("tensorboard", "wandbs")))
    check(small_config(runtime__trackers=("tensorboard", "wandb")))
    monkeypatch.setattr(sys, "path", [])  # where installed packages are found
    with pytest.raises(ConfigError, match=r'wandb is not installed; accepted: pip install "lwfedssl_jax\[wandb\]"'):
        check(small_config(runtime__trackers=("tensorboard", "wandb")))


def test_every_extra_is_a_tracker_that_the_package_offers() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert TRACKERS.keys() & project["optional-dependencies"].keys() >= trackers.EXTRAS
