"""bfloat16 against float32: seconds of a client's step, and the angle between the gradients.

Layerwise at the middle stage and end_to_end; on an accelerator also the share of the matrix units' measured peak.
"""

import time
from typing import Any

import common


def main() -> None:
    options = common.arguments(
        __doc__ or "",
        batch={"type": int, "default": 64},
        model={"default": "vit_tiny"},
        lanes={"type": int, "default": 1},
    )
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lwfedssl_jax.config import Config, override, resolve
    from lwfedssl_jax.costs.operations import executed_operations, stage_parts
    from lwfedssl_jax.method.client import client_init, client_step
    from lwfedssl_jax.simulation import setup
    from lwfedssl_jax.simulation.program import make_broadcast

    def side(strategy: str, precision: str) -> tuple[Any, Any, float]:
        config = resolve(
            override(
                Config(),
                {
                    "data.name": "synthetic", "data.image_size": 32, "data.views": "natural",
                    "model.name": options.model, "strategy.name": strategy, "optimizer.batch_size": options.batch,
                    "runtime.precision": precision, "runtime.remat": jax.default_backend() == "cpu",
                },
            )
        )  # fmt: skip
        run = setup.prepare(config, jax.devices()[:1])
        stage = run.stages[len(run.stages) // 2]
        params = setup.initial_params(run)
        sent = make_broadcast(stage, params, stage.rows, stage.depths)
        rng = np.random.default_rng(0)
        images = jnp.asarray(rng.integers(0, 255, (options.lanes, options.batch, 32, 32, 3), dtype=np.uint8))
        mask, keys = jnp.ones(options.batch, bool), jax.random.split(jax.random.key(0), options.lanes)
        wide = lambda x: jnp.broadcast_to(x, (options.lanes, *x.shape))  # noqa: E731
        state = jax.tree.map(wide, client_init(run.task, sent.trainable))
        step = lambda state, sent, image, key: client_step(run.task, state, sent, image, mask, key)[0]  # noqa: E731
        program = jax.jit(jax.vmap(step, in_axes=(0, None, 0, 0)))
        part = stage_parts(config)[len(run.stages) // 2]
        operations = executed_operations(config, part) * options.batch * options.lanes
        # After one step from zero, AdamW's first moment is the gradient, scaled.
        moments = program(state, sent, images, keys).opt_state[0].mu
        return lambda: jax.block_until_ready(program(state, sent, images, keys)), moments, operations

    peak = {p: matrix_peak(p) for p in ("float32", "bfloat16")}
    rows = []
    for strategy in ("layerwise", "end_to_end"):
        sides = {precision: side(strategy, precision) for precision in ("float32", "bfloat16")}
        seconds = common.interleave({name: s[0] for name, s in sides.items()}, options.repeats)
        flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(s[1])]) for s in sides.values()]
        cosine = float(flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1]))
        for precision, values in seconds.items():
            median = sorted(values)[options.repeats // 2]
            rows.append(
                {
                    "strategy": strategy,
                    "precision": precision,
                    "median ms": 1000 * median,
                    "against float32": common.ratio(values, seconds["float32"]),
                    "gradient cosine to float32": 1.0 if precision == "float32" else cosine,
                    "GFLOP/s": 2e-9 * sides[precision][2] / median,
                    "share of the peak": 2 * sides[precision][2] / median / peak[precision],
                }
            )
    title = f"A step of {options.lanes} clients, {options.model}, batch {options.batch}, mocov3"
    common.publish(f"precision_{jax.default_backend()}", title, rows, **{"measured peak, GFLOP/s": {
        name: value / 1e9 for name, value in peak.items()}})  # fmt: skip


def matrix_peak(precision: str) -> float:
    """FLOP/s of a large square product, the best of ten."""
    import jax
    import jax.numpy as jnp

    n = 8192 if jax.default_backend() != "cpu" else 2048
    a = jnp.ones((n, n), precision)
    product = jax.jit(lambda a: jax.lax.dot(a, a, preferred_element_type=jnp.float32))
    jax.block_until_ready(product(a))
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(product(a))
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


if __name__ == "__main__":
    main()
