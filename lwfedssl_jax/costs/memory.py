"""Peak memory and speed of one client's training step, from the compiled program."""

import math
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax import tree
from lwfedssl_jax.config import Config, override
from lwfedssl_jax.costs.operations import (
    Known,
    StagePart,
    executed_operations,
    stage_parts,
    step_config,
    traceable_step,
)
from lwfedssl_jax.system.devices import program_memory
from lwfedssl_jax.tree import Tree

Notice = Callable[[str], None]

# These programs are compiled and never run, so nothing is spent on their speed. On a CPU, optimising machine code does
# not change the memory, and fusion emitters change it by at most some hundred bytes and take more than half of the time
# (jax 0.11 no longer has the option). A GPU's compiler would time kernels. Programs that run keep all of it, because
# results would differ.
COMPILER_OPTIONS: dict[str, dict[str, str | bool]] = {
    "cpu": {"xla_backend_optimization_level": "0"},
    "gpu": {"xla_gpu_autotune_level": "0"},
}
if jax.__version_info__ < (0, 11):
    COMPILER_OPTIONS["cpu"]["xla_cpu_use_fusion_emitters"] = False


def lower_step(config: Config, part: StagePart, known: Known | None = None) -> tuple[jax.stages.Lowered, int]:
    """Lower one client's training step at the config's batch size, with its state donated as in the round.

    Returns:
      The program, with a single row of each stacked frozen leaf, and the bytes of the other rows. A loop reads these
      arguments row by row, so that all stages can share the program.
    """
    known = {} if known is None else known
    one_row = jax.tree.map(_first_row, part.stage.frozen, part.frozen)
    key = lower_step, step_config(config), str((part.trainable, one_row))
    if key not in known:
        step, arguments = traceable_step(config, part.trainable, one_row)
        known[key] = jax.jit(step, donate_argnums=0).lower(*arguments)
    return known[key], tree.nbytes(part.frozen) - tree.nbytes(one_row)


def peak_memory(programs: Iterable[jax.stages.Lowered], notify: Notice) -> dict[str, int]:
    """Compile programs for this device and return the peak bytes of each, by the program's text.

    The peak is what the compiler reports: arguments + outputs + temporaries - aliased.
    """
    distinct = {program.as_text(): program for program in programs}  # strategies share programs
    options = COMPILER_OPTIONS.get(jax.default_backend())

    def peak(item: tuple[int, jax.stages.Lowered]) -> int:
        number, program = item
        notify(f"one client's step for its peak memory, program {number} of {len(distinct)}")
        return program_memory(program.compile(options))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(distinct, pool.map(peak, enumerate(distinct.values(), 1)), strict=True))


class StepSpeed(NamedTuple):
    """Multiply-adds per second of one client's step on this device, and the seconds in which it was compiled."""

    rate: float
    compile_seconds: float


def step_speed(config: Config, repeats: int = 5) -> StepSpeed:
    """Measure a client's step in the last stage: the median rate of some repetitions, and the time to compile it."""
    plain = override(config, {"additions.depth_dropout": 0.0})
    part = stage_parts(plain)[-1]
    step, arguments = step_and_arguments(plain, part)
    lowered, seconds = jax.jit(step).lower(*arguments), []
    settings: Any = jax.config
    least = settings.jax_persistent_cache_min_compile_time_secs
    try:
        settings.update("jax_persistent_cache_min_compile_time_secs", math.inf)  # not kept: it is compiled each time
        began = time.perf_counter()
        program = lowered.compile()
        compile_seconds = time.perf_counter() - began
    finally:
        settings.update("jax_persistent_cache_min_compile_time_secs", least)
    for _ in range(1 + repeats):
        began = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - began)
    operations = executed_operations(plain, part) * config.optimizer.batch_size
    return StepSpeed(operations / float(np.median(seconds[1:])), compile_seconds)


def step_and_arguments(config: Config, part: StagePart) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a client's training step in a stage, and arguments of zeros with which it does all of its work."""
    step, (state, broadcast, images, mask, _) = traceable_step(config, part.trainable, part.frozen)
    depths = {"depth": part.stage.trainable_depth, "frozen_depth": part.stage.frozen_depth}
    broadcast = _zeros(broadcast)._replace(**{name: jnp.int32(depth) for name, depth in depths.items()})
    return step, (_zeros(state), broadcast, _zeros(images), jnp.ones(mask.shape, bool), jax.random.key(0))


def _first_row(mask: np.ndarray, x: jax.ShapeDtypeStruct | None) -> jax.ShapeDtypeStruct | None:
    """Return the shape of one row of a stacked leaf, and the whole shape of any other leaf."""
    return jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) if mask.ndim and x is not None else x


def _zeros(shapes: Tree) -> Tree:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
