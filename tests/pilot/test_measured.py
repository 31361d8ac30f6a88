"""What a pilot measures: bytes on the wire, time and memory; and what becomes of it: tables and classes of devices."""

import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import small_config
from fake import worker
from test_pilot_server import PROGRAMS, on_devices, pilot_config

from lwfedssl_jax.analysis.device_plots import plot_ratios
from lwfedssl_jax.analysis.device_tables import device_table, measured_lines, stage_table
from lwfedssl_jax.cli import main
from lwfedssl_jax.config import to_dict
from lwfedssl_jax.config.device_classes import DeviceClass, read_csv
from lwfedssl_jax.costs.fleet import affords
from lwfedssl_jax.pilot import machine, protocol
from lwfedssl_jax.pilot.calibrate import calibrate, operations_per_second, write_classes
from lwfedssl_jax.pilot.images import write_images
from lwfedssl_jax.pilot.protocol import Train
from lwfedssl_jax.pilot.relay import LARGE, TIMED, Counted, Relay
from lwfedssl_jax.pilot.update import LocalUpdate
from lwfedssl_jax.pilot.wire import Wire
from lwfedssl_jax.simulation.setup import Cache, initial_params, prepare
from lwfedssl_jax.workdir.metrics import PILOT_LINES, read_pilot


def echo(listener: socket.socket, size: int, seconds: float) -> None:
    """Answers each request, whose length comes first, with a number of bytes after some seconds."""
    connection, _ = listener.accept()
    with connection, connection.makefile("rb") as requests:
        while head := requests.read(8):
            requests.read(int(head) - 8)
            time.sleep(seconds)
            connection.sendall(b"x" * size)


@pytest.mark.parametrize(("request_size", "answer_size"), [(100, 50), (LARGE, 10), (20, LARGE), (2 * TIMED, 8)])
def test_a_relay_counts_every_byte_and_tells_content_from_polls(request_size: int, answer_size: int) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=echo, args=(listener, answer_size, 0.05), daemon=True).start()
    relay, times = Relay("127.0.0.1", listener.getsockname()[1]), 3
    with socket.create_connection(("127.0.0.1", relay.port)) as connection, connection.makefile("rb") as answers:
        for _ in range(times):
            connection.sendall(f"{request_size:8d}".encode() + b"r" * (request_size - 8))
            assert len(answers.read(answer_size)) == answer_size
    listener.close()
    relay.close()
    until = time.monotonic() + 10
    is_content = max(request_size, answer_size) >= LARGE
    content = (times * answer_size, times * request_size, 0)
    while relay.counted()[:3] != (expected := content if is_content else (0, 0, sum(content))):
        assert time.monotonic() < until, (relay.counted(), expected)
    if request_size >= TIMED:
        while not (uplink := relay.counted().uplink_mbps):
            assert time.monotonic() < until
        assert uplink < 8e-6 * request_size / 0.05  # the server needed that time at least
    assert relay.counted().downlink_mbps == 0


def line(stage: int, operations: float, seconds: float, overlap: float = 0.0, **measured: Any) -> dict[str, Any]:
    predicted = {"download": 100, "upload": 50, "operations": operations, "seconds": None, "memory": 10**6}
    found = {"payload_down": 100, "payload_up": 50, "wire_down": 120, "train_seconds": seconds, "compile_seconds": 0.0}
    found |= {"overlap_seconds": overlap, "message_seconds": 2.0, "peak_rss": 10**9, "program_bytes": 2 * 10**6}
    return {
        "round": stage,
        "stage": stage,
        "client": 0,
        "name": "a",
        "predicted": predicted,
        "measured": found | measured,
    }


def test_speed_is_measured_while_nothing_else_is_done_if_there_is_such_a_round() -> None:
    slow, fast = line(1, 4e9, 4.0, overlap=1.0), line(1, 4e9, 1.0)
    assert operations_per_second([slow, fast, slow, line(1, 4e9, 8.0, compile_seconds=1.0)]) == 4e9
    assert operations_per_second([slow, slow]) == 1e9
    assert operations_per_second([]) is None


