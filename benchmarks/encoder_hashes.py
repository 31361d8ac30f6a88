"""Hashes of what four small runs give, to show that a change of the code changes no number.

    python benchmarks/encoder_hashes.py              # of this checkout
    python benchmarks/encoder_hashes.py ../before    # of another one, on the same machine

For each run: SHA-256 over the encoder's tensors (names sorted; the file's metadata holds paths and versions), and over
the lines of ``metrics.jsonl`` without their times. Other processors give other hashes.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import load_file

SMALL = ["--federation.rounds", "6", "--model.depth", "3", "--partition.clients", "5"]
RUNS = {
    "quickstart": ["quickstart"],
    "progressive mocov3": ["digits/progressive_mocov3", *SMALL],
    "resnet18": ["quickstart", *SMALL, "--model.name", "resnet18", "--model.width", "8"],
    "fedema": ["digits/end_to_end_byol", *SMALL, "--federation.client-start", "fedema"],
}
TIMES = ("seconds", "lane_utilisation")


def encoder_hash(path: Path) -> str:
    """Over names, types, shapes and bytes of the tensors, names sorted."""
    total = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        total.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        total.update(tensor.tobytes())
    return total.hexdigest()


def metrics_hash(path: Path) -> str:
    """Over the lines, without what depends on time and lanes."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--only", choices=RUNS, help="one of the runs")
    options = parser.parse_args()
    print(f"{'run':20} {'encoder':16} {'metrics':16} seconds")
    for name, words in RUNS.items():
        if options.only not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as workdir:
            began = time.monotonic()
            command = [sys.executable, "run.py", "train", *words, "--workdir", workdir]
            done = subprocess.run(command, cwd=options.checkout, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            encoder, metrics = (
                encoder_hash(Path(workdir) / "encoder.safetensors"),
                metrics_hash(Path(workdir) / "metrics.jsonl"),
            )
        print(f"{name:20} {encoder[:16]} {metrics[:16]} {time.monotonic() - began:.0f}", flush=True)


if __name__ == "__main__":
    main()
