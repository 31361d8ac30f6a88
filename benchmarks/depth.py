"""Where does depth pay? Encoders of 1, 2 and 4 layers trained end to end, and layer by layer, for as many rounds.

Sizes and data are those of pacing.py, with other objectives. Where one layer is as good as four, a data
set cannot tell the strategies apart.

    python benchmarks/depth.py                              # more than an hour on 2 cores
    python benchmarks/depth.py --only "pictures, patch 8"   # the others are taken from the results that are there
"""

import json
import statistics
import tempfile
from typing import Any

import common
from pacing import make_config, run

from lwfedssl_jax.config import Config
from lwfedssl_jax.costs.traffic import client_bytes
from lwfedssl_jax.simulation.setup import Cache
from lwfedssl_jax.system import devices

MAE = {"objective.name": "mae", "data.views": "natural"}
# By name: the data of pacing.py, and what differs from its sizes.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": ("digits", {}),
    "pictures, patch 8": ("pictures", {}),
    "pictures, patch 8, mae": ("pictures", MAE),
}
ENCODERS: dict[str, dict[str, Any]] = {
    "end_to_end, 1 layer": {"strategy.name": "end_to_end", "model.depth": 1},
    "end_to_end, 2 layers": {"strategy.name": "end_to_end", "model.depth": 2},
    "end_to_end, 4 layers": {"strategy.name": "end_to_end"},
    "layerwise, 4 layers, even stages": {"strategy.name": "layerwise", "strategy.first_stage_share": 0.0},
}


def main() -> None:
    options = common.arguments(
        __doc__ or "",
        only={"nargs": "+", "choices": list(SETTINGS), "default": list(SETTINGS)},
        seeds={"type": int, "default": 3},
    )
    devices.set_up_cpu()
    devices.set_up_cache(None)
    file = common.RESULTS / "depth.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [row for row in rows if row["setting"] not in options.only]
    with tempfile.TemporaryDirectory() as folder:
        for setting in options.only:
            rows += measure(setting, options.seeds, folder)
            rows.sort(key=lambda row: list(SETTINGS).index(row["setting"]))
            common.publish("depth", "means of the seeds, %", rows)


def measure(setting: str, seeds: int, folder: str) -> list[dict[str, Any]]:
    """One row per encoder, with its accuracies and what one layer less than four is worth."""
    data, changes = SETTINGS[setting]
    rows, cache = [], Cache()
    for encoder, of_encoder in ENCODERS.items():
        configs = [make_config(data, folder, changes | of_encoder | {"runtime.seed": seed}) for seed in range(seeds)]
        outcomes = [run(config, folder, cache) for config in configs]
        scores = {name: [o.accuracies[name] for o in outcomes] for name in outcomes[0].accuracies}
        about = {"setting": setting, "encoder": encoder, "seeds": seeds, "MiB": mebibytes(configs[0])}
        rows.append(about | percent(scores))
        print(rows[-1], flush=True)
    return rows


def percent(scores: dict[str, list[float]]) -> dict[str, float]:
    """Means and standard deviations in %."""
    means = {name: 100 * statistics.mean(values) for name, values in scores.items()}
    spread = {f"{name}, sd": 100 * statistics.stdev(v) for name, v in scores.items() if len(v) > 1}
    return means | spread


def mebibytes(config: Config) -> float:
    """Traffic of one client over the run."""
    return client_bytes(config) / 2**20


if __name__ == "__main__":
    main()