def pilot_files(folder: Path) -> None:
    """Two devices of one kind, one of another, and what they measured."""
    pi = {"platform": "Linux aarch64", "cores": 4, "memory_bytes": 4 * 10**9, "available_bytes": 3 * 10**9}
    pi |= {"baseline_bytes": 2 * 10**8}
    pc = pi | {"platform": "Linux x86_64", "memory_bytes": 16 * 10**9}
    lines: list[dict[str, Any]] = [
        {"event": "joined", "round": 0, "name": name, "device": about}
        for name, about in (("a", pi), ("b", pc), ("c", pi))
    ]
    links = {"uplink_mbps": 10.0, "downlink_mbps": 40.0}
    lines += [line(1, 4e9, 2.0, **links), line(2, 8e9, 4.0, **links)]
    lines += [line(1, 4e9, 0.5) | {"name": "b"}, line(1, 4e9, 4.0, **links) | {"name": "c"}]
    lines += [{"round": 1, "client": 0, "name": "a", "measured": {"wire_up": 60, "polling_bytes": 7}}]
    (folder / PILOT_LINES).write_text("".join(f"{json.dumps(x)}\n" for x in lines))


def test_classes_of_devices_are_made_from_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pilot_files(tmp_path)
    found = calibrate(tmp_path)
    assert found.members == [["a", "c"], ["b"]]
    assert found.speeds["a"] == {1: 2e9, 2: 2e9}
    pi = DeviceClass("Linux aarch64, 4 cores, 4 GB", 2, 3.0, 1.5, 10.0, 40.0, None, 0.998)
    pc = DeviceClass("Linux x86_64, 4 cores, 16 GB", 1, 3.0, 8.0, None, None, None, 0.998)
    assert found.classes == [pi, pc]
    main(["pilot", "calibrate", str(tmp_path)])
    assert read_csv(tmp_path / "devices.csv") == [pi, pc]
    out = capsys.readouterr().out
    assert "baseline_gb=0.998: a, c\n" in out
    cells = [[cell.strip() for cell in row.split("│")[1:-1]] for row in out.splitlines() if row.startswith("│")]
    memory = ["200 MB", "1 GB"]
    assert cells == [["a", "2", "2", *memory], ["b", "8", "", *memory], ["c", "1", "", *memory]]


def test_what_plan_would_refuse_is_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pilot_files(tmp_path)
    file = tmp_path / PILOT_LINES
    file.write_text(file.read_text().replace('"program_bytes": 2000000', '"program_bytes": 2000000000'))
    assert main(["pilot", "calibrate", str(tmp_path)]) == 2
    assert "baseline_gb '-1'" in capsys.readouterr().err
    assert not (tmp_path / "devices.csv").exists()


def test_lines_of_a_pilot_before_operations_were_written_count_for_no_speed(tmp_path: Path) -> None:
    old, new = line(1, 4e9, 1.0), line(1, 4e9, 2.0)
    old["predicted"] = {"download": 100, "upload": 50}
    assert operations_per_second([old]) is None
    assert operations_per_second([old, new]) == 2e9
    (tmp_path / PILOT_LINES).write_text(f"{json.dumps(old)}\n")
    assert device_table({"run": tmp_path})
    assert stage_table({"run": tmp_path})


