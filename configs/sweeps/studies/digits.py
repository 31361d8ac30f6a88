"""Strategies on digits, with a shallow control, at equal rounds and at end_to_end's traffic; 5 seeds, 2 objectives.

55 runs, about an hour on 2 CPU cores. The results are in docs/results.md.

    python run.py sweep studies/digits --dry-run
    python run.py sweep studies/digits --jobs 2
"""

from typing import Any

from lwfedssl_jax.config import load, override, resolve
from lwfedssl_jax.costs.traffic import client_bytes
from lwfedssl_jax.sweep import Sweep

base = override(
    load("quickstart"),
    {
        "model.depth": 4,
        "federation.rounds": 16,
        "strategy.first_stage_share": 0.62,  # 10, 2, 2 and 2 rounds
        "evaluation.every": 2,
        "evaluation.fine_tune_epochs": 40,
        "evaluation.fine_tune_labels_per_class": (5,),
        "evaluation.fine_tune_batch_size": 16,
    },
)
mocov3: dict[str, Any] = {"objective.name": "mocov3", "objective.momentum": 0.9}
layerwise: dict[str, Any] = {"strategy.name": "layerwise"}
progressive: dict[str, Any] = {"strategy.name": "progressive"}
end_to_end: dict[str, Any] = {"strategy.name": "end_to_end"}
shallow = end_to_end | {"model.depth": 1}
equal_rounds = (layerwise, progressive, end_to_end, shallow)


def traffic(changes: dict[str, Any]) -> int:
    """Bytes of a client that takes part in all rounds."""
    return client_bytes(resolve(override(base, changes)))


def with_traffic_of_end_to_end(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes with as many rounds as cost a client at most end_to_end's traffic."""
    rounds = int(traffic(end_to_end) * base.federation.rounds / traffic(changes))
    while traffic(changes | {"federation.rounds": rounds}) > traffic(end_to_end):
        rounds -= 1
    return changes | {"federation.rounds": rounds, "evaluation.every": 0}


sweep = Sweep(
    base=base,
    runs=(
        *equal_rounds,
        *(with_traffic_of_end_to_end(changes) for changes in (layerwise, progressive, shallow)),
        *(changes | mocov3 for changes in equal_rounds),
    ),
    seeds=(0, 1, 2, 3, 4),
)
