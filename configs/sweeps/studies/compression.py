"""The three strategies with and without compressed uploads, on digits; 3 seeds.

36 runs, about 25 minutes on 2 CPU cores. `python benchmarks/compressed.py` makes a table of it.

    python run.py sweep studies/compression --dry-run
"""

from lwfedssl_jax.config import load, override
from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base=override(
        load("quickstart"),
        {
            "model.depth": 4,
            "federation.rounds": 16,
            "strategy.first_stage_share": 0.62,  # 10, 2, 2 and 2 rounds
            "evaluation.labels_per_class": (5, 0),
        },
    ),
    product={
        "strategy.name": ("layerwise", "progressive", "end_to_end"),
        "federation.compression": ("none", "int8", "top=0.05", "top=0.01"),
    },
    seeds=(0, 1, 2),
)
