"""Rounds on devices are those of a simulator with one lane, bit for bit, whatever happens on the way."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import runs
from conftest import small_config
from fake import FakeLink, worker

from lwfedssl_jax.config import Config, ConfigError, to_dict
from lwfedssl_jax.costs.ledger import ledgers_of
from lwfedssl_jax.pilot import protocol
from lwfedssl_jax.pilot.checks import check_pilot
from lwfedssl_jax.pilot.devices import Devices
from lwfedssl_jax.pilot.journal import Journal
from lwfedssl_jax.pilot.protocol import Message, Missing, Refused, Result, Train
from lwfedssl_jax.pilot.relay import Counted
from lwfedssl_jax.pilot.server import MOST_EMPTY_ROUNDS, PilotSimulator, check_numbers, serve
from lwfedssl_jax.pilot.wire import Wire
from lwfedssl_jax.simulation.setup import Cache, initial_params, prepare, with_full_batch
from lwfedssl_jax.simulation.simulator import Simulator
from lwfedssl_jax.tree import Tree
from lwfedssl_jax.workdir import WorkDir
from lwfedssl_jax.workdir.metrics import PILOT_LINES, read_lines, read_pilot

PROGRAMS = Cache()


def pilot_config(**changes: Any) -> Config:
    return small_config(**{"partition__clients": 3, "runtime__lanes": 1} | changes)


def link_to(config: Config, folder: Path) -> FakeLink:
    """Devices d0, d1, ... with the images of a config's clients, of a restart too."""
    run, link = prepare(config), FakeLink()
    for number in range(config.partition.clients):
        images = run.dataset.train_images[run.clients[number]]
        link.workers[f"node {number}"] = worker(folder, f"d{number}", images, PROGRAMS)
    return link


def all_rounds(simulator: Simulator) -> tuple[Tree, list[dict[str, Any]]]:
    params, state = simulator.resume(0, [{}])
    lines = []
    for stage in simulator.run.stages:
        state = None
        for number in range(stage.first_round + 1, stage.last_round + 1):
            result = simulator.run_rounds(stage, params, state, number)
            params, state, (outcome,) = result.params, result.state, result.outcomes
            lines.append({name: value for name, value in outcome.line.items() if name != "seconds"})
    return jax.device_get(params), lines


def on_devices(config: Config, folder: Path, change: Callable[[str, Message], Message | None] | None = None) -> Any:
    """All rounds of a config on devices: parameters and lines."""
    link, run, journal = link_to(config, folder), prepare(config), Journal(folder, 0)
    if change:
        link.change = change
    devices = Devices(link, journal, 3, 2, 100.0, now=link.clock, sleep=link.sleep)
    return all_rounds(
        PilotSimulator([run], cache=PROGRAMS, devices=devices, journal=journal, at_start=config.partition.clients)
    )


COMBINATIONS: list[dict[str, Any]] = [
    {"strategy__name": "layerwise", "strategy__layers_per_stage": 2},
    {"strategy__name": "progressive", "federation__compression": "int8"},
    {"strategy__name": "layerwise", "objective__name": "mae"},
    {"strategy__name": "progressive", "objective__name": "mocov3"},
    {"strategy__name": "end_to_end", "objective__name": "byol"},
    {"federation__compression": "top=0.05", "privacy__clip": 0.01, "privacy__noise_multiplier": 0.1},
    {"privacy__clip": 0.01, "privacy__noise_multiplier": 0.1, "privacy__canaries": 20, "privacy__quantile": 0.5},
    {"federation__aggregator": "ldawa"},
    {"federation__clients_per_round": 2},
    {"strategy__pacing": "adaptive", "federation__rounds": 6},
    {"additions__depth_dropout": 0.5},
    {"additions__calibration_steps": 2, "partition__server_share": 0.2},
    {
        "model__name": "resnet18",
        "model__patch_size": 0,
        "model__heads": 0,
        "model__width": 4,
        "model__depth": 2,
        "strategy__name": "end_to_end",
    },
]


