"""A round of 10,000 clients of 1 to 5 images: steps padded to the largest client, against steps of whole batches.

    python benchmarks/tiny_clients.py --repeats 5

A small ViT of 8x8 images, `optimizer.batch_size` 32, so that whole batches are mostly padding.
"""

from typing import Any

import common
import jax
import numpy as np

from lwfedssl_jax.config import Config, override, resolve
from lwfedssl_jax.data.partition import Population
from lwfedssl_jax.simulation import cohort, setup
from lwfedssl_jax.simulation.simulator import Simulator
from lwfedssl_jax.system import devices

CLIENTS, LARGEST = 10_000, 5
CHANGES: dict[str, Any] = {
    "data.name": "synthetic", "data.image_size": 8, "data.synthetic_examples": 4000, "partition.kind": "shared",
    "partition.examples_per_client": LARGEST, "partition.clients": CLIENTS, "model.name": "vit_micro",
    "model.width": 16, "model.heads": 2, "model.depth": 2, "objective.name": "simclr", "objective.temperature": 0.2,
    "objective.hidden_dim": 32, "objective.output_dim": 16, "federation.rounds": 2, "federation.local_epochs": 1,
    "optimizer.batch_size": 32,
}  # fmt: skip


def main() -> None:
    options = common.arguments(__doc__ or "")
    devices.set_up_cpu()
    run = setup.prepare(resolve(override(Config(), CHANGES)))
    sizes = np.random.default_rng(0).integers(1, LARGEST + 1, CLIENTS)
    run = run._replace(clients=Population(sizes, run.clients.at))
    sides = {"as large as the largest client needs": run, "whole batches": setup.with_full_batch(run)}
    simulators = {name: Simulator([side]) for name, side in sides.items()}
    stage, params = run.stages[0], setup.initial_params(run)

    def a_round(simulator: Simulator) -> None:
        placed = simulator.stack.place(params)
        jax.block_until_ready(simulator.run_rounds(stage, placed, None, 1).params)

    rounds = {name: lambda s=simulator: a_round(s) for name, simulator in simulators.items()}
    seconds = common.interleave(rounds, options.repeats)
    rows = []
    for name, side in sides.items():
        rows.append(
            {
                "steps": name, "samples in a step": side.batch, "clients": len(cohort.draw_cohort(side, 1).reporting),
                "round, median s": sorted(seconds[name])[options.repeats // 2],
                "of whole batches": common.ratio(seconds[name], seconds["whole batches"]),
            }
        )  # fmt: skip
    common.publish("tiny_clients", f"A round of {CLIENTS:,} clients of 1 to {LARGEST} images", rows)


if __name__ == "__main__":
    main()
