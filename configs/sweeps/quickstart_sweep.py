"""The three strategies with three seeds each on digits: within 15 minutes on 2 CPU cores.

    python run.py sweep quickstart_sweep --dry-run
    python run.py sweep quickstart_sweep

The quick start with 4 layers and 16 rounds, as in docs/results.md (SimCLR, study "The strategies on digits").
"""

from lwfedssl_jax.config import load, override
from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base=override(
        load("quickstart"),
        {"model.depth": 4, "federation.rounds": 16, "evaluation.labels_per_class": (5, 0)},
    ),
    product={"strategy.name": ("layerwise", "progressive", "end_to_end")},
    seeds=(0, 1, 2),
)