@pytest.mark.parametrize("changes", COMBINATIONS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_rounds_on_devices_are_those_of_one_lane_bit_for_bit(
    tmp_path: Path, cheap_views: None, changes: dict[str, Any]
) -> None:
    config = pilot_config(**changes)
    params, lines = on_devices(config, tmp_path)
    expected, expected_lines = all_rounds(Simulator([with_full_batch(prepare(config))], cache=PROGRAMS))
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert lines == expected_lines
    peaks = [cost["peak_memory_bytes"] for cost in ledgers_of({"": config}, memory=True)[""]["per_stage"]]
    seen = set[str]()
    for line in read_pilot(tmp_path):
        if "measured" in line:
            predicted, measured = line["predicted"], line["measured"]
            assert (predicted["download"], predicted["upload"]) == (measured["payload_down"], measured["payload_up"])
            assert predicted["memory"] == peaks[line["stage"] - 1]
            assert (predicted["seconds"] is None) == (line["name"] not in seen)  # its speed is not known yet
            seen.add(line["name"])


def test_a_run_on_devices_leaves_what_a_simulated_one_does(
    tmp_path: Path, cheap_views: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pilot_config(federation__rounds=3, strategy__name="layerwise")
    runs.train(config, tmp_path / "simulated", cache=PROGRAMS)
    expected = (tmp_path / "simulated" / "encoder.safetensors").read_bytes()
    serve_and_kill(config, tmp_path / "pilot", None, monkeypatch)
    assert (tmp_path / "pilot" / "encoder.safetensors").read_bytes() == expected
    summaries = [json.loads((tmp_path / name / "summary.json").read_text()) for name in ("simulated", "pilot")]
    assert summaries[0]["evaluation"] == summaries[1]["evaluation"]
    assert summaries[0]["resources"]["measured"].keys() == summaries[1]["resources"]["measured"].keys()


def test_a_run_continues_after_a_kill_between_any_of_its_writes(
    tmp_path: Path, cheap_views: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pilot_config(federation__rounds=3, strategy__name="layerwise")
    writes = serve_and_kill(config, tmp_path / "whole", None, monkeypatch)
    expected = (tmp_path / "whole" / "encoder.safetensors").read_bytes()
    for number in range(0, writes, 7):  # all of them were tried once
        path = tmp_path / f"killed before write {number}"
        serve_and_kill(config, path, number, monkeypatch)
        assert (path / "encoder.safetensors").read_bytes() == expected
        lines = [line for line in read_lines(path, PILOT_LINES) if "measured" in line]
        assert [(line["round"], line["client"]) for line in lines] == [(r, c) for r in (1, 2, 3) for c in (0, 1, 2)]


class Killed(BaseException):
    """Not caught anywhere."""


def serve_and_kill(config: Config, path: Path, before: int | None, monkeypatch: pytest.MonkeyPatch) -> int:
    """Serve a run, killed before one of its writes and then continued; return how many writes there were."""
    writes = [0]

    def counted(inner: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            writes[0] += 1
            if before is not None and writes[0] == before + 1:
                raise Killed
            return inner(*args, **kwargs)

        return write

    with monkeypatch.context() as patched:
        for owner, name in [(WorkDir, "append"), (WorkDir, "save"), (WorkDir, "_write"), (Journal, "write"),
                            (Journal, "_write_roster"), (Journal, "open")]:  # fmt: skip
            patched.setattr(owner, name, counted(getattr(owner, name)))
        link = link_to(config, path.parent / "devices")
        arguments = {"now": link.clock, "sleep": link.sleep, "cache": PROGRAMS}
        try:
            serve(config, WorkDir(path, config), link, 3, 100.0, **arguments)
            assert before is None
        except Killed:
            serve(config, WorkDir(path, config), link_to(config, path.parent / "devices"), 3, 100.0, **arguments)
    return writes[0]


def test_an_update_that_is_not_finite_is_left_out(tmp_path: Path, cheap_views: None) -> None:
    config = pilot_config(federation__rounds=1, strategy__name="end_to_end")

    def change(node: str, answer: Message) -> Message:
        if node == "node 1" and "update" in answer.arrays:
            return answer._replace(arrays={"update": answer.arrays["update"][:-4] + np.float32("nan").tobytes()})
        return answer

    params, (line,) = on_devices(config, tmp_path, change)
    assert (line["clients"], line["left_out"]) == (3, 1)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


def test_a_run_ends_after_some_rounds_without_any_update_and_says_why(tmp_path: Path, cheap_views: None) -> None:
    config = pilot_config(federation__rounds=20, strategy__name="end_to_end")

    def not_finite(node: str, answer: Message) -> Message:
        if "update" in answer.arrays:
            return answer._replace(arrays={"update": answer.arrays["update"][:-4] + np.float32("nan").tobytes()})
        return answer

    def refused(node: str, answer: Message) -> Message:
        return protocol.write(Refused("no room", 1)) if answer.kind == "Result" else answer

    with pytest.raises(OSError, match=rf"in {MOST_EMPTY_ROUNDS} rounds, the last time because: .*no room"):
        on_devices(config, tmp_path / "refused", refused)
    with pytest.raises(OSError, match="no device's update could be used"):
        on_devices(config, tmp_path / "not finite", not_finite)


def test_more_devices_than_can_join_are_not_waited_for(tmp_path: Path) -> None:
    config = pilot_config()
    with pytest.raises(ConfigError, match="--at-start: 4 is out of range; accepted: 1 to 3"):
        serve(config, WorkDir(tmp_path / "run", config), FakeLink(), 4, 100.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("samples", 2**40),
        ("samples", 23),
        ("loss", 3e38),
        ("layers", -1),
        ("train_seconds", float("nan")),
        ("train_seconds", 0.0),
        ("peak_bytes", -1),
    ],
)
def test_numbers_that_cannot_be_are_refused(name: str, value: Any) -> None:
    right, run = (
        Result("r", 1, 0, 12, 1.0, 24, 48, 0.5, 0.5, 0.0, 2**30, 2**20, *Counted(), {}),
        prepare(pilot_config()),
    )
    check_numbers(run, right)
    with pytest.raises(ValueError, match="an update"):
        check_numbers(run, dataclasses.replace(right, **{name: value}))


def test_a_round_in_which_nobody_reports_changes_nothing(tmp_path: Path, cheap_views: None) -> None:
    config = pilot_config(federation__rounds=1, strategy__name="end_to_end")

    def change(node: str, answer: Message) -> Message:
        return protocol.write(Refused("busy", 1)) if answer.kind == "Result" else answer

    params, (line,) = on_devices(config, tmp_path, change)
    assert (line["clients"], line["dropped"], line["loss"], line["upload_bytes"]) == (0, 3, None, 0)
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(initial_params(prepare(config))))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation__client_start": "fedu"}, "federation.client_start: 'fedu' cannot be part of a pilot: keeps"),
        ({"federation__dropout": 0.5}, "federation.dropout: 0.5 cannot .*; accepted: 0.0"),
        ({"evaluation__membership": 5}, "evaluation.membership: 5 cannot"),
        ({"privacy__clip": 0.1, "privacy__secure_sum_bits": 16}, "privacy.secure_sum_bits: 16 cannot"),
        ({"additions__depth_dropout": 0.5, "additions__depth_dropout_per": "round"}, "accepted: 'step'"),
        ({"fleet__devices": ("phone: count=3 memory_gb=1",)}, "fleet.devices: .* the devices are real"),
    ],
)
def test_what_devices_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_pilot(pilot_config(**changes))


