"""How long the first stage should last: four fixed schedules against ``strategy.pacing adaptive``, on three data sets.

    python benchmarks/pacing.py                      # about half an hour on 2 cores
    python benchmarks/pacing.py --only digits

layerwise with SimCLR, a ViT of width 64 and depth 4, at equal rounds: digits; Fashion-MNIST (Debian's package
dataset-fashion-mnist), 10 clients with 500 images each; and patches of scikit-image's pictures, which it needs, 10
clients, the picture as the class, training and test patches from different parts of each.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
from scipy.stats import spearmanr

from lwfedssl_jax.config import Config, load, override, resolve
from lwfedssl_jax.experiment.train import train
from lwfedssl_jax.simulation.setup import Cache
from lwfedssl_jax.system import devices
from lwfedssl_jax.workdir import WorkDir

SCHEDULES: dict[str, dict[str, Any]] = {
    "even": {"strategy.first_stage_share": 0.0},
    "first stage 40 %": {"strategy.first_stage_share": 0.4},
    "first stage 62 %": {"strategy.first_stage_share": 0.62},
    "first stage 80 %": {"strategy.first_stage_share": 0.8},
    "adaptive": {"strategy.first_stage_share": 0.0, "strategy.pacing": "adaptive"},
}
COMMON: dict[str, Any] = {"model.depth": 4, "evaluation.labels_per_class": (5, 20)}
SIZES: dict[str, dict[str, Any]] = {
    "digits": {"federation.rounds": 16},
    "fashion_mnist": {
        "data.name": "fashion_mnist", "data.image_size": 28, "model.patch_size": 7, "partition.kind": "shared",
        "partition.examples_per_client": 500, "federation.rounds": 24, "federation.local_epochs": 1,
        "optimizer.batch_size": 128, "optimizer.learning_rate": 0.008, "evaluation.neighbours": 0,
    },
    "pictures": {
        "data.image_size": 32, "data.views": "natural", "model.patch_size": 8, "partition.kind": "iid",
        "federation.rounds": 24, "federation.local_epochs": 2,
    },
}  # fmt: skip
PICTURES = (
    "astronaut", "brick", "camera", "cell", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field",
    "immunohistochemistry", "moon", "page", "retina", "rocket", "text",
)  # fmt: skip


class Outcome(NamedTuple):
    """Accuracy by protocol, rounds of each stage, the loss of each round, and label-free metrics."""

    accuracies: dict[str, float]
    lengths: tuple[int, ...]
    losses: list[float]
    label_free: dict[str, float]


def main() -> None:
    options = common.arguments(
        __doc__ or "",
        only={"nargs": "+", "choices": list(SIZES), "default": list(SIZES)},
        seeds={"type": int, "default": 3},
        schedules={
            "nargs": "+",
            "choices": list(SCHEDULES),
            "default": list(SCHEDULES),
            "help": "those to train; the others are taken from the results that are there",
        },
    )
    devices.set_up_cpu()
    devices.set_up_cache(None)
    with tempfile.TemporaryDirectory() as folder:
        for data in options.only:
            compare(data, folder, options.seeds, options.schedules)


def compare(data: str, folder: str, seeds: int, schedules: list[str]) -> None:
    """Train the runs of some schedules on a data set, and publish all."""
    file = common.RESULTS / f"pacing_{data}.json"
    known = json.loads(file.read_text())["runs"] if len(schedules) < len(SCHEDULES) else {}
    rows, outcomes, cache = list[dict[str, Any]](), dict[str, list[Outcome]](), Cache()
    for schedule, changes in SCHEDULES.items():
        configs = [make_config(data, folder, changes | {"runtime.seed": seed}) for seed in range(seeds)]
        runs = (
            [run(config, folder, cache) for config in configs]
            if schedule in schedules
            else ([Outcome(**o | {"lengths": tuple(o["lengths"])}) for o in known[schedule]])
        )
        outcomes[schedule] = runs
        lengths = " | ".join(" ".join(map(str, lengths)) for lengths in dict.fromkeys(o.lengths for o in runs))
        means = {p: 100 * statistics.mean(o.accuracies[p] for o in runs) for p in runs[0].accuracies}
        rows.append({"schedule": schedule, "rounds per stage": lengths} | means)
        print(rows[-1], runs[0].losses, flush=True)
    for protocol in means:
        best = max(row[protocol] for row in rows if row["schedule"] != "adaptive")
        for row in rows:
            row[f"{protocol} - best fixed"] = row[protocol] - best
    all_runs = [outcome for runs in outcomes.values() for outcome in runs]
    details = {schedule: [outcome._asdict() for outcome in runs] for schedule, runs in outcomes.items()}
    common.publish(f"pacing_{data}", f"{data}: means of {seeds} seeds, %", rows, ranked=rank(all_runs), runs=details)


def rank(runs: list[Outcome]) -> list[dict[str, Any]]:
    """How well each label-free metric, and the last loss, ranks the runs by a protocol: Spearman's rho."""
    signals = {name: [o.label_free[name] for o in runs] for name in runs[0].label_free}
    signals["last loss"] = [o.losses[-1] for o in runs]
    return [
        {"protocol": protocol, "runs": len(runs)}
        | {
            name: float(spearmanr(values, [o.accuracies[protocol] for o in runs]).statistic)
            for name, values in signals.items()
        }
        for protocol in runs[0].accuracies
    ]


def make_config(data: str, folder: str, changes: dict[str, Any]) -> Config:
    """The config of a run."""
    if data == "pictures":
        file = Path(folder) / "pictures.npz"
        if not file.exists():
            write_patches(file)
        changes = changes | {"data.name": f"npz:{file}"}
    return resolve(override(load("quickstart"), COMMON | SIZES[data] | changes))


def run(config: Config, folder: str, cache: Cache) -> Outcome:
    """Train a run."""
    with tempfile.TemporaryDirectory(dir=folder) as path:
        workdir = WorkDir(Path(path) / "run", config)
        summary = train(config, workdir, cache=cache)
        losses = [round(line["loss"], 4) for line in workdir.metrics() if "event" not in line]
    accuracies = {protocol: result["accuracy"] for protocol, result in summary["evaluation"].items()}
    lengths = tuple(summary["resources"]["measured"]["rounds_per_stage"])
    return Outcome(accuracies, lengths, losses, summary["label_free"]["trained"])


def write_patches(file: Path, size: int = 32, train_per_class: int = 150, test_per_class: int = 60) -> None:
    """Cut patches at random places: for training from the left two thirds of a picture, for testing from the rest."""
    from skimage import data

    rng, parts = np.random.default_rng(0), {"train": train_per_class, "test": test_per_class}
    arrays: dict[str, Any] = {}
    for part, count in parts.items():
        patches = []
        for name in PICTURES:
            picture = np.asarray(getattr(data, name)())
            picture = np.repeat(picture[..., None], 3, -1) if picture.ndim == 2 else picture[..., :3]
            edge = 2 * picture.shape[1] // 3
            picture = picture[:, :edge] if part == "train" else picture[:, edge:]
            top, left = (rng.integers(0, n - size + 1, count) for n in picture.shape[:2])
            patches += [picture[t : t + size, x : x + size] for t, x in zip(top, left, strict=True)]
        arrays[f"{part}_images"] = np.stack(patches).astype(np.uint8)
        arrays[f"{part}_labels"] = np.repeat(np.arange(len(PICTURES)), count)[:, None]
    np.savez(file, **arrays)


if __name__ == "__main__":
    main()
