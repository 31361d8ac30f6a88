"""Strategies on Fashion-MNIST, with a shallow control: 10 clients of 500 images, evaluated on digits too; 5 seeds.

25 runs, about an hour on 2 CPU cores. The results are in docs/results.md.

    python run.py sweep studies/fashion_mnist --dry-run
    python run.py sweep studies/fashion_mnist --jobs 2
"""

from lwfedssl_jax.config import load, override
from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base=override(
        load("fashion_mnist"),
        {
            "partition.kind": "shared",
            "partition.clients": 10,
            "partition.examples_per_client": 500,
            "federation.rounds": 48,
            "strategy.first_stage_share": 0.62,  # 30, 6, 6 and 6 rounds
            "evaluation.labels_per_class": (5, 20),
            "evaluation.neighbours": 0,
            "evaluation.every": 4,
            "evaluation.data": ("digits",),
            "evaluation.fine_tune_epochs": 40,
            "evaluation.fine_tune_labels_per_class": (5,),
            "evaluation.fine_tune_batch_size": 16,
        },
    ),
    runs=(
        {"strategy.name": "layerwise"},
        {"strategy.name": "progressive"},
        {"strategy.name": "end_to_end"},
        {"strategy.name": "end_to_end", "model.depth": 1},
        {"strategy.name": "layerwise", "strategy.first_stage_share": 0.0},
    ),
    seeds=(0, 1, 2, 3, 4),
)
