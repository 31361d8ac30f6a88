"""Sweeps that several processes share: claims, and shards of which one is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SMALL

from lwfedssl_jax import cli
from lwfedssl_jax.sweep import claims
from lwfedssl_jax.sweep.claims import Claims
from lwfedssl_jax.sweep.directory import SweepDirectory
from lwfedssl_jax.sweep.grid import load_sweep

SWEEP = """
from lwfedssl_jax.config import Config, override
from lwfedssl_jax.sweep import Sweep

sweep = Sweep(override(Config(), BASE), seeds=(0, 1, 2, 3, 4, 5))
"""


def test_a_claim_is_one_processs_until_it_is_given_back_or_lapses(tmp_path: Path) -> None:
    with Claims(tmp_path / "claims") as mine, Claims(tmp_path / "claims") as other:
        assert mine.take("a")
        assert mine.take("a")
        assert not other.take("a")
        assert other.holder("a") == f"process {os.getpid()} on {os.uname().nodename}"
        mine.give_back("a")
        assert other.take("a")
        mine.give_back("a")  # not its own any more
        assert not mine.take("a")
        file = tmp_path / "claims" / "a"
        file.write_text("elsewhere 5 machine token")
        assert mine.holder("a") == "process 5 on elsewhere"
        assert not mine.take("a")
        os.utime(file, (time.time() - claims.LAPSE_SECONDS - 5,) * 2)
        assert mine.holder("a") is None
        assert mine.take("a")
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        (tmp_path / "claims" / "b").write_text(f"elsewhere {ended.pid} {claims.machine()} token")
        assert mine.take("b")
    assert not list((tmp_path / "claims").iterdir())


def test_claims_are_renewed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "RENEW_SECONDS", 0.01)
    with Claims(tmp_path) as mine:
        mine.take("a")
        os.utime(tmp_path / "a", (0, 0))
        for _ in range(500):
            if (tmp_path / "a").stat().st_mtime > 0:
                break
            time.sleep(0.01)
        assert (tmp_path / "a").stat().st_mtime > 0


def test_shares_are_all_runs_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(f"BASE = {SMALL!r}\n{SWEEP}", encoding="utf-8")
    sweep = load_sweep(str(tmp_path / "mine.py"))
    for count in (1, 2, 4, 6, 7):
        shares = [SweepDirectory(tmp_path / "out", sweep, (i, count)).share for i in range(1, count + 1)]
        assert [run for share in shares for run in share] == sweep.runs
    directory = SweepDirectory(tmp_path / "out", sweep)
    claim = tmp_path / "out" / ".claims" / directory.runs[2].directory.rpartition("-")[2]
    claim.parent.mkdir(parents=True)
    claim.write_text("elsewhere 5 machine token", encoding="utf-8")
    assert directory.is_waiting()
    assert directory.unclaimed() == directory.runs[:2] + directory.runs[3:]
    os.utime(claim, (time.time() - claims.LAPSE_SECONDS - 5,) * 2)
    assert not directory.is_waiting()
    assert directory.unclaimed() == directory.runs
    for shard in ("0/3", "4/3", "1", "a/b", "1/0"):
        assert cli.main(["sweep", str(tmp_path / "mine.py"), "--shard", shard]) == 2
        assert f"error: --shard: {shard!r} is not valid; accepted: I/N" in capsys.readouterr().err


def claims_in(folder: Path) -> list[Path]:
    return list((folder / "out" / ".claims").glob("[0-9a-f]*"))


def test_three_shards_of_which_one_is_killed_and_a_fourth_that_finishes(tmp_path: Path) -> None:
    small = SMALL | {"model.depth": 1, "federation.rounds": 2, "strategy.name": "end_to_end"}
    (tmp_path / "mine.py").write_text(f"BASE = {small!r}\n{SWEEP}", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start(shard: str) -> "subprocess.Popen[str]":
        command = [sys.executable, str(ROOT / "run.py"), "sweep", "mine.py", "--workdir", "out", "--shard", shard]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes)

    first, second, killed = start("1/3"), start("2/3"), start("3/3")
    assert killed.stderr is not None
    while not [
        claim for claim in claims_in(tmp_path) if claim.read_text(encoding="utf-8").split()[1:2] == [str(killed.pid)]
    ]:
        time.sleep(0.05)
        assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    for process in (first, second):
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
    sweep = load_sweep(str(tmp_path / "mine.py"))
    directory = SweepDirectory(tmp_path / "out", sweep)
    before = {run.directory: directory.is_finished(run) for run in sweep.runs}
    assert all(before[run.directory] for run in sweep.runs[:4])
    assert not all(before.values())
    times = {d: (tmp_path / "out" / d / "summary.json").stat().st_mtime_ns for d, done in before.items() if done}
    fourth = start("3/3")
    out, error = fourth.communicate(timeout=300)
    assert fourth.returncode == 0, error
    assert "out/report.html" in out
    assert all(directory.is_finished(run) for run in sweep.runs)
    assert times == {d: (tmp_path / "out" / d / "summary.json").stat().st_mtime_ns for d in times}
    for run in sweep.runs:
        lines = (tmp_path / "out" / run.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rounds = [entry["round"] for line in lines if "event" not in (entry := json.loads(line))]
        assert rounds == [1, 2]
    assert not claims_in(tmp_path)
