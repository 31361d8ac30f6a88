"""Fashion-MNIST with 12 rounds per stage, evaluated on Fashion-MNIST and on digits: 10 clients of 500 images, 3 seeds.

9 runs, about 20 minutes on 2 CPU cores. The results are in docs/guides/stages.md.

    python run.py sweep fashion_mnist_digits --dry-run
    python run.py sweep fashion_mnist_digits
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
            "strategy.first_stage_share": 0.0,
            "evaluation.labels_per_class": (5, 20),
            "evaluation.neighbours": 0,
            "evaluation.data": ("digits",),
        },
    ),
    runs=(
        {"strategy.name": "layerwise"},
        {"strategy.name": "end_to_end"},
        {"strategy.name": "end_to_end", "model.depth": 1},
    ),
    seeds=(0, 1, 2),
)
