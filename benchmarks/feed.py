"""Seconds of a round with its images on the device, and streamed to it from a file that is mapped into memory.

The file is written first, so its pages are in the machine's memory unless it is larger (``--examples``).
"""

import tempfile
from pathlib import Path
from typing import Any

import common


def main() -> None:
    options = common.arguments(
        __doc__ or "",
        clients={"type": int, "default": 16},
        batch={"type": int, "default": 32},
        size={"type": int, "default": 32},
        examples={"type": int, "default": 20000},
        stage={"type": int, "default": 3},
        model={"default": "vit_micro"},
    )
    import jax
    import numpy as np

    from lwfedssl_jax.config import Config, override, resolve
    from lwfedssl_jax.data import partition
    from lwfedssl_jax.simulation import setup
    from lwfedssl_jax.simulation.simulator import Simulator
    from lwfedssl_jax.system import devices

    devices.set_up_cpu()

    def side(feed: str, images: np.ndarray) -> Any:
        config = resolve(
            override(
                Config(),
                {
                    "data.name": "synthetic", "data.image_size": options.size, "data.views": "natural",
                    "data.synthetic_examples": 100, "partition.kind": "shared", "model.name": options.model,
                    "partition.examples_per_client": 2 * options.batch, "partition.clients": options.clients,
                    "objective.name": "simclr", "objective.temperature": 0.2, "federation.local_epochs": 1,
                    "optimizer.batch_size": options.batch, "runtime.remat": True, "runtime.feed": feed,
                    "evaluation.labels_per_class": (0,),
                },
            )
        )  # fmt: skip
        run = setup.prepare(config)
        labels = np.resize(run.dataset.train_labels, len(images))
        clients = partition.partition(config.partition, labels, config.runtime.seed)
        run = run._replace(dataset=run.dataset._replace(train_images=images, train_labels=labels), clients=clients)
        simulator, stage = Simulator([run]), run.stages[options.stage - 1]
        simulator.program(stage)
        params = simulator.stack.place(jax.tree.map(np.asarray, setup.initial_params(run)))
        return lambda: jax.block_until_ready(simulator.run_rounds(stage, params, None, stage.first_round + 1).params)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npy"
        shape = (options.examples, options.size, options.size, 3)
        written = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
        for first in range(0, len(written), 1000):
            block = written[first : first + 1000]
            block[:] = np.random.default_rng(first).integers(0, 256, block.shape, dtype=np.uint8)
        written.flush()
        mapped = np.load(path, mmap_mode="r")
        sides = {
            "resident": side("resident", np.array(mapped)),
            "streamed from a mapped file": side("streamed", mapped),
        }
        seconds = common.interleave(sides, options.repeats)
    rows = [
        {
            "feed": name,
            "median s": sorted(values)[options.repeats // 2],
            "against resident": common.ratio(values, seconds["resident"]),
        }
        for name, values in seconds.items()
    ]
    title = (
        f"A round of layerwise, stage {options.stage}, {options.clients} clients x 2 steps of {options.batch}, "
        f"{options.examples:,} images of {options.size}x{options.size}"
    )
    common.publish("feed", title, rows)


if __name__ == "__main__":
    main()
