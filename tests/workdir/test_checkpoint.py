"""Checkpoints and the work directory: nothing half written is used, nothing damaged is accepted."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import small_config

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.workdir import WorkDir, checkpoint


def state(rounds: int) -> dict[str, Any]:
    values = np.random.default_rng(rounds).normal(size=(3, 40)).astype(np.float32)
    return {"params": {"w": values}, "server": [values[0], np.int32(rounds)], "clients": {}, "dictionary": {}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    for rounds in range(1, 8):
        checkpoint.save(folder, rounds, state(rounds), always_kept={2, 7})
    return folder


def test_the_last_ones_and_those_always_kept_stay(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["2", "5", "6", "7"]
    found, faults = checkpoint.load(saved)
    assert found is not None
    assert (found.rounds, faults) == (7, {})
    expected = state(7)
    np.testing.assert_array_equal(found.state["params"]["w"], expected["params"]["w"])
    np.testing.assert_array_equal(found.state["server"][0], expected["server"][0])
    assert int(found.state["server"][1]) == 7
    assert found.state["clients"] == {}
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", checkpoint.MANIFEST], cwd=saved / "7", check=True)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("spoil", [flip, truncate, Path.unlink])
def test_damage_to_any_file_is_noticed_and_the_one_before_used(
    saved: Path, tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    files = [p.relative_to(saved) for p in (saved / "7").rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) > 5
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(saved, folder)
        spoil(folder / file)
        found, faults = checkpoint.load(folder)
        assert found is not None
        assert found.rounds == 6
        assert list(faults) == [7]
        missing = file.name == checkpoint.MANIFEST and not (folder / file).exists()
        assert ("missing" if missing else "not what was saved") in faults[7]
        checkpoint.save(folder, 7, state(7))  # as the run that goes on from 6 will
        assert checkpoint.load(folder)[1] == {}
        assert not list(folder.glob(".*"))


def test_what_a_killed_process_leaves_is_never_taken(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)

    def killed(self: Any, *args: Any, **kwargs: Any) -> None:
        (folder / ".8.new" / "state").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(ocp.Checkpointer, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(folder, 8, state(8))
    monkeypatch.undo()
    found, faults = checkpoint.load(folder)
    assert found is not None
    assert (found.rounds, faults) == (7, {})
    checkpoint.save(folder, 8, state(8))
    assert [p.name for p in folder.glob(".*")] == []
    assert checkpoint.saved_rounds(folder) == [6, 7, 8]


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from lwfedssl_jax.workdir import checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoint.save(Path(sys.argv[1]), 9, {"w": np.random.default_rng(0).normal(size=20_000)})
except OSError as error:
    print(error.strerror)
"""


