"""The compiled programs of a stage, made ahead of time: they refuse other shapes instead of recompiling."""

import functools
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from lwfedssl_jax import tree
from lwfedssl_jax.method.aggregation import Canaries, RoundContext
from lwfedssl_jax.method.programs import program_config
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.task import Broadcast
from lwfedssl_jax.simulation import cohort
from lwfedssl_jax.simulation.embeddings import embed_row
from lwfedssl_jax.simulation.events import Compiling, Hear
from lwfedssl_jax.simulation.feed import Feed
from lwfedssl_jax.simulation.packing import Schedule, idle_schedule, side_by_side
from lwfedssl_jax.simulation.rounds import (
    ALL,
    BY_LANE,
    SCHEDULE_BY_LANE,
    Carry,
    Method,
    Work,
    finish_round,
    run_steps,
    start_round,
)
from lwfedssl_jax.simulation.setup import Cache, Prepared, initial_params
from lwfedssl_jax.simulation.stack import Stack
from lwfedssl_jax.tree import Tree

# Which parts of an argument have an axis over stacked runs: of a broadcast all except what the stage alone decides.
OF_STAGE = ("present", "depth", "frozen_depth", "droppable")
BROADCAST_BY_RUN = Broadcast._make(None if name in OF_STAGE else 0 for name in Broadcast._fields)
CONTEXT_BY_RUN = RoundContext(number=None, key=0, hyper=0, expected=0, shared=0, canaries=0)  # type: ignore[arg-type]


class Program(NamedTuple):
    """The compiled programs of a stage, and of all stages of the same shapes.

    Attributes:
      start: ``(params, rows, depths, extras) -> (broadcast, empty carry)``.
      steps: ``(carry, broadcast, memory, work, context) -> carry``; a context's key is key data.
      finish: ``(before, broadcast, carry, context) -> After``.
      embed: ``(the lanes' trainable parts, broadcast, work, context) -> embeddings``, if clients upload any.

    A pilot's server does without ``steps`` and its devices without ``finish``, which are then None.
    """

    start: jax.stages.Compiled
    steps: jax.stages.Compiled
    finish: jax.stages.Compiled
    embed: jax.stages.Compiled | None = None


class Before(NamedTuple):
    """The global parameters before a round, where the stage's trainable ones are, and the aggregator's state."""

    params: Tree
    rows: Tree
    state: Tree


class After(NamedTuple):
    """Parameters and states after a round, and what was measured."""

    params: Tree
    state: Tree
    measured: dict[str, Tree]


class Programs:
    """The programs of the stages of a run, or of several stacked runs, compiled when they are first needed.

    Args:
      run: the run, or any of those that are stacked.
      stack: the runs.
      feed: provides the images.
      cache: shared with other simulators of this process.
      hear: called when a compilation begins.
      skipped: names of programs that are not needed.
    """

    def __init__(
        self, run: Prepared, stack: Stack, feed: Feed, cache: Cache, hear: Hear, skipped: Collection[str] = ()
    ) -> None:
        self._run, self._stack, self._feed, self._cache, self._hear = run, stack, feed, cache, hear
        self._skipped = skipped

    def of(self, stage: Stage) -> Program:
        """Return the programs of a stage, compiled once for all stages of the same shapes."""
        run, count = self._run, self._stack.size

        def compiled() -> Program:
            together = "" if self._stack.is_single else f"{count} runs, each with "
            self._hear(Compiling(f"the round, {together}{run.lanes} lane{'s' * (run.lanes > 1)}"))
            return compile_stage(run, stage, self._feed, self._stack, self._skipped)

        shapes = str((jax.tree.map(np.shape, stage.rows), jax.tree.map(np.any, stage.frozen)))
        layout = run.lanes, run.batch, run.mesh, count, self._feed.is_resident, *self._skipped
        return self._cache.get(("round", program_config(run.config), layout, shapes), compiled)


def make_broadcast(stage: Stage, params: Tree, rows: Tree, depths: Sequence[ArrayLike]) -> Broadcast:
    """Select the global parameters that the server sends in a stage, whose rows and depths may be traced."""
    frozen = jax.tree.map(lambda m, x: x if np.any(m) else None, stage.frozen, params)
    return Broadcast(tree.take(params, rows), tree.present(params, rows), frozen, *map(jnp.asarray, depths))


def start_stage(
    run: Prepared, stage: Stage, params: Tree, rows: Tree, depths: tuple[jax.Array, ...], extras: Tree
) -> tuple[Broadcast, Carry]:
    """Make a round's broadcast, and the empty round."""
    broadcast = make_broadcast(stage, params, rows, depths)._replace(extras=extras)
    return broadcast, start_round(run.method, broadcast, run.lanes)


def train_stage(
    method: Method, carry: Carry, broadcast: Broadcast, memory: Tree, work: Work, context: RoundContext
) -> Carry:
    """Call ``run_steps`` with a context whose key is key data, which every process can place on all devices."""
    return run_steps(method, carry, broadcast, memory, work, with_key(context))


def finish_stage(method: Method, before: Before, broadcast: Broadcast, carry: Carry, context: RoundContext) -> After:
    """Put the round's average into the parameters, if any client's update is used or the aggregator does without."""
    end = finish_round(method, with_key(context), before.state, broadcast, carry)
    new = tree.put(before.params, before.rows, end.trainable), end.state
    is_used = (carry.total.examples.sum() > 0) | method.aggregator.finishes_empty
    params, state = tree.where(is_used, new, (before.params, before.state))
    return After(params, state, end.measured)


