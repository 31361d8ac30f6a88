"""What layers per stage, depth dropout, Dirichlet beta and batch size change, on digits; 3 seeds.

27 runs, about 25 minutes on 2 CPU cores. Without these changes they would be runs of studies/digits, with which
docs/results.md compares them.

    python run.py sweep studies/variations --dry-run
    python run.py sweep studies/variations --jobs 2
"""

from lwfedssl_jax.config import load, override
from lwfedssl_jax.sweep import Sweep

STAGED = ("layerwise", "progressive")
CHANGES = (
    ("strategy.layers_per_stage", 2, STAGED),
    ("additions.depth_dropout", 0.5, STAGED),
    ("partition.beta", 0.1, (*STAGED, "end_to_end")),
    ("optimizer.batch_size", 64, ("layerwise", "end_to_end")),
)

sweep = Sweep(
    base=override(
        load("quickstart"),
        {
            "model.depth": 4,
            "federation.rounds": 16,
            "strategy.first_stage_share": 0.62,
            "evaluation.every": 2,
            "evaluation.fine_tune_epochs": 40,
            "evaluation.fine_tune_labels_per_class": (5,),
            "evaluation.fine_tune_batch_size": 16,
        },
    ),
    runs=tuple(
        {"strategy.name": strategy, name: value} for name, value, strategies in CHANGES for strategy in strategies
    ),
    seeds=(0, 1, 2),
)