def test_a_device_refuses_what_it_cannot_train_and_asks_for_layers_that_it_lacks(tmp_path: Path) -> None:
    config = pilot_config(strategy__name="layerwise")
    run = prepare(config)
    device = worker(tmp_path, "d0", run.dataset.train_images[run.clients[0]], PROGRAMS)
    wire, params = Wire(run), jax.device_get(initial_params(run))
    layer = wire.layer(1, params)
    digest = wire.digest(1, layer)
    request = Train(
        "r", 2, 2, 0, json.dumps(to_dict(config)), digest, 60.0, {"trainable": wire.trainable(run.stages[1], params)}
    )

    def answer(**changes: Any) -> protocol.Content:
        return protocol.read(device.handle(protocol.write(Train(**(vars(request) | changes)))))

    assert answer() == Missing("r", 2, digest)
    assert answer(stage=7) == Refused("d0: a stage 7 of 3", 2)
    assert "not the one with the hash" in str(answer(arrays=request.arrays | {digest: layer[::-1]}))
    assert "0 frozen layers where there are 1" in str(answer(frozen=""))
    assert "a config that cannot be read" in str(answer(config="{"))
    assert "unknown 'nothing'" in str(answer(config='{"data": {"name": "nothing"}}'))
    assert "the time for round 2 is over" in str(answer(seconds=0.0, arrays=request.arrays | {digest: layer}))
    assert "bytes of parameters where" in str(answer(arrays={"trainable": b""}))  # it has kept the layer
    assert "a round 1099511627776 of 3" in str(answer(round=2**40))
    assert "a client -1 of 3" in str(answer(client=-1))
    assert "federation.dropout: 0.5 cannot" in str(
        answer(config=json.dumps(to_dict(pilot_config(federation__dropout=0.5))))
    )
    assert "a config that cannot be read" in str(answer(config="[" * 100_000))
    assert isinstance(answer(), Result)
    (tmp_path / "d0-layers" / digest).write_bytes(b"damaged")
    assert answer() == Missing("r", 2, digest)
    shutil.rmtree(tmp_path / "d0-layers")
    assert answer() == Missing("r", 2, digest)
    assert device.hello().layers == ""
    assert isinstance(answer(arrays=request.arrays | {digest: layer}), Result)
    assert device.hello().layers == digest
    assert "was sent a message Refused" in str(protocol.read(device.handle(protocol.write(Refused("x")))))
    assert "protocol None" in str(protocol.read(device.handle(Message("Train", {}, {}))))


def test_folders_of_a_device(tmp_path: Path) -> None:
    from lwfedssl_jax.pilot.images import DeviceImages, write_images

    with pytest.raises(ConfigError, match="is not a folder"):
        DeviceImages(tmp_path / "nothing")
    (tmp_path / "images" / ".hidden").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has no images"):
        DeviceImages(tmp_path / "images")
    rng = np.random.default_rng(0)
    for channels in (1, 3):
        pictures = rng.integers(0, 256, (3, 4, 4, channels), np.uint8)
        write_images(tmp_path / f"images{channels}", pictures, [2, 0])
        found = DeviceImages(tmp_path / f"images{channels}")
        np.testing.assert_array_equal(found.load(4, channels), pictures[[2, 0]])
    with pytest.raises(ConfigError, match="2 channels; accepted: 1 or 3"):
        write_images(tmp_path / "images2", np.zeros((1, 4, 4, 2), np.uint8), [0])
    (tmp_path / "images" / "a.png").write_text("no image")
    with pytest.raises(ConfigError, match=r"1 of 1 images cannot be read: .*a\.png"):
        DeviceImages(tmp_path / "images").load(4, 1)