def test_a_full_disk_leaves_what_was_saved(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    done = subprocess.run([sys.executable, "-c", FULL, str(folder)], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("File too large\n", "")
    found, faults = checkpoint.load(folder)
    assert found is not None
    assert (found.rounds, faults) == (7, {})

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.save(folder, 9, state(9))
    assert checkpoint.saved_rounds(folder) == [2, 5, 6, 7]

    workdir = WorkDir(tmp_path / "run", small_config())
    workdir.open(1, 1, {})
    no_space = OSError(errno.ENOSPC, "No space left on device")

    def full(*args: Any, **kwargs: Any) -> None:
        raise no_space

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(OSError, match=r"--workdir: checkpoint 2 cannot be written in .*No space left.* is intact"):
        workdir.save(2, state(2), ())
    before = (tmp_path / "run" / "config.json").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"config.json cannot be written .*No space left"):
        workdir.write_json("config.json", {})
    monkeypatch.undo()
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    workdir.close()


def test_saves_after_damaged_ones_stay(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved, folder)
    for rounds in (5, 6, 7):
        (folder / str(rounds) / checkpoint.MANIFEST).unlink()
    found, faults = checkpoint.load(folder)
    assert found is not None
    assert (found.rounds, list(faults)) == (2, [7, 6, 5])
    checkpoint.save(folder, 4, state(4))
    assert checkpoint.saved_rounds(folder) == [2, 4]
    found, faults = checkpoint.load(folder)
    assert found is not None
    assert (found.rounds, faults) == (4, {})


def started(path: Path, rounds: int = 2) -> None:
    """The directory of a run that was killed after some rounds."""
    workdir = WorkDir(path, small_config())
    workdir.open(1, 1, {})
    for number in range(1, rounds + 1):
        workdir.append({"round": number})
        workdir.save(number, state(number), ())
    workdir.append({"round": rounds + 1})
    workdir.close()


def test_metrics_survive_cuts_and_damage_and_go_back_to_the_checkpoint(tmp_path: Path) -> None:
    fine_tuned = b'{"round": 0, "protocol": "fine_tune"}\n'
    whole = b'{"round": 1}\n{"round": 2}\n'
    for number, (content, kept) in enumerate(
        [
            (whole + b'{"round": 3}\n{"round": 4, "lo', whole),
            (whole + b'{"round": 3}', whole),
            (whole + b"\0\0\0", whole),
            (whole + fine_tuned + b'{"round": 2, "pro', whole + fine_tuned),
            (b'{"round": 1}\n{"rou\n{"round": 2}\n', whole),
            (b'{"round": 2}\n', whole),
            (b"", whole),
        ]
    ):
        path = tmp_path / str(number)
        started(path)
        (path / "metrics.jsonl").write_bytes(content)
        workdir = WorkDir(path, small_config())
        workdir.restore()
        assert (path / "metrics.jsonl").read_bytes() == kept
        workdir.append({"round": 3})
        assert [line["round"] for line in workdir.metrics()][-1] == 3


def test_lines_of_a_round_that_was_given_up_are_in_no_checkpoint(tmp_path: Path) -> None:
    workdir = WorkDir(tmp_path / "run", small_config())
    workdir.open(1, 1, {})
    for number in (1, 2):
        workdir.append({"round": number})
    workdir.save(1, state(1), ())
    workdir.close()
    again = WorkDir(tmp_path / "run", small_config())
    again.restore()
    assert again.metrics() == [{"round": 1}]


def test_a_run_without_a_whole_checkpoint_is_not_begun_again_by_itself(tmp_path: Path) -> None:
    started(tmp_path / "run")
    for manifest in (tmp_path / "run" / "checkpoints").rglob(checkpoint.MANIFEST):
        manifest.unlink()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"--workdir: no checkpoint in .* is intact \(2: .*missing; 1: .*accepted: "):
        WorkDir(tmp_path / "run", small_config()).restore()
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_one_process_at_a_time(tmp_path: Path) -> None:
    started(tmp_path / "run")
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    lock = str(tmp_path / "run" / ".lock")
    with subprocess.Popen([sys.executable, "-c", hold, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
        with pytest.raises(ConfigError, match=r"--workdir: .*run is in use by another process; accepted: "):
            WorkDir(tmp_path / "run", small_config()).take()
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
        other.kill()
    workdir = WorkDir(tmp_path / "run", small_config())
    workdir.take()
    with Path(lock).open() as mine, pytest.raises(BlockingIOError):
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
    workdir.close()


def test_of_two_new_runs_in_one_directory_the_second_is_refused(tmp_path: Path) -> None:
    first, second, third = (WorkDir(tmp_path / "run", small_config()) for _ in range(3))
    first.open(1, 1, {})
    with pytest.raises(ConfigError, match="is in use by another process"):
        second.open(1, 1, {})
    first.append({"round": 1})
    first.close()
    with pytest.raises(ConfigError, match="is in use by another process"):
        third.open(1, 1, {})


def test_a_run_may_be_older_than_a_field_and_have_other_trackers(tmp_path: Path) -> None:
    workdir = WorkDir(tmp_path / "run", small_config())
    workdir.open(1, 1, {})
    workdir.close()
    file = tmp_path / "run" / "config.json"
    content = json.loads(file.read_text())
    del content["config"]["fleet"], content["config"]["runtime"]["feed"]
    file.write_text(json.dumps(content))
    WorkDir(tmp_path / "run", small_config(runtime__trackers=("tensorboard",)))
    with pytest.raises(ConfigError, match=r"runtime.feed is 'auto' there, 'streamed' here; accepted: the same config"):
        WorkDir(tmp_path / "run", small_config(runtime__feed="streamed"))
    with pytest.raises(ConfigError, match=r"fleet.devices is \[\] there, "):
        WorkDir(tmp_path / "run", small_config(fleet__devices=("phone count=1 memory_gb=1",)))


def test_a_process_killed_before_its_config_was_written_leaves_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".config.json.new").write_text("{")
    (tmp_path / "run" / ".lwfedssl-x").mkdir()
    workdir = WorkDir(tmp_path / "run", small_config())
    workdir.open(1, 1, {})
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lanes"] == 1
    workdir.close()
