"""Peak memory and speed of one client's step, from the compiled program."""

import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax import tree
from lwfedssl_jax.config import Config, override
from lwfedssl_jax.costs.operations import (
    Known,
    StagePart,
    executed_operations,
    lowered_step,
    stage_parts,
    step_operations,
)
from lwfedssl_jax.system.devices import program_memory

Notify = Callable[[str], None]


def lower_step(config: Config, part: StagePart, known: Known | None = None) -> tuple[jax.stages.Lowered, int]:
    """One client's training step at the config's batch size, its state donated as in the round.

    Returns:
      The program, with a single row of each stacked frozen leaf, and the bytes of the other rows:
      frozen layers are arguments that a loop reads one by one, so all stages can share it.
    """
    stacked = lambda m, x: m.ndim and x is not None  # noqa: E731
    one_row = jax.tree.map(
        lambda m, x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) if stacked(m, x) else x,
        part.stage.frozen,
        part.frozen,
    )
    known = {} if known is None else known
    key = lower_step, step_operations(config), str((part.trainable, one_row))
    if key not in known:
        step, arguments = lowered_step(config, part.trainable, one_row)
        known[key] = jax.jit(step, donate_argnums=0).lower(*arguments)
    return known[key], tree.nbytes(part.frozen) - tree.nbytes(one_row)


def peak_memory(programs: Iterable[jax.stages.Lowered], notify: Notify) -> dict[str, int]:
    """Peak bytes of each program by its text: arguments + outputs + temporaries - aliased.

    These are the compiler's numbers for this device.
    """
    distinct = {program.as_text(): program for program in programs}  # strategies share programs
    # On a CPU the effort goes into machine code, and this one is never run; its memory is the same.
    options: dict[str, str | bool] | None = (
        {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
    )

    def peak(item: tuple[int, jax.stages.Lowered]) -> int:
        number, program = item
        notify(f"one client's step for its peak memory, program {number} of {len(distinct)}")
        return program_memory(program.compile(options))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(distinct, pool.map(peak, enumerate(distinct.values(), 1)), strict=True))


def step_rate(config: Config, repeats: int = 5) -> float:
    """Multiply-adds a second of one client's step here, in the last stage; compiles it and takes the median."""
    plain = override(config, {"additions.depth_dropout": 0.0})
    part = stage_parts(plain)[-1]
    step, (state, sent, images, mask, _) = lowered_step(plain, part.trainable, part.frozen)
    zeros = lambda tree_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree_)  # noqa: E731
    depths = {"depth": part.stage.trainable_depth, "frozen_depth": part.stage.frozen_depth}
    sent = zeros(sent)._replace(**{name: jnp.int32(depth) for name, depth in depths.items()})
    arguments = zeros(state), sent, zeros(images), jnp.ones(mask.shape, bool), jax.random.key(0)
    program, seconds = jax.jit(step).lower(*arguments).compile(), []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - began)
    return executed_operations(plain, part) * config.optimizer.batch_size / float(np.median(seconds[1:]))
