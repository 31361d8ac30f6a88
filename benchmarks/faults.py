"""Kills runs at random moments and damages checkpoints: resumed runs must equal uninterrupted ones to the bit.

    python benchmarks/faults.py                  # 200 kills, 200 damaged checkpoints
    python benchmarks/faults.py --kills 20 --damages 20 --seed 1

A small run of each strategy is killed (SIGKILL, one time in four SIGTERM) at a random moment of its life, started
again, and killed again until it ends by itself; then its encoder, metrics, ledger and last checkpoint are compared
with those of a run that nobody disturbed. The next run begins until there have been enough kills.
"""

import ast
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import jax
import numpy as np

from lwfedssl_jax import cli
from lwfedssl_jax.config import load, override, resolve
from lwfedssl_jax.experiment import train
from lwfedssl_jax.workdir import WorkDir, checkpoint

SMALL: dict[str, str] = {
    "data.name": "synthetic",
    "data.image_size": "8",
    "data.synthetic_examples": "120",
    "data.synthetic_classes": "3",
    "partition.clients": "6",
    "federation.clients_per_round": "4",
    "federation.rounds": "30",
    "federation.local_epochs": "2",
    "model.name": "vit_micro",
    "model.patch_size": "4",
    "model.width": "8",
    "model.depth": "3",
    "model.heads": "2",
    "objective.hidden_dim": "12",
    "objective.output_dim": "6",
    "optimizer.batch_size": "8",
    "evaluation.labels_per_class": "5",
    "evaluation.neighbours": "5",
}
SETTINGS: dict[str, dict[str, str]] = {
    "layerwise": {},
    "layerwise, adaptive": {"strategy.pacing": "adaptive"},
    "progressive, fedavgm": {"strategy.name": "progressive", "federation.aggregator": "fedavgm"},
    "end_to_end, byol, fedema": {
        "strategy.name": "end_to_end",
        "objective.name": "byol",
        "federation.client_start": "fedema",
    },
}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["__main__", "lwfedssl_jax.experiment.progress", "orbax.checkpoint", "sklearn.linear_model"]
)


def main() -> None:
    options = common.arguments(
        __doc__ or "",
        kills={"type": int, "default": 200},
        damages={"type": int, "default": 200},
        seed={"type": int, "default": 0},
    )
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:

        def table_row(number: int, name: str) -> dict[str, Any]:
            share = lambda total: total // len(SETTINGS) + (number < total % len(SETTINGS))  # noqa: E731
            root, fields, rng = Path(folder) / str(number), SMALL | SETTINGS[name], random.Random(options.seed + number)
            row = {"run": name} | kill(root, fields, share(options.kills), rng)
            row |= damage(root, fields, share(options.damages), rng)
            print(row, flush=True)
            return row

        rows = list(pool.map(table_row, range(len(SETTINGS)), SETTINGS))
    common.publish("faults", "Killed runs and damaged checkpoints", rows, seed=options.seed)
    if any(row["runs that differ"] or row["damages accepted"] for row in rows):
        sys.exit(1)


