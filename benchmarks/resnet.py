"""Seconds of one local step of ResNet-18 for several clients: under vmap, and one client after the other.

With either way of convolving that the package has: as matrix products, and by XLA's convolutions.
"""

import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import common


def main() -> None:
    options = common.arguments(
        __doc__ or "",
        clients={"type": int, "default": 4},
        batch={"type": int, "default": 32},
        size={"type": int, "default": 32, "help": "height and width of the images"},
    )
    import jax
    import jax.numpy as jnp

    from lwfedssl_jax import tree
    from lwfedssl_jax.config import Config, override, resolve
    from lwfedssl_jax.method.client import client_init, client_step
    from lwfedssl_jax.method.stages import make_stages
    from lwfedssl_jax.method.task import Broadcast, init_params, make_task, param_layers

    maps: dict[str, Callable[..., Any]] = {
        "vmap": lambda f, *lanes: jax.vmap(f)(*lanes),
        "map": lambda f, *lanes: jax.lax.map(lambda lane: f(*lane), lanes),
    }

    def side(strategy: str, over_lanes: Callable[..., Any], backend: str) -> Callable[[], Any]:
        config = resolve(
            override(
                Config(),
                {
                    "data.name": "synthetic", "data.image_size": options.size, "data.views": "natural",
                    "model.name": "resnet18", "optimizer.batch_size": options.batch, "strategy.name": strategy,
                },
            )
        )  # fmt: skip
        task = make_task(config)
        params = jax.jit(lambda: init_params(task, jax.random.key(0)))()
        stage = make_stages(config, param_layers(task, params))[-1]
        rows = tree.rows(stage.trainable)
        frozen = tree.take(params, tree.rows(stage.frozen))
        sent = Broadcast(tree.take(params, rows), tree.present(params, rows), frozen, *stage.depths)
        shape = (options.clients, options.batch, options.size, options.size, 3)
        images = jax.random.randint(jax.random.key(1), shape, 0, 256).astype(jnp.uint8)
        keys = jax.random.split(jax.random.key(2), options.clients)
        mask_B = jnp.ones(options.batch, bool)
        one = client_init(task, sent.trainable)
        states = jax.tree.map(lambda x: jnp.broadcast_to(x, (options.clients, *x.shape)), one)

        def step(states: Any) -> Any:
            one = lambda state, images, key: client_step(task, state, sent, images, mask_B, key)[0]  # noqa: E731
            return over_lanes(one, states, images, keys)

        # In a loop of unknown length, as a round's steps are: there XLA compiles otherwise on a CPU.
        run = jax.jit(lambda states, steps: jax.lax.fori_loop(0, steps, lambda _, states: step(states), states))
        with mock.patch.object(jax, "default_backend", return_value=backend):
            compiled = run.lower(states, 1).compile()
        return lambda: jax.block_until_ready(compiled(states, 1))

    convolutions = {"products": "cpu", "XLA's": "gpu"}
    rows = []
    for strategy in ("layerwise", "end_to_end"):
        sides = {(m, c): side(strategy, maps[m], convolutions[c]) for c in convolutions for m in maps}
        seconds = common.interleave(sides, options.repeats)
        rows += [
            {
                "strategy": f"{strategy}, last stage",
                "convolutions": c,
                "clients": m,
                "median s": statistics.median(values),
                "against products, map": common.ratio(values, seconds["map", "products"]),
            }
            for (m, c), values in seconds.items()
        ]
    title = f"A step of ResNet-18, {options.clients} clients x {options.batch} images of {options.size}x{options.size}"
    platform = jax.default_backend()
    common.publish(f"resnet_{platform}", f"{title} ({platform})", rows)


if __name__ == "__main__":
    main()
