"""How long stages last, on digits: strategies and a shallow encoder, at equal rounds and at equal traffic, 3 seeds.

27 runs, about 20 minutes on 2 CPU cores. The results are in docs/guides/stages.md.

    python run.py sweep digits_schedules --dry-run
    python run.py sweep digits_schedules
"""

from typing import Any

from lwfedssl_jax.config import load, override, resolve
from lwfedssl_jax.costs.traffic import client_bytes
from lwfedssl_jax.sweep import Sweep

base = override(
    load("quickstart"),
    {"model.depth": 4, "federation.rounds": 16, "strategy.first_stage_share": 0.0},
)
layerwise: dict[str, Any] = {"strategy.name": "layerwise"}
progressive: dict[str, Any] = {"strategy.name": "progressive"}
end_to_end: dict[str, Any] = {"strategy.name": "end_to_end"}
longer_first: dict[str, Any] = {"strategy.first_stage_share": 0.62}
shallow = end_to_end | {"model.depth": 1}


def traffic(changes: dict[str, Any]) -> int:
    """Bytes of a client that takes part in all rounds."""
    return client_bytes(resolve(override(base, changes)))


def as_dear_as_end_to_end(changes: dict[str, Any]) -> dict[str, Any]:
    """The changes with as many rounds as cost a client at most end_to_end's traffic."""
    each = traffic(changes) / base.federation.rounds
    rounds = int(traffic(end_to_end) / each)
    while traffic(changes | {"federation.rounds": rounds}) > traffic(end_to_end):
        rounds -= 1
    return changes | {"federation.rounds": rounds}


sweep = Sweep(
    base=base,
    runs=(
        layerwise,
        layerwise | longer_first,
        layerwise | {"strategy.pacing": "adaptive"},
        progressive,
        progressive | longer_first,
        end_to_end,
        shallow,
        as_dear_as_end_to_end(layerwise | longer_first),
        as_dear_as_end_to_end(shallow),
    ),
    seeds=(0, 1, 2),
)
