"""Seconds of a round by number of lanes, one after the other on each core and under vmap."""

from typing import Any

import common


def main() -> None:
    options = common.arguments(__doc__ or "", clients={"type": int, "default": 16}, batch={"type": int, "default": 32})
    import jax
    import numpy as np

    from lwfedssl_jax import devices, rounds, simulate
    from lwfedssl_jax.config import Config, override, resolve

    devices.set_up_cpu()
    one_by_one = rounds.over_lanes

    def side(lanes: int, count: int, mapped: Any) -> Any:
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
        run = simulate.prepare(config, jax.devices()[:count])
        simulator = simulate.Simulator(run)
        stage = run.stages[2]
        rounds.over_lanes = mapped
        simulator.program(stage)
        rounds.over_lanes = one_by_one
        params = simulator.place(jax.tree.map(np.asarray, simulate.initial_params(run)))
        return lambda: jax.block_until_ready(simulator.run_round(stage, params, None, stage.first_round + 1)[0])

    every = jax.device_count()
    layouts = {
        f"{lanes} lanes on {count} devices{', vmap' if mapped is under_vmap else ''}": (lanes, count, mapped)
        for lanes, count, mapped in [
            (1, 1, one_by_one), (every, every, one_by_one), (4, 1, one_by_one), (4, 1, under_vmap),
            (16, every, one_by_one), (16, every, under_vmap),
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


def under_vmap(f: Any, *lanes: Any) -> Any:
    """All lanes of a device at once, whatever it is."""
    import jax

    return jax.vmap(f)(*lanes)


if __name__ == "__main__":
    main()
