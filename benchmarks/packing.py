"""Lane utilisation and seconds of a round with unequal clients: queues, against padding all to the longest.

256 clients of log-normal sizes (sigma 1, median 64), batch 32; a small ViT keeps the round short.
"""

from typing import Any

import common


def main() -> None:
    options = common.arguments(__doc__ or "", clients={"type": int, "default": 256})
    import jax
    import numpy as np

    from lwfedssl_jax.config import Config, override, resolve
    from lwfedssl_jax.data.partition import Population
    from lwfedssl_jax.simulation import cohort, setup
    from lwfedssl_jax.simulation.simulator import Simulator
    from lwfedssl_jax.system import devices

    devices.set_up_cpu()

    def side(lanes: int, padded: bool) -> tuple[Any, float]:
        config = resolve(
            override(
                Config(),
                {
                    "data.name": "synthetic", "data.image_size": 8, "data.synthetic_examples": 4000,
                    "partition.kind": "shared", "partition.examples_per_client": 64, "partition.size_sigma": 1.0,
                    "partition.clients": options.clients, "model.name": "vit_micro", "model.width": 16,
                    "model.heads": 2, "model.depth": 2, "objective.name": "simclr", "objective.temperature": 0.2,
                    "objective.hidden_dim": 32, "objective.output_dim": 16, "federation.rounds": 2,
                    "federation.local_epochs": 1, "optimizer.batch_size": 32, "runtime.lanes": lanes,
                },
            )
        )  # fmt: skip
        run = setup.prepare(config)
        sizes = run.clients.sizes
        useful = int(np.sum(-(-sizes // 32)))
        if padded:  # every client runs the longest one's steps; what is beyond its own is thrown away
            longest = np.full_like(sizes, sizes.max())
            run = run._replace(clients=Population(longest, lambda i: np.arange(sizes.max()) % 4000))
        simulator = Simulator([run])
        params = simulator.stack.place(jax.tree.map(np.asarray, setup.initial_params(run)))
        stage = run.stages[1]
        work = cohort.pack_cohort(run, list(range(options.clients)), 1)
        return (
            lambda: jax.block_until_ready(simulator.run_rounds(stage, params, None, 2).params),
            useful / (work.length * run.lanes),
        )

    layouts = {
        "queues, 2 lanes": (2, False), "queues, 4 lanes": (4, False), "queues, 8 lanes": (8, False),
        "queues, 16 lanes": (16, False), "padded to the longest, 16 lanes": (16, True),
    }  # fmt: skip
    sides = {name: side(*layout) for name, layout in layouts.items()}
    seconds = common.interleave({name: run for name, (run, _) in sides.items()}, options.repeats)
    rows = [
        {
            "layout": name,
            "lane utilisation": sides[name][1],
            "median s": sorted(values)[options.repeats // 2],
            "against padding": common.ratio(values, seconds["padded to the longest, 16 lanes"]),
        }
        for name, values in seconds.items()
    ]
    common.publish("packing", f"{options.clients} clients, sizes log-normal (sigma 1)", rows)


if __name__ == "__main__":
    main()
