"""Views a second, ours and in PyTorch (if it is installed), and their share of a client's step."""

from typing import Any

import common


def main() -> None:
    options = common.arguments(__doc__ or "", batch={"type": int, "default": 64})
    import jax
    import numpy as np

    from lwfedssl_jax.data.views import RECIPES, two_views

    images = np.random.default_rng(0).integers(0, 255, (options.batch, 32, 32, 3), dtype=np.uint8)
    key = jax.random.key(0)
    sides: dict[str, Any] = {}
    for recipe in RECIPES:
        program = jax.jit(lambda key, x, r=RECIPES[recipe]: two_views(key, x, r))
        sides[f"ours, {recipe}"] = lambda p=program: [jax.block_until_ready(p(key, images)) for _ in range(20)]
    if common.version("torch"):
        import torch
        from peers_torch import two_views as torch_views

        torch.set_num_threads(options.cores)
        tensor = torch.tensor(images)
        sides["PyTorch, natural"] = lambda: [torch_views(tensor) for _ in range(20)]
    step = step_program(options.batch)
    sides["a step of end_to_end, ViT of width 64 and depth 6"] = lambda: [step() for _ in range(20)]
    seconds = common.interleave(sides, options.repeats)
    rows = [
        {
            "side": name,
            "views a second": 20 * 2 * options.batch / sorted(values)[options.repeats // 2],
            "share of the step": common.ratio(values, list(seconds.values())[-1]),
        }
        for name, values in seconds.items()
    ]
    common.publish("augment", f"Two views of {options.batch} images of 32x32", rows)


def step_program(batch: int) -> Any:
    """A client's step of simclr, views included."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lwfedssl_jax.config import Config, override, resolve
    from lwfedssl_jax.costs import memory, operations
    from lwfedssl_jax.method.client import client_init
    from lwfedssl_jax.method.task import Broadcast, make_task

    config = resolve(
        override(
            Config(),
            {
                "data.name": "synthetic", "data.image_size": 32, "data.views": "natural", "model.name": "vit_micro",
                "objective.name": "simclr", "strategy.name": "end_to_end", "optimizer.batch_size": batch,
                "runtime.remat": jax.default_backend() == "cpu",
            },
        )
    )  # fmt: skip
    part = operations.stage_parts(config)[0]
    program = memory.lower_step(config, part)[0].compile()
    task = make_task(config)
    zeros = lambda x: jnp.zeros(x.shape, x.dtype)  # noqa: E731
    trainable = jax.tree.map(zeros, part.trainable)
    sent = Broadcast(
        trainable,
        jax.tree.map(lambda _: jnp.array(True), trainable),
        part.frozen,
        jnp.int32(6),
        jnp.int32(0),
        jnp.int32(0),
    )
    images = jnp.asarray(np.zeros((batch, 32, 32, 3), np.uint8))
    mask, key = jnp.ones(batch, bool), jax.random.key(0)
    fresh = lambda: client_init(task, jax.tree.map(jnp.copy, trainable))  # the program takes its state over  # noqa: E731
    return lambda: jax.block_until_ready(program(fresh(), sent, images, mask, key))


if __name__ == "__main__":
    main()
