"""The three strategies and a shallow control with three seeds each on digits: within 15 minutes on 2 CPU cores.

    python run.py sweep quickstart_sweep --dry-run
    python run.py sweep quickstart_sweep

The quick start with 4 layers and 16 rounds. The shallow control has the first layer alone, trained end to end: where it
is as good as the others, the later layers have not paid.
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
    product={"strategy.name": ("layerwise", "progressive", "end_to_end")},
    seeds=(0, 1, 2),
    shallow_control=True,
)
