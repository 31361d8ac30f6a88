"""What a pilot keeps on its machines: keys, locks, and what it makes of records that are not its own."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.pilot import device, keys
from lwfedssl_jax.pilot.flower import LARGEST, from_records
from lwfedssl_jax.pilot.processes import Process, environment, free_port
from lwfedssl_jax.pilot.protocol import Message
from lwfedssl_jax.pilot.relay import Relay
from lwfedssl_jax.pilot.superlink import FlowerLink
from lwfedssl_jax.system.files import DirectoryLock


class Sized(bytes):
    def __len__(self) -> int:
        return LARGEST + 1


def records(about: Any, **arrays: bytes) -> dict[str, Any]:
    return {"about": about, "arrays": {name: SimpleNamespace(data=content) for name, content in arrays.items()}}


def test_records_that_are_no_message_are_refused() -> None:
    assert from_records(records({"kind": "Ask", "version": 2}, x=b"1")) == Message("Ask", {"version": 2}, {"x": b"1"})
    for wrong in (
        {},
        {"about": {"kind": "Ask"}},
        records({"version": 2}),
        records({"kind": 3}),
        records({"kind": "Ask", "x": b"bytes"}),
        records({"kind": "Ask", "x": [1]}),
        records(None),
        {"about": {"kind": "Ask"}, "arrays": {"x": None}},
    ):
        with pytest.raises(ValueError, match="no message"):
            from_records(wrong)
    with pytest.raises(ValueError, match="bytes"):
        from_records(records({"kind": "Result"}, update=Sized()))


def test_a_folder_is_for_one_process_and_is_not_touched_by_another(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path / ".lock")
    lock.acquire()
    link = FlowerLink(tmp_path, free_port())
    with pytest.raises(ConfigError, match=f"{tmp_path} is in use by another process"):
        link.start()
    link.close()
    relay = Relay("127.0.0.1", free_port())
    with pytest.raises(ConfigError, match=f"--folder: {tmp_path} is in use"):
        device.run_device(None, relay, tmp_path, print, [])  # type: ignore[arg-type]
    relay.close()
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_keys_that_are_there_stay_and_what_is_missing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x509 = pytest.importorskip("cryptography.x509")
    monkeypatch.setattr(keys, "check_flower", lambda: None)
    made = {path.relative_to(tmp_path).as_posix() for path in keys.make_keys(tmp_path, ["a"], ["pilot.example.org"])}
    assert made == {"ca.crt", "ca.key", "server.crt", "server.key", "devices/a", "devices/a.pub"}
    assert (tmp_path / "devices" / "a").stat().st_mode & 0o777 == 0o600
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    (tmp_path / "devices" / "a.pub").unlink()  # as after a kill between the two
    assert keys.make_keys(tmp_path, ["a"], []) == [tmp_path / "devices" / "a.pub"]
    assert {path: path.read_bytes() for path in before} == before
    (tmp_path / "devices" / "a").unlink()  # it is on the device alone
    assert keys.make_keys(tmp_path, ["a"], []) == []
    with pytest.raises(ConfigError, match=r"--hosts: .*server\.crt exists and keeps its names"):
        keys.make_keys(tmp_path, [], ["other.example.org"])
    (tmp_path / "server.crt").unlink()
    keys.make_keys(tmp_path, [], ["other.example.org"])
    assert (tmp_path / "ca.crt").read_bytes() == before[tmp_path / "ca.crt"]
    authority, server = (
        x509.load_pem_x509_certificate((tmp_path / name).read_bytes()) for name in ("ca.crt", "server.crt")
    )
    server.verify_directly_issued_by(authority)
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value.get_values_for_type(
        x509.DNSName
    )
    assert names == ["localhost", "other.example.org"]
    (tmp_path / "server.key").unlink()
    (tmp_path / "ca.key").unlink()
    with pytest.raises(ConfigError, match=r"ca\.key is missing"):
        keys.make_keys(tmp_path, [], [])
    with pytest.raises(ConfigError, match="--hosts: 'exämple' is not a name"):
        keys.make_keys(tmp_path / "others", [], ["exämple"])


def test_flowers_processes_reach_this_machine_without_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org")
    assert environment(tmp_path)["NO_PROXY"] == environment(tmp_path)["no_proxy"] == "example.org,127.0.0.1,localhost"


CLEANING = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.default_int_handler)  # each one interrupts
folder = pathlib.Path(sys.argv[1])
try:
    (folder / "started").touch()
    time.sleep(60)
finally:
    time.sleep(1.0)
    (folder / "ended").touch()
"""


def test_a_process_that_was_asked_to_stop_is_not_interrupted_while_it_does(tmp_path: Path) -> None:
    process = Process(["python", "-c", CLEANING, str(tmp_path)], tmp_path / "log", tmp_path)
    until = time.monotonic() + 30
    while not (tmp_path / "started").exists():
        assert time.monotonic() < until
        time.sleep(0.05)
    process.ask_to_stop()
    time.sleep(0.3)
    process.stop()
    assert (tmp_path / "ended").exists()
    assert not process.is_running
    assert not (tmp_path / "log.pid").exists()
