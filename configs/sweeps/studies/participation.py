"""Strategies with 25 of 100 clients drawn per round, on Fashion-MNIST: about 100 steps per stage; 3 seeds.

9 runs, about 40 minutes on 2 CPU cores. The results are in docs/results.md. Each client has 250 images and takes 8
optimizer steps in a round, and each stage has 12 rounds: the paper's 25 of 100 clients take about 100 in a stage too.

    python run.py sweep studies/participation --dry-run
    python run.py sweep studies/participation --jobs 2
"""

from lwfedssl_jax.config import load, override
from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base=override(
        load("fashion_mnist"),
        {
            "partition.kind": "shared",
            "partition.clients": 100,
            "partition.examples_per_client": 250,
            "federation.clients_per_round": 25,
            "federation.rounds": 48,
            "federation.local_epochs": 2,
            "strategy.first_stage_share": 0.0,  # 12 rounds per stage
            "optimizer.batch_size": 64,
            "optimizer.learning_rate": 0.016,
            "evaluation.labels_per_class": (5, 20),
            "evaluation.neighbours": 0,
            "evaluation.every": 6,
        },
    ),
    product={"strategy.name": ("layerwise", "progressive", "end_to_end")},
    seeds=(0, 1, 2),
)