def kill(root: Path, fields: dict[str, str], kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill runs so many times in all; ``root/whole`` is the one that nobody disturbs."""
    root.mkdir()
    command = ["train", "quickstart", *(x for k, v in fields.items() for x in (f"--{k}", v))]
    command += ["--compilation-cache", str(root / "cache")]
    config = resolve(override(load("quickstart"), typed(fields)))
    start(command, root / "warm")  # fills the cache
    began = time.monotonic()
    start(command, root / "whole")
    seconds = time.monotonic() - began
    expected = outcome(root / "whole")
    killed = runs = differ = at_work = 0
    while killed < kills:
        path = root / f"run{runs}"
        while not (path / "summary.json").exists():
            number = signal.SIGTERM if rng.random() < 0.25 else signal.SIGKILL
            after = rng.uniform(0, seconds) if killed < kills else None
            log = Path(f"{path}.log")
            before = log.stat().st_size if log.exists() else 0
            last = (checkpoint.saved_rounds(path / "checkpoints") or [0])[-1]
            code, finished = start(command, path, after, number)
            if code == 0 and finished:
                break
            # SIGTERM ends a process that has only just begun, and has said nothing yet, as it ends any.
            begun = log.stat().st_size > before
            allowed = [-number] * (number == signal.SIGKILL or not begun) + [130] * (number == signal.SIGTERM)
            assert code in allowed, f"exit code {code}: {log.read_text(encoding='utf-8')}"
            killed += 1
            at_work += any(line["round"] > last for line in WorkDir(path, config).metrics())
            assert not checkpoint.load(path / "checkpoints")[1], "a kill has damaged a checkpoint"
        runs += 1
        differ += not same(outcome(path), expected)
    return {"seconds of a run": seconds, "kills": killed, "of them after a round": at_work, "runs": runs,
            "runs that differ": differ}  # fmt: skip


def start(command: list[str], path: Path, after: float | None = None, number: int = signal.SIGKILL) -> tuple[int, bool]:
    """``run.py`` in a process of its own, sent a signal after so many seconds.

    Forked from a server that has imported all: what is killed is the run, not Python's start.

    Returns:
      Its exit code, negative for a signal, and whether the run was finished, or would be, without the signal.
    """
    child = SERVER.Process(target=run, args=(command, path))
    child.start()
    child.join(after)
    finished = not child.is_alive() or (path / "summary.json").exists()
    if child.is_alive():
        os.kill(child.pid, number)
        child.join()
    assert child.exitcode is not None
    return child.exitcode, finished


def run(command: list[str], path: Path) -> None:
    """``run.py``, which saves every round; in a process of its own."""
    with Path(f"{path}.log").open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    train.SECONDS_BETWEEN_CHECKPOINTS = 0
    sys.exit(cli.main([*command, "--workdir", str(path)]))


def outcome(path: Path) -> tuple[Any, ...]:
    """All that a run leaves but for seconds: encoder, metrics, summary, last checkpoint."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((path / "summary.json").read_text())
    del summary["seconds"], summary["resources"]["measured"]["seconds"]
    last, faults = checkpoint.load(path / "checkpoints")
    assert last
    assert not faults
    return (
        (path / "encoder.safetensors").read_bytes(),
        [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        summary,
        last.rounds,
        last.state,
    )


def same(a: Any, b: Any) -> bool:
    """Whether two outcomes are, to the bit."""
    leaves = [jax.tree.flatten(x) for x in (a, b)]
    return leaves[0][1] == leaves[1][1] and all(map(np.array_equal, leaves[0][0], leaves[1][0]))


def damage(root: Path, fields: dict[str, str], damages: int, rng: random.Random) -> dict[str, Any]:
    """Damage the last checkpoints of copies of a run: each must be noticed, and the newest whole one taken."""
    whole = root / "whole"
    expected = outcome(whole)
    config = resolve(override(load("quickstart"), typed(fields)))
    accepted = resumed = 0
    numbers = checkpoint.saved_rounds(whole / "checkpoints")
    for i in range(damages):
        path = root / "damaged"
        shutil.copytree(whole, path)
        (path / "summary.json").unlink()
        spoilt = numbers[-rng.randrange(1, len(numbers)) :]
        for number in spoilt:
            how = ("flip a byte", "truncate", "remove a file", "remove the manifest")[i % 4]
            spoil(path / "checkpoints" / str(number), how, rng)
        found, faults = WorkDir(path, config).restore()
        accepted += found is None or found.rounds != numbers[-len(spoilt) - 1] or sorted(faults) != spoilt
        if i % 20 == 0:  # and goes on from there
            command = ["train", "quickstart", *(x for k, v in fields.items() for x in (f"--{k}", v))]
            assert start([*command, "--compilation-cache", str(root / "cache")], path)[0] == 0
            assert "is damaged" in Path(f"{path}.log").read_text(encoding="utf-8")
            assert same(outcome(path), expected)
            resumed += 1
        shutil.rmtree(path)
    return {"damages": damages, "damages accepted": accepted, "resumed after damage, equal": resumed}


def spoil(path: Path, how: str, rng: random.Random) -> None:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    if how == "remove the manifest":
        (path / checkpoint.MANIFEST).unlink()
        return
    file = rng.choice([p for p in files if p.stat().st_size])
    content = bytearray(file.read_bytes())
    if how == "remove a file":
        file.unlink()
    elif how == "truncate":
        file.write_bytes(content[: rng.randrange(len(content))])
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)


def typed(fields: dict[str, str]) -> dict[str, Any]:
    def value(text: str) -> Any:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return text

    return {k: value(v) if k != "evaluation.labels_per_class" else (int(v),) for k, v in fields.items()}


if __name__ == "__main__":
    main()
