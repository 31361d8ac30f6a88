"""Strategies on patches of scikit-image's pictures, on which a second layer pays, with a shallow control; 5 seeds.

20 runs, about 20 minutes on 2 CPU cores. The results are in docs/results.md.

    python benchmarks/studies.py run pictures     # writes runs/studies/pictures.npz first; needs scikit-image
"""

from lwfedssl_jax.config import load, override
from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base=override(
        load("quickstart"),
        {
            "data.name": "npz:runs/studies/pictures.npz",
            "data.image_size": 32,
            "data.views": "natural",
            "partition.kind": "iid",
            "model.patch_size": 8,
            "model.depth": 4,
            "strategy.first_stage_share": 0.0,  # 6 rounds per stage
            "federation.rounds": 24,
            "federation.local_epochs": 2,
            "evaluation.labels_per_class": (5, 20),
            "evaluation.every": 2,
        },
    ),
    runs=(
        {"strategy.name": "layerwise"},
        {"strategy.name": "progressive"},
        {"strategy.name": "end_to_end"},
        {"strategy.name": "end_to_end", "model.depth": 1},
    ),
    seeds=(0, 1, 2, 3, 4),
)
