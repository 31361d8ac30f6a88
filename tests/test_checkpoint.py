"""Checkpoints and the work directory: nothing half written is used, nothing damaged is accepted."""

import errno
import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import small_config

from lwfedssl_jax import checkpoint
from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.workdir import WorkDir


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
    assert checkpoint.numbers(folder) == [6, 7, 8]


def test_a_full_disk_leaves_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir = WorkDir(tmp_path / "run", small_config())
    workdir.open(1, 1)
    workdir.save(1, state(1), ())
    no_space = "RESOURCE_EXHAUSTED: Error writing file [OS error 28: No space left on device]\nand more"

    def full(*args: Any, **kwargs: Any) -> None:
        raise ValueError(no_space)

    monkeypatch.setattr(ocp.Checkpointer, "save", full)
    with pytest.raises(OSError, match=r"--workdir: checkpoint 2 cannot be written in .*No space left.* is whole"):
        workdir.save(2, state(2), ())
    monkeypatch.undo()

    def full_write(self: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_write)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(OSError, match=r"config.json cannot be written .*No space left"):
        workdir.write_json("config.json", {})
    monkeypatch.undo()
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    workdir.close()
    found, faults = WorkDir(tmp_path / "run", small_config()).restore()
    assert found is not None
    assert (found.rounds, faults) == (1, {})


def started(path: Path, rounds: int = 2) -> None:
    """The directory of a run that was killed after some rounds."""
    workdir = WorkDir(path, small_config())
    workdir.open(1, 1)
    for number in range(1, rounds + 1):
        workdir.append({"round": number})
        workdir.save(number, state(number), ())
    workdir.append({"round": rounds + 1})
    workdir.close()


def test_metrics_survive_a_line_that_was_cut_and_go_back_to_the_checkpoint(tmp_path: Path) -> None:
    for name, cut in {"half": b'{"round": 3, "lo', "zeros": b"\0\0\0", "no end": b'{"round": 3}'}.items():
        path = tmp_path / name
        started(path)
        with (path / "metrics.jsonl").open("ab") as file:
            file.write(cut)
        workdir = WorkDir(path, small_config())
        workdir.restore()
        workdir.append({"round": 3})
        assert [json.loads(line)["round"] for line in (path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
        workdir.close()
    (path / "metrics.jsonl").write_bytes(b'{"round": 1}\n{"rou\n{"round": 2}\n')
    with pytest.raises(ConfigError, match=r"--workdir: line 2 of .*metrics.jsonl is damaged; accepted: "):
        WorkDir(path, small_config()).restore()


def test_a_run_without_a_whole_checkpoint_is_not_begun_again_by_itself(tmp_path: Path) -> None:
    started(tmp_path / "run")
    for manifest in (tmp_path / "run" / "checkpoints").rglob(checkpoint.MANIFEST):
        manifest.unlink()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=r"--workdir: no checkpoint in .* is whole \(2: .*missing; 1: .*accepted: "):
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
            WorkDir(tmp_path / "run", small_config()).restore()
        assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
        other.kill()
    workdir = WorkDir(tmp_path / "run", small_config())
    assert workdir.restore()[0]
    with Path(lock).open() as mine, pytest.raises(BlockingIOError):
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)
    workdir.close()


def test_of_two_new_runs_in_one_directory_the_second_is_refused(tmp_path: Path) -> None:
    first, second, third = (WorkDir(tmp_path / "run", small_config()) for _ in range(3))
    first.open(1, 1)
    with pytest.raises(ConfigError, match="is in use by another process"):
        second.open(1, 1)
    first.append({"round": 1})
    first.close()
    with pytest.raises(ConfigError, match="is in use by another process"):
        third.open(1, 1)


def test_a_process_killed_before_its_config_was_written_leaves_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").touch()
    (tmp_path / "run" / ".config.json.new").write_text("{")
    workdir = WorkDir(tmp_path / "run", small_config())
    workdir.open(1, 1)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lanes"] == 1
    workdir.close()
