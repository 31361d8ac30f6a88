"""The compilation cache, and runs over several processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import load_file

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.system import devices

TINY = [
    "--model.width", "8", "--model.heads", "2", "--model.depth", "2", "--data.image-size", "8",
    "--objective.hidden-dim", "8", "--objective.output-dim", "4", "--federation.rounds", "2",
    "--federation.local-epochs", "1", "--partition.clients", "7", "--evaluation.labels-per-class", "5",
    "--runtime.feed", "streamed", "--strategy.name", "end_to_end",
]  # fmt: skip


def start(workdir: Path, cache: Path, local_devices: int, *options: str) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={local_devices} --xla_backend_optimization_level=0"
    command = [sys.executable, ROOT / "run.py", "train", "quickstart", *TINY, "--workdir", workdir, *options]
    environment = os.environ | {"XLA_FLAGS": flags}
    return subprocess.Popen(
        [*map(str, command), "--compilation-cache", str(cache)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def address() -> str:
    """A free one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def join(coordinator: str, process: int) -> list[str]:
    return ["--coordinator", coordinator, "--processes", "2", "--process", str(process)]


def test_two_processes_train_what_one_process_with_two_devices_does(tmp_path: Path) -> None:
    """Lanes over hosts, on the loopback address: the same encoder, written once, by the first process."""
    cache, where = tmp_path / "cache", address()
    both = [start(tmp_path / "two", cache, 1, *join(where, i)) for i in range(2)]
    outputs = [process.communicate(timeout=400) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    alone = start(tmp_path / "one", cache, 2)
    _, err = alone.communicate(timeout=400)
    assert alone.returncode == 0, err
    assert "trained %" in outputs[0][0]
    assert outputs[1][0] == ""  # nor anything of Gloo's
    assert "Gloo" not in outputs[0][0]
    one, two = (load_file(tmp_path / name / "encoder.safetensors") for name in ("one", "two"))
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    written = json.loads((tmp_path / "two" / "config.json").read_text())
    assert (written["lanes"], written["devices"]) == (2, 2)
    assert any(cache.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("127.0.0.1:1", None, None), "belong together"),
        ((None, 2, 0), "belong together"),
        (("nonsense", 2, 0), "--coordinator: 'nonsense' is not an address; accepted: HOST:PORT, or auto"),
        (("127.0.0.1:1", 0, 0), "--processes: 0 is out of range"),
        (("127.0.0.1:1", 2, 2), "--process: 2 of 2 processes; accepted: 0 to 1"),
    ],
)
def test_incomplete_processes_are_refused(options: tuple[str | None, int | None, int | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        devices.connect(*options)
    devices.connect(None, None, None)


def test_a_cache_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--compilation-cache: .*cannot be written; accepted: a folder, or off"):
        devices.set_up_cache(str(tmp_path / "file" / "cache"))


def test_processes_of_different_configs_are_refused(tmp_path: Path) -> None:
    where = address()
    both = [start(tmp_path / "run", tmp_path / "cache", 1, "--runtime.seed", str(i), *join(where, i)) for i in range(2)]
    errors = [process.communicate(timeout=400)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], errors
    assert all("--processes: the configs of the processes differ" in error for error in errors)
    assert not (tmp_path / "run").exists()
