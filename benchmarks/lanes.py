"""Seconds of a round by number of lanes, one after the other on each core and under vmap."""

from typing import Any

import common


def main() -> None:
    options = common.arguments(__doc__ or "", clients={"type": int, "default": 16}, batch={"type": int, "default": 32})
    import jax
    import numpy as np

    from lwfedssl_jax.config import Config, override, resolve
    from lwfedssl_jax.simulation import setup
    from lwfedssl_jax.simulation.simulator import Simulator
    from lwfedssl_jax.system import devices

    devices.set_up_cpu()

    def side(lanes: int, count: int, vmap: bool) -> Any:
        config = resolve(
            override(
                Config(),
                {
                    "data.name": "synthetic", "data.image_size": 32, "data.views": "natural",
                    "partition.kind": "shared", "partition.examples_per_client": 2 * options.batch,
                    "partition.clients": options.clients, "model.name": "vit_micro", "objective.name": "simclr",
                    "objective.temperature": 0.2, "federation.local_epochs": 1,
                    "optimizer.batch_size": options.batch, "runtime.lanes": lanes, "runtime.remat": True,
                },
            )
        )  # fmt: skip
        run = setup.prepare(config, jax.devices()[:count])
        run = run._replace(task=run.task._replace(vmap_on_cpu=vmap))
        simulator, stage = Simulator([run]), run.stages[2]
        simulator.program(stage)
        params = simulator.stack.place(jax.tree.map(np.asarray, setup.initial_params(run)))
        return lambda: jax.block_until_ready(simulator.run_rounds(stage, params, None, stage.first_round + 1).params)

    every = jax.device_count()
    layouts = {
        f"{lanes} lanes on {count} devices{', vmap' if vmap else ''}": (lanes, count, vmap)
        for lanes, count, vmap in [
            (1, 1, False), (every, every, False), (4, 1, False), (4, 1, True),
            (16, every, False), (16, every, True),
        ]
    }  # fmt: skip
    seconds = common.interleave({name: side(*layout) for name, layout in layouts.items()}, options.repeats)
    default = next(iter(list(seconds)[1:2]))
    rows = [
        {
            "layout": name,
            "median s": sorted(values)[options.repeats // 2],
            "against the default on a CPU": common.ratio(values, seconds[default]),
        }
        for name, values in seconds.items()
    ]
    common.publish("lanes", f"A round of layerwise, stage 3, {options.clients} clients x 2 steps", rows)


if __name__ == "__main__":
    main()
