"""How far rounding carries: accuracy of several seeds, and of several numbers of lanes with one seed.

    python benchmarks/layouts.py                                 # of the quick start
    python benchmarks/layouts.py --config digits/end_to_end_simclr

Each run is the whole command that a user would give. Runs with different numbers of lanes differ in rounding only. The
numbers of lanes are 1 and multiples of the CPU devices, to which a run rounds them up.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common

ROOT = Path(__file__).parent.parent


def main() -> None:
    options = common.arguments(
        __doc__ or "",
        config={"default": "quickstart"},
        runs={"type": int, "default": 5, "help": "seeds, and numbers of lanes"},
    )
    multiples = [n * options.cores for n in range(1, options.runs + 1)]
    numbers = multiples if options.cores == 1 else [1, *multiples[:-1]]
    usual = numbers[1]
    sides = {
        f"{options.runs} seeds, {usual} lanes": [(seed, usual) for seed in range(options.runs)],
        f"seed 0, {', '.join(map(str, numbers))} lanes": [(0, lanes) for lanes in numbers],
    }
    found: dict[tuple[int, int], dict[str, float]] = {}
    for seed, lanes in dict.fromkeys(run for runs in sides.values() for run in runs):
        found[seed, lanes] = accuracies(options.config, seed, lanes)
        print(f"seed {seed}, {lanes} lanes: {found[seed, lanes]}", flush=True)
    rows: list[dict[str, Any]] = []
    for protocol in found[0, usual]:
        for side, runs in sides.items():
            values = [100 * found[run][protocol] for run in runs]
            rows.append(
                {
                    "protocol": protocol,
                    "runs": side,
                    "mean %": statistics.mean(values),
                    "standard deviation": statistics.stdev(values),
                    "lowest %": min(values),
                    "highest %": max(values),
                }
            )
    details = {f"seed {seed}, {lanes} lanes": values for (seed, lanes), values in found.items()}
    common.publish(
        f"layouts_{options.config.replace('/', '_')}", f"Seeds and layouts of {options.config}", rows, runs=details
    )


def accuracies(config: str, seed: int, lanes: int) -> dict[str, float]:
    """Accuracy by protocol of a run."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--runtime.seed", str(seed), "--runtime.lanes", str(lanes), "--workdir", folder]
        command = [sys.executable, str(ROOT / "run.py"), "train", config, *options]
        subprocess.run(command, check=True, capture_output=True)
        used = json.loads((Path(folder) / "config.json").read_text())["lanes"]
        if used != lanes:
            raise SystemExit(f"asked for {lanes} lanes, the run has used {used}")
        results = json.loads((Path(folder) / "summary.json").read_text())["evaluation"]
    return {protocol: result["accuracy"] for protocol, result in results.items()}


if __name__ == "__main__":
    main()
