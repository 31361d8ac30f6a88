"""Trains what docs/results.md reports, resumably, and writes that page and its figures from the work directories.

    python benchmarks/studies.py run [STUDY ...]     # hours on 2 cores; finished runs are not repeated
    python benchmarks/studies.py report              # docs/results.md from what is there

Every run is `train` of a config with overrides, in a work directory of its own under runs/studies.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "studies"
SEEDS = (0, 1, 2)
STRATEGIES = ("layerwise", "progressive", "end_to_end")
PROBE, KNN = "linear_probe_5", "knn"

DIGITS: dict[str, Any] = {
    "model.depth": 4,
    "federation.rounds": 16,
    "evaluation.labels_per_class": (5, 0),
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "simclr": {},
    "mocov3": {"objective.name": "mocov3", "objective.momentum": 0.9},
}
FASHION: dict[str, Any] = {
    "data.name": "fashion_mnist",
    "data.image_size": 28,
    "model.patch_size": 7,
    "model.depth": 4,
    "partition.clients": 20,
    "federation.clients_per_round": 3,
    "federation.rounds": 8,
    "federation.local_epochs": 1,
    "optimizer.batch_size": 128,
    "optimizer.learning_rate": 0.008,
    "evaluation.labels_per_class": (5, 100),
}


class Study(NamedTuple):
    """A question, and the runs that answer it: overrides of the quick start by the label of a table's row."""

    title: str
    text: str
    settings: dict[str, dict[str, Any]]
    strategies: tuple[str, ...] = STRATEGIES
    base: dict[str, Any] = DIGITS
    protocols: tuple[str, ...] = (PROBE, KNN)


STUDIES = {
    "digits": Study(
        "The strategies on digits", "All 1,437 training images, 10 clients, Dirichlet 0.5, by objective.", OBJECTIVES
    ),
    "layers_per_stage": Study(
        "Layers per stage",
        "SimCLR on digits, by layers per stage.",
        {str(k): {"strategy.layers_per_stage": k} for k in (1, 2)},
        ("layerwise", "progressive"),
    ),
    "depth_dropout": Study(
        "Depth dropout",
        "SimCLR on digits, by the probability that a step skips a layer that an earlier stage has trained.",
        {str(p): {"additions.depth_dropout": p} for p in (0.0, 0.5)},
        ("layerwise", "progressive"),
    ),
    "participation": Study(
        "Partial participation",
        "SimCLR on digits: all of 10 clients a round, or 25 drawn of 100.",
        {"10 of 10": {}, "25 of 100": {"partition.clients": 100, "federation.clients_per_round": 25}},
    ),
    "beta": Study(
        "Dirichlet beta",
        "SimCLR on digits, by how unequal the clients' classes are; small is more.",
        {"0.1": {"partition.beta": 0.1}, "0.5": {}},
    ),
    "batch_size": Study(
        "Batch size",
        "SimCLR on digits, by batch size; the learning rate scales with it.",
        {str(b): {"optimizer.batch_size": b} for b in (32, 64)},
        ("layerwise", "end_to_end"),
    ),
    "fashion_mnist": Study(
        "Fashion-MNIST",
        "All 60,000 images, 20 clients, Dirichlet 0.5, 3 of them drawn a round, 8 rounds of one local epoch, by objective.",
        OBJECTIVES,
        base=FASHION,
    ),
    "fine_tuning": Study(
        "Fine-tuning",
        "The paper's protocol on digits, all labels, 40 epochs.",
        {"mocov3": OBJECTIVES["mocov3"] | {"evaluation.fine_tune_epochs": 40}},
        protocols=("fine_tune",),
    ),
}


def runs(study: Study) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """``(row, strategy, seed, overrides)`` of every run of a study."""
    for seed, (row, changes), strategy in itertools.product(SEEDS, study.settings.items(), study.strategies):
        yield row, strategy, seed, study.base | {"strategy.name": strategy, "runtime.seed": seed} | changes


def workdir(overrides: dict[str, Any]) -> Path:
    """One directory for each set of overrides, whichever studies it is part of."""
    from lwfedssl_jax.cli import default_workdir
    from lwfedssl_jax.config import load, override, resolve

    return RUNS / default_workdir("quickstart", resolve(override(load("quickstart"), overrides))).name


def run(names: list[str]) -> None:
    """Train what is missing, a line a run."""
    from lwfedssl_jax import devices, simulate
    from lwfedssl_jax.checkpoint import WorkDir
    from lwfedssl_jax.config import load, override, resolve

    devices.set_up_cpu()
    devices.set_up_cache(None)
    for name in names:
        for row, strategy, seed, overrides in runs(STUDIES[name]):
            config = resolve(override(load("quickstart"), overrides))
            began = time.monotonic()
            summary = simulate.train(config, WorkDir(workdir(overrides), config))
            accuracy = {p: round(100 * r["accuracy"], 1) for p, r in summary["evaluation"].items()}
            print(f"{name}, {row}, {strategy}, seed {seed}: {accuracy}, {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    import sys
    run(sys.argv[2:] or list(STUDIES))
