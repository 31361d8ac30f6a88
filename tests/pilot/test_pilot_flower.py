"""Pilots in real processes, which are killed, stopped and started again; `pytest -m flower`."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import small_config

from lwfedssl_jax.config import Config
from lwfedssl_jax.pilot.local import LocalDevices, compare, local_config
from lwfedssl_jax.pilot.processes import free_port
from lwfedssl_jax.pilot.server import serve
from lwfedssl_jax.pilot.superlink import FlowerLink
from lwfedssl_jax.simulation.events import Event, RoundDone, StepsDone, ignore
from lwfedssl_jax.workdir import WorkDir
from lwfedssl_jax.workdir.metrics import PILOT_LINES, read_lines, read_pilot

pytestmark = [
    pytest.mark.flower,
    pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="the extra pilot is not installed"),
]


class Pilot:
    """A server in this process, and devices in processes of their own."""

    def __init__(self, folder: Path, **changes: Any) -> None:
        self.config: Config = local_config(small_config(strategy__name="layerwise", **changes), 3)
        self.folder, self.port = folder, free_port()
        self.devices = LocalDevices(self.config, folder / "devices")
        self.link = FlowerLink(folder / "server", self.port)
        self.path = folder / "run"

    def serve(self, hear: Callable[[Event], None] = ignore, deadline: float = 300.0) -> dict[str, Any]:
        self.link.start()
        for name in self.devices.names:
            if name not in self.devices.processes:
                self.devices.start_one(name, self.port)
        return serve(
            self.config, WorkDir(self.path, self.config), self.link, 3, deadline, hear, names=self.devices.names
        )

    def kill(self, name: str, sent: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to all processes of a device."""
        pids = [self.devices.processes[name].pid]
        with contextlib.suppress(OSError, ValueError):
            pids.append(int((self.folder / "devices" / name / "supernode.pid").read_text()))
        for pid in pids:
            os.killpg(pid, sent)

    def events(self) -> list[tuple[str, str]]:
        return [(line["event"], line["name"]) for line in read_lines(self.path, PILOT_LINES) if "event" in line]

    def difference(self) -> float:
        twin = self.folder / "simulated"
        return compare(self.config, self.path, WorkDir(twin, self.config), ignore)


@pytest.fixture
def pilots(tmp_path: Path) -> Iterator[Callable[..., Pilot]]:
    made: list[Pilot] = []

    def make(**changes: Any) -> Pilot:
        made.append(Pilot(tmp_path, **changes))
        return made[-1]

    yield make
    for pilot in made:
        pilot.devices.stop()
        pilot.link.close()


def test_devices_and_flowers_server_are_killed_and_the_encoder_is_the_simulators(
    pilots: Callable[..., Pilot],
) -> None:
    """A device that is killed in a round and started again is asked again; so are all after Flower's server was."""
    pilot, done = pilots(federation__rounds=3), list[str]()

    def hear(event: Event) -> None:
        match event:
            case StepsDone(1, 0) if "device" not in done:  # as the round's messages go out
                done.append("device")
                pilot.kill("local-2")
                pilot.devices.start_one("local-2", pilot.port)
            case RoundDone(line) if line["round"] == 2 and "server" not in done:
                done.append("server")
                assert pilot.link.pid
                os.killpg(pilot.link.pid, signal.SIGKILL)

    summary = pilot.serve(hear)
    assert summary["rounds"] == 3
    events = pilot.events()
    assert sorted(events[:3]) == [("joined", f"local-{number}") for number in range(3)]
    assert ("returned", "local-2") in events
    assert done == ["device", "server"]
    lines = [json.loads(text) for text in (pilot.path / "metrics.jsonl").read_text().splitlines()]
    reported = [line["clients"] for line in lines if "event" not in line]
    assert reported == [3, 3, 3]
    measured = [line for line in read_pilot(pilot.path) if "measured" in line]
    for line in measured:
        for wire, payload in (("wire_down", "payload_down"), ("wire_up", "payload_up")):
            if found := line["measured"].get(wire):  # not of a device that started again in between
                assert line["measured"][payload] < found < 1.08 * line["measured"][payload] + 4096
    assert all(line["measured"].get("wire_up") for line in measured if line["round"] == 3)
    assert pilot.difference() == 0


def test_a_device_that_is_too_slow_is_left_out_and_takes_part_again(pilots: Callable[..., Pilot]) -> None:
    pilot, stopped = pilots(federation__rounds=3), list[float]()

    def hear(event: Event) -> None:
        match event:
            case StepsDone(2, 0) if not stopped:  # as the round's messages go out
                stopped.append(time.monotonic())
                pilot.kill("local-1", signal.SIGSTOP)
            case RoundDone(line) if line["round"] == 2:
                pilot.kill("local-1", signal.SIGCONT)
                time.sleep(15)

    pilot.serve(hear, deadline=60.0)
    lines = [json.loads(text) for text in (pilot.path / "metrics.jsonl").read_text().splitlines()]
    rounds = {line["round"]: (line["clients"], line["dropped"]) for line in lines if "event" not in line}
    assert rounds[1] == (3, 0)
    assert rounds[2] == (2, 1)
    assert rounds[3] == (3, 0)
    assert any(event in ("late", "failed", "left") and name == "local-1" for event, name in pilot.events())


def test_the_command_goes_on_after_the_server_is_killed(tmp_path: Path) -> None:
    """`pilot local --tls --compare`, killed after its first round, and once more: difference 0."""
    words = ["--federation.rounds", "2", "--model.depth", "2", "--federation.local-epochs", "1"]
    words += [
        "--evaluation.labels-per-class",
        "5",
        "--workdir",
        str(tmp_path / "run"),
        "--devices",
        "2",
        "--tls",
        "--compare",
    ]
    command = [sys.executable, "-m", "lwfedssl_jax", "pilot", "local", "quickstart", *words]
    metrics = tmp_path / "run" / "metrics.jsonl"
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        until = time.monotonic() + 200
        while time.monotonic() < until and not (metrics.exists() and '{"round": 1' in metrics.read_text()):
            time.sleep(0.5)
            assert first.poll() is None
    finally:
        os.killpg(first.pid, signal.SIGKILL)  # but not what it has started
        first.wait()
    again = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert again.returncode == 0, again.stderr[-2000:]
    assert "that of the simulator: 0" in " ".join(again.stdout.split())
    assert not list(tmp_path.rglob("*.pid"))
