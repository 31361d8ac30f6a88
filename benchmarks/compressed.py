"""Accuracy against traffic of the three strategies, with and without compressed uploads.

    python benchmarks/compressed.py        # runs what is missing of `sweep studies/compression`, in runs/compression

The ratios of traffic are to end to end without compression. If layerwise's saving and that of a compression added up
fully, their ratios would multiply.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import pandas as pd

from lwfedssl_jax.analysis.results import load_results

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "compression"
PROTOCOLS = ("linear_probe_5", "linear_probe_all", "knn")
MIB = 2**20


def main() -> None:
    common.arguments(__doc__ or "")
    command = [sys.executable, str(ROOT / "run.py"), "sweep", "studies/compression", "--workdir", str(RUNS)]
    subprocess.run(command, check=True, cwd=ROOT)
    found = load_results(RUNS)
    groups = found[found["finished"]].groupby(["strategy.name", "federation.compression"], sort=False)
    whole = groups.get_group(("end_to_end", "none"))["traffic_bytes"].mean()
    rows = [row(strategy, compression, runs, whole) for (strategy, compression), runs in groups]
    common.publish("compressed", "Accuracy against traffic with compressed uploads", rows)


def row(strategy: str, compression: str, runs: pd.DataFrame, whole: float) -> dict[str, Any]:
    """Means and standard deviations over seeds, in percent, and the traffic of a client."""
    traffic = runs["traffic_bytes"].mean()
    shown: dict[str, Any] = {"strategy": strategy, "compression": compression, "seeds": len(runs)}
    shown |= {"traffic (MiB)": round(traffic / MIB, 3), "of end_to_end": round(traffic / whole, 3)}
    for protocol in PROTOCOLS:
        values = 100 * runs[f"accuracy.{protocol}"]
        shown[protocol] = f"{values.mean():.1f} ± {values.std():.1f}"
    return shown


if __name__ == "__main__":
    main()