@pytest.mark.parametrize("content", [None, "", '{"round": 1, "name": "a", "measured": {}, "predicted": {}}\n'])
def test_calibrating_without_a_measurement_is_an_error_and_writes_nothing(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / PILOT_LINES).write_text(content)
    assert main(["pilot", "calibrate", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: DIR: {tmp_path} ")
    assert "accepted: the work directory of a pilot" in error
    assert not (tmp_path / "devices.csv").exists()


def test_a_step_does_not_get_the_memory_that_the_process_needs_before_any_model(tmp_path: Path) -> None:
    cost: Any = {"peak_memory_bytes": 10**9, "rounds": 1, "flops_executed": 0, "download_bytes": 0, "upload_bytes": 0}
    sizes = np.array([10.0, 20.0])
    assert affords(DeviceClass("a", 1, 1.5), cost, sizes, 0).all()
    assert affords(DeviceClass("a", 1, 1.5, baseline_gb=0.5), cost, sizes, 0).all()
    assert not affords(DeviceClass("a", 1, 1.5, baseline_gb=0.6), cost, sizes, 0).any()
    write_classes([DeviceClass("a, b", 3, 1.5, baseline_gb=2.0)], tmp_path / "devices.csv")
    assert read_csv(tmp_path / "devices.csv")[0].step_gb == -0.5


def test_tables_and_figure_compare_what_is_known_of_the_same_rounds(tmp_path: Path) -> None:
    pilot_files(tmp_path)
    rounds = [x for x in read_pilot(tmp_path) if "measured" in x]
    assert [x["measured"].get("wire_up") for x in rounds] == [60, None, None, None]
    devices, stages = device_table({"run": tmp_path}), stage_table({"run": tmp_path})
    assert devices
    assert stages
    a = devices.numbers.set_index("device").loc["a"]
    assert (a["wire_up"], a["wire_up_of_predicted"], a["polling_bytes"]) == (60, 1.2, 7)
    assert (a["wire_down"], a["wire_down_of_predicted"]) == (240, 1.2)
    assert "not known" in devices.words.set_index("device").loc["b"].iloc[3]
    first = stages.numbers.set_index("stage").loc[1]
    assert (first["wire_down_of_predicted_median"], first["program_bytes_of_predicted_max"]) == (1.2, 2.0)
    assert stages.words.iloc[1]["upload, on the wire"] == "not known"
    figure = plot_ratios(measured_lines(tmp_path))
    assert [axes.get_title() for axes in figure.axes] == ["download", "upload", "training time", "memory"]


def test_programs_of_the_next_stage_are_compiled_ahead_and_give_the_same_bits(
    tmp_path: Path, cheap_views: None
) -> None:
    config = small_config(strategy__name="progressive", partition__clients=1)
    run = prepare(config)
    images, params = run.dataset.train_images[run.clients[0]], initial_params(run)
    plain, ahead = LocalUpdate(config, images, 0, Cache()), LocalUpdate(config, images, 0, Cache())
    first, second = run.stages[:2]
    for update in (plain, ahead):
        assert update(first, params, 1).compile_seconds > 0
        assert update(first, params, 2).compile_seconds == 0
    compiled = ahead.compile(second).result()
    assert ahead(first, params, 1).overlap_seconds == 0
    began, ended = compiled.began, compiled.ended
    assert ahead._overlap(began - 1, began + 0.25 * (ended - began), first) == pytest.approx(0.25 * (ended - began))
    assert ahead._overlap(began, ended, second) == 0  # its own
    waiting, ahead._compiled[second.number] = ahead._compiled[second.number], Future()
    assert ahead._overlap(3.0, 5.0, first) == 2.0  # it is still being compiled
    ahead._compiled[second.number] = waiting
    found, expected = ahead(second, params, 3), plain(second, params, 3)
    assert found.compile_seconds > 0
    jax.tree.map(np.testing.assert_array_equal, found.trained, expected.trained)


def test_a_device_compiles_the_stage_after_the_one_that_it_was_asked_for(tmp_path: Path, cheap_views: None) -> None:
    config = pilot_config(partition__clients=1, strategy__name="progressive")
    run = prepare(config)
    device = worker(tmp_path, "d0", run.dataset.train_images[run.clients[0]], PROGRAMS)
    device.compile_ahead()  # nothing is known of the run yet
    (tmp_path / "pilot").mkdir()
    on_devices(config, tmp_path / "pilot")
    update = LocalUpdate(config, run.dataset.train_images[run.clients[0]], 0, PROGRAMS)
    device._prepared = ("", 0), update, None  # type: ignore[assignment]
    for stage, compiled in ((2, {3}), (3, {3})):  # the last one has none after it
        device._stage = stage
        device.compile_ahead()
        assert set(update._compiled) == compiled


def test_memory_of_the_machine_is_plausible() -> None:
    assert 0 < machine.peak_bytes() < machine.memory_bytes()
    assert 0 < machine.available_bytes() <= machine.memory_bytes()
    assert machine.cores() >= 1
    assert Counted() == (0, 0, 0, 0.0, 0.0)


DEVICE = """
import json, sys
from pathlib import Path
import lwfedssl_jax.cli.pilot_device as device
from lwfedssl_jax.pilot.protocol import Message
device.devices.set_up("off")
worker = device.Worker("d0", device.DeviceImages(Path("images")), device.LayerCache(Path("layers")))
train = Message("Train", json.loads(Path("train.json").read_text()), {"trainable": Path("trainable").read_bytes()})
assert [worker.handle(m).kind for m in (Message("Ask", {"version": 2}, {}), train)] == ["Hello", "Result"]
worker.compile_ahead()
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_a_device_imports_only_what_it_needs(tmp_path: Path) -> None:
    """Its requirements leave these out."""
    heavy = {"pandas", "matplotlib", "tensorflow_datasets", "sklearn", "orbax", "tensorboardX", "jinja2", "tensorstore"}
    config = pilot_config(strategy__name="layerwise")
    run = prepare(config)
    images, params = run.dataset.train_images[run.clients[0]], jax.device_get(initial_params(run))
    write_images(tmp_path / "images", images, range(len(images)))
    asked = Train("r", 1, 1, 0, json.dumps(to_dict(config)), "", 600.0, {})
    (tmp_path / "train.json").write_text(json.dumps(protocol.write(asked).fields))
    (tmp_path / "trainable").write_bytes(Wire(run).trainable(run.stages[0], params))
    found = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert not heavy & set(found.stdout.split())
