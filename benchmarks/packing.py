"""Lane utilisation and seconds of a round with unequal clients: queues, against padding all to the longest.

256 clients of log-normal sizes (sigma 1, median 64), batch 32; a small ViT keeps the round short. Then the host's part:
microseconds to pack a client of 64 images, against a random generator and a permutation for each client alone.
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
        packed = cohort.pack_cohort(run, list(range(options.clients)), 1)
        assert packed
        useful = packed.steps
        if padded:  # every client runs the longest one's steps; what is beyond its own is thrown away
            longest = np.full_like(sizes, sizes.max())
            run = run._replace(clients=Population(longest, lambda clients, at: (clients + at) % 4000))
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
    host_part(options.repeats)


def host_part(repeats: int, clients: int = 20_000, images: int = 64) -> None:
    """Pack a round of equal clients, each with one batch and one epoch."""
    import numpy as np

    from lwfedssl_jax.config import PartitionConfig
    from lwfedssl_jax.data.partition import Population, shared
    from lwfedssl_jax.simulation.packing import Draw, Layout, pack_round

    order = np.random.default_rng(0).permutation(clients * images)
    disjoint = Population.disjoint(order, np.full(clients, images))
    drawn = shared(PartitionConfig(kind="shared", clients=clients, examples_per_client=images), np.zeros(50_000), 0)

    def pack(population: Population, lanes: int) -> Any:
        layout = Layout(lanes, batch_size=images, fewest=2, epochs=1, call_steps=32)
        return lambda: [len(call) for call, _ in pack_round(range(clients), population, layout, Draw(0, 1)).calls]

    def generators() -> None:
        for client in range(clients):
            np.random.default_rng([0, 1, client]).permutation(images)

    rival = "a generator and a permutation per client"
    sides = {
        "packed, 64 lanes": pack(disjoint, 64),
        "packed, 10 lanes": pack(disjoint, 10),
        "packed, 64 lanes, partition shared": pack(drawn, 64),
        rival: generators,
    }
    seconds = common.interleave(sides, repeats)
    rows = [
        {
            "side": name,
            "us per client": 1e6 * sorted(values)[repeats // 2] / clients,
            "against generators": common.ratio(values, seconds[rival]),
        }
        for name, values in seconds.items()
    ]
    common.publish("packing_host", f"{clients} clients of {images} images on the host", rows)


if __name__ == "__main__":
    main()
