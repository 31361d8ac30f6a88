"""Trains the studies of docs/results.md, resumably, and writes that page and its figures.

    python benchmarks/studies.py run [STUDY ...]     # three hours on 2 cores in all; recorded runs are not repeated
    python benchmarks/studies.py report              # docs/results.md from what is recorded

Each study is the sweep configs/sweeps/studies/STUDY.py in runs/studies/STUDY; what its finished runs measured becomes
lines of docs/results/runs.jsonl. Delete that file and runs/studies to measure everything again. Fashion-MNIST must be
there (docs/guides/data.md), and scikit-image for the patches of its pictures.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pacing

from lwfedssl_jax.config import digest
from lwfedssl_jax.sweep.grid import load_sweep
from lwfedssl_jax.system.files import write_whole

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "studies"
PAGE, PICTURES = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
RECORDS = PICTURES / "runs.jsonl"
STUDIES = ("digits", "fashion_mnist", "pictures", "participation", "variations")
KEPT = ("round", "stage", "loss", "clients", "dropped", "download_bytes", "upload_bytes", "layers_skipped", "event",
        "protocol", "accuracy")  # fmt: skip


def run(names: list[str], jobs: int) -> None:
    """Run the sweeps, and record their runs that are finished, also if one is interrupted."""
    RUNS.mkdir(parents=True, exist_ok=True)
    if "pictures" in names and not (file := RUNS / "pictures.npz").exists():
        pacing.write_patches(file)
    for name in names:
        command = [sys.executable, "run.py", "sweep", f"studies/{name}", "--workdir", str(RUNS / name)]
        try:
            subprocess.run([*command, "--jobs", str(jobs)], cwd=ROOT, check=True)
        finally:
            record(name)


def record(name: str) -> None:
    """Write a line for each finished run of a study."""
    lines = recorded()
    for run in load_sweep(f"studies/{name}").runs:
        path = RUNS / name / run.directory
        if not (path / "summary.json").is_file():
            continue
        metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        lines[digest(run.config)] = {
            "study": name,
            "config": digest(run.config),
            "overrides": run.overrides,
            "seed": run.seed,
            "versions": json.loads((path / "config.json").read_text())["versions"],
            "summary": json.loads((path / "summary.json").read_text()),
            "metrics": [{key: line[key] for key in KEPT if key in line} for line in metrics],
        }
    write_whole(RECORDS, "".join(json.dumps(line) + "\n" for line in lines.values()).encode())


def recorded() -> dict[str, dict[str, Any]]:
    """The recorded runs by the digest of their configs."""
    lines = RECORDS.read_text().splitlines() if RECORDS.is_file() else []
    return {line["config"]: line for line in map(json.loads, lines)}