def embed_stage(method: Method, trainable: Tree, broadcast: Broadcast, work: Work, context: RoundContext) -> jax.Array:
    """Call ``embed_row`` with a context whose key is key data."""
    return embed_row(method, trainable, broadcast, work, with_key(context))


def with_key(context: RoundContext) -> RoundContext:
    """Return a context whose keys, which are key data, are keys."""
    canaries = context.canaries
    if canaries is not None:
        canaries = canaries._replace(key=jax.random.wrap_key_data(canaries.key))
    return context._replace(key=jax.random.wrap_key_data(context.key), canaries=canaries)


def idle_call(run: Prepared) -> Schedule:
    """Make the schedule of a call in which no lane has a client."""
    return idle_schedule(cohort.CALL_STEPS, run.lanes, run.batch)


def compile_stage(run: Prepared, stage: Stage, feed: Feed, stack: Stack, skipped: Collection[str] = ()) -> Program:
    """Compile a stage's programs (see ``trace_stage``), except for those whose names are given."""
    traced = trace_stage(run, stage, feed, stack, skipped)
    # Elsewhere the compiler chooses kernels by their time, and programs would disturb each other.
    at_once = len(traced) if jax.default_backend() == "cpu" else 1
    with ThreadPoolExecutor(at_once) as pool:
        futures = {name: pool.submit(program.lower().compile) for name, program in traced.items()}
    compiled: dict[str, Any] = dict.fromkeys(Program._fields)
    return Program(**compiled | {name: future.result() for name, future in futures.items()})


def trace_stage(
    run: Prepared, stage: Stage, feed: Feed, stack: Stack, skipped: Collection[str] = ()
) -> dict[str, jax.stages.Traced]:
    """Trace a stage's programs.

    Args:
      run: the run, or any of those that are stacked.
      stage: the stage, or any of the same shapes.
      feed: provides the images.
      stack: the runs.
      skipped: names of programs that are not needed.

    Returns:
      Those of ``Program`` by their names.
    """
    idle = idle_call(run)
    calls = iter([(idle, 0)]) if stack.is_single else side_by_side([iter([(idle, 0)])] * stack.size, idle)
    method, (images, schedule, _) = run.method, next(feed.serve(calls))
    own_images = None if feed.is_resident else 0
    work_by_run = Work(own_images, 0, None, None)  # type: ignore[arg-type]
    start = stack.vmap(functools.partial(start_stage, run, stage), (0, None, None, 0), (BROADCAST_BY_RUN, 0))
    steps = stack.vmap(functools.partial(train_stage, method), (0, BROADCAST_BY_RUN, 0, work_by_run, CONTEXT_BY_RUN))
    before_by_run = Before(0, None, 0)
    finish = stack.vmap(functools.partial(finish_stage, method), (before_by_run, BROADCAST_BY_RUN, 0, CONTEXT_BY_RUN))
    init = stack.vmap(method.aggregator.init, (BROADCAST_BY_RUN,))

    one = jax.eval_shape(lambda: initial_params(run))
    number = stack.abstract(jax.ShapeDtypeStruct((), np.int32), ALL)
    params, rows = stack.abstract(stack.shapes(one), ALL), stack.abstract(stage.rows, ALL)
    depths = jax.tree.map(lambda _: number, stage.depths)
    trainable = jax.eval_shape(tree.take, one, rows)
    extras = stack.abstract(stack.shapes(method.exchange.shapes(trainable, len(run.server_images))), ALL)
    key = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    lanes, schedule_lanes = stack.spec(BY_LANE), stack.spec(SCHEDULE_BY_LANE)
    broadcast, carry = jax.eval_shape(start, params, rows, depths, extras)
    broadcast, carry = stack.abstract(broadcast, ALL), stack.abstract(carry, lanes)
    state = jax.eval_shape(init, broadcast)
    shared = stack.abstract(jax.eval_shape(stack.vmap(method.aggregator.shared, (0,)), state), ALL)
    state = stack.abstract(state, ALL)
    key, hyper, expected = (stack.abstract(stack.shapes(x), ALL) for x in (key, run.hyper, np.zeros((), np.float32)))
    canaries = None
    if run.config.privacy.canaries:
        uploads = np.zeros(run.config.privacy.canaries, np.float32)
        canaries = Canaries(stack.abstract(stack.shapes(uploads), ALL), key)
    context = RoundContext(number, key, hyper, expected, shared, canaries)
    memory = stack.abstract(stack.shapes(method.start.empty_memory, run.lanes), lanes)
    work = Work(images, stack.abstract(schedule, schedule_lanes), number, number)

    everywhere, by_lane = NamedSharding(run.mesh, ALL), NamedSharding(run.mesh, lanes)
    programs: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "start": (jax.jit(start, out_shardings=(everywhere, by_lane)), (params, rows, depths, extras)),
        "steps": (jax.jit(steps, donate_argnums=0), (carry, broadcast, memory, work, context)),
        "finish": (jax.jit(finish, out_shardings=everywhere), (Before(params, rows, state), broadcast, carry, context)),
    }
    if method.exchange.embeddings:  # such runs are not stacked
        embed = jax.jit(functools.partial(embed_stage, method), out_shardings=everywhere)
        programs["embed"] = embed, (carry.client.trainable, broadcast, work, context)
    return {name: jitted.trace(*given) for name, (jitted, given) in programs.items() if name not in skipped}
