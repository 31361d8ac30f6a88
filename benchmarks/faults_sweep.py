"""Kills shards of a sweep, and `embed`, at random moments: what they leave must equal what undisturbed ones leave.

    python benchmarks/faults_sweep.py                  # 60 kills of shards, 30 of embed

Two processes share a sweep of six small runs (`--shard 1/2`, `--shard 2/2`); again and again one of them is killed
(SIGKILL, one time in four SIGTERM) and started again, until both end by themselves. Then the encoder and the metrics of
each run are compared with those of a sweep that nobody disturbed, and no round may have been trained twice. The next
sweep begins until there have been enough kills. `embed` is killed in the same way: its file must be whole, or not be
there.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
from faults import SMALL, typed
from PIL import Image

ROOT = Path(__file__).parent.parent
SWEEP = """
from lwfedssl_jax.config import load, override
from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    override(load("quickstart"), FIELDS),
    runs=[{"strategy.name": "layerwise"}, {"strategy.name": "layerwise", "strategy.pacing": "adaptive"},
          {"strategy.name": "progressive"}],
    seeds=(0, 1),
)
"""


def start(folder: Path, *words: str) -> "subprocess.Popen[bytes]":
    """A process of the program, with its output in ``folder/log``."""
    with (folder / "log").open("ab") as log:
        command = [sys.executable, str(ROOT / "run.py"), *words, "--compilation-cache", str(folder / "cache")]
        return subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=log, stderr=log
        )


def shard(folder: Path, number: int, name: str) -> "subprocess.Popen[bytes]":
    return start(folder, "sweep", "mine.py", "--workdir", name, "--shard", f"{number}/2")


def outcome(path: Path) -> dict[str, Any]:
    """Encoder and metrics of each run of a sweep, by its directory; a round that is there twice is an error."""
    found = {}
    for run in sorted((path / "runs").iterdir()):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        rounds = [line["round"] for line in lines if "event" not in line]
        assert rounds == list(range(1, len(rounds) + 1)), f"{run}: {rounds}"
        kept = [{key: value for key, value in line.items() if key != "seconds"} for line in lines]
        found[run.name] = (run / "encoder.safetensors").read_bytes(), kept
    return found


def kill_shards(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill a shard, ``kills`` times in all."""
    began = time.monotonic()
    for number in (1, 2):
        assert shard(folder, number, "whole").wait() == 0, (folder / "log").read_text(encoding="utf-8")
    seconds, expected = time.monotonic() - began, outcome(folder / "whole")
    killed = sweeps = differ = 0
    while killed < kills:
        name = f"sweep{sweeps}"
        processes = {number: shard(folder, number, name) for number in (1, 2)}
        while processes:
            time.sleep(rng.uniform(0.2, seconds / 4))
            for number in [n for n, process in processes.items() if process.poll() is not None]:
                assert processes.pop(number).returncode == 0, (folder / "log").read_text(encoding="utf-8")
            if processes and killed < kills:
                number = rng.choice(list(processes))
                processes[number].send_signal(signal.SIGTERM if rng.random() < 0.25 else signal.SIGKILL)
                processes[number].wait()
                killed += 1
                processes[number] = shard(folder, number, name)
        sweeps += 1
        differ += outcome(folder / name) != expected
    return {"what": "sweep in two shards", "kills": killed, "repeated": sweeps, "that differ": differ}


def kill_embed(folder: Path, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill ``embed``, ``kills`` times; its file must be whole or missing."""
    (folder / "pictures").mkdir()
    for i in range(3000):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (20, 20, 3), np.uint8)).save(
            folder / f"pictures/{i}.png"
        )
    run = next((folder / "whole" / "runs").iterdir())
    words = ["embed", str(run), "pictures", "--out"]
    began = time.monotonic()
    assert start(folder, *words, "whole.npz").wait() == 0
    seconds, differ, written = time.monotonic() - began, 0, 0
    expected = (folder / "whole.npz").read_bytes()
    for _ in range(kills):
        file = folder / "f.npz"
        file.unlink(missing_ok=True)
        process = start(folder, *words, "f.npz")
        time.sleep(rng.uniform(0.8, 1.05) * seconds)
        process.kill()
        process.wait()
        written += file.exists()
        differ += file.exists() and file.read_bytes() != expected
    return {"what": "embed", "kills": kills, "repeated": written, "that differ": differ}


def main() -> None:
    options = common.arguments(
        __doc__ or "",
        kills={"type": int, "default": 60},
        embeds={"type": int, "default": 30},
        seed={"type": int, "default": 0},
    )
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        fields = typed(SMALL | {"federation.rounds": "12"})
        (folder / "mine.py").write_text(SWEEP.replace("FIELDS", repr(fields)), encoding="utf-8")
        rows = [kill_shards(folder, options.kills, rng)]
        print(rows[-1], flush=True)
        rows.append(kill_embed(folder, options.embeds, rng))
    common.publish("faults_sweep", "Killed shards and embeds", rows, seed=options.seed)
    if any(row["that differ"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
