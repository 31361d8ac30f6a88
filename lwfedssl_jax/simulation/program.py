"""A stage's programs, compiled ahead of time."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from lwfedssl_jax import tree
from lwfedssl_jax.method import fedca
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.stateful_clients import Memory
from lwfedssl_jax.method.task import Broadcast, Hyper
from lwfedssl_jax.simulation import cohort
from lwfedssl_jax.simulation.feed import Feed
from lwfedssl_jax.simulation.packing import Schedule, idle_schedule, side_by_side
from lwfedssl_jax.simulation.rounds import ALL, BY_LANE, PLAN_BY_LANE, Carry, finish_round, run_steps, start_round
from lwfedssl_jax.simulation.setup import Prepared, initial_params
from lwfedssl_jax.tree import Tree

# What of ``Sent`` has a run axis where runs go together: all but what the stage alone says.
OF_STAGE = ("present", "depth", "frozen_depth", "droppable")
BROADCAST_BY_RUN = Broadcast._make(None if name in OF_STAGE else 0 for name in Broadcast._fields)


class Program(NamedTuple):
    """The compiled programs of a stage, and of all stages of the same shapes.

    Attributes:
      start: ``(params, rows, depths, shared) -> (sent, empty carry)``.
      steps: ``(carry, sent, memory, images, plan, first, steps, round_key, hyper) -> carry``.
      finish: ``(params, rows, state, sent, carry) -> (params with the average put in, state, measured, dictionary)``.
    """

    start: jax.stages.Compiled
    steps: jax.stages.Compiled
    finish: jax.stages.Compiled


def by_run(f: Callable[..., Any], in_axes: tuple[Any, ...], runs: int, out_axes: Any = 0) -> Callable[..., Any]:
    """``f`` for each of several runs at once."""
    return jax.vmap(f, in_axes, out_axes) if runs > 1 else f


def broadcast(stage: Stage, params: Tree, rows: Tree, depths: Sequence[ArrayLike]) -> Broadcast:
    """What the server sends of the global parameters in a stage; the stage's rows and depths may be traced."""
    frozen = jax.tree.map(lambda m, x: x if np.any(m) else None, stage.frozen, params)
    return Broadcast(tree.take(params, rows), tree.present(params, rows), frozen, *map(jnp.asarray, depths))


def compile_stage(run: Prepared, stage: Stage, feed: Feed, runs: int = 1) -> Program:
    """Compile a stage's programs ahead of time: they refuse other shapes instead of recompiling.

    Args:
      run: of which they are, or any of those that go together.
      stage: or any of the same shapes.
      feed: gives the images.
      runs: how many go together.
    """

    def start(params: Tree, rows: Tree, depths: tuple[jax.Array, ...], shared: Tree) -> tuple[Broadcast, Carry]:
        sent = broadcast(stage, params, rows, depths)._replace(shared=shared)
        return sent, start_round(run.task, run.aggregator, sent, run.lanes)

    def steps(
        carry: Carry,
        sent: Broadcast,
        memory: Memory | None,
        images: jax.Array,
        plan: Schedule,
        first: jax.Array,
        count: jax.Array,
        key: jax.Array,
        hyper: Hyper,
    ) -> Carry:
        key = jax.random.wrap_key_data(key)
        static = (run.task, run.aggregator, run.start, run.mesh)
        return run_steps(*static, carry, sent, memory, images, plan, first, count, key, hyper)

    def finish(params: Tree, rows: Tree, state: Tree, sent: Broadcast, carry: Carry) -> tuple[Tree, Tree, Tree, Tree]:
        new_state, trainable, measured, dictionary = finish_round(run.aggregator, state, sent, carry)
        new = tree.put(params, rows, trainable), new_state, dictionary
        old = params, state, {name: sent.shared[name] for name in dictionary}
        params, state, dictionary = tree.where(carry.total.examples.sum() > 0, new, old)
        return params, state, measured, dictionary

    def shapes(x: Tree, spec: PartitionSpec) -> Tree:
        sharding = NamedSharding(run.mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), x)

    def of_runs(x: Tree, *lanes: int) -> Tree:
        """With an axis for the runs, where there are several, and one for lanes, where these are given."""
        wide = (runs, *lanes) if runs > 1 else lanes
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*wide, *x.shape), x.dtype), x)

    idle = idle_schedule(cohort.CALL_STEPS, run.lanes, run.config.optimizer.batch_size)
    idle = idle if runs == 1 else next(side_by_side([iter([(idle, 0)])] * runs, idle))[0]
    images, plan, _ = next(feed(iter([(idle, 0)])))
    own_images = 0 if len(images.shape) > 5 else None
    init = by_run(run.aggregator.init, (BROADCAST_BY_RUN,), runs)
    start = by_run(start, (0, None, None, 0), runs, (BROADCAST_BY_RUN, 0))
    steps = by_run(steps, (0, BROADCAST_BY_RUN, 0, own_images, 0, None, None, 0, 0), runs)
    finish = by_run(finish, (0, None, 0, BROADCAST_BY_RUN, 0), runs)

    lanes, plan_lanes = (
        (BY_LANE, PLAN_BY_LANE) if runs == 1 else (PartitionSpec(None, *BY_LANE), PartitionSpec(None, *PLAN_BY_LANE))
    )
    everywhere, by_lane = NamedSharding(run.mesh, ALL), NamedSharding(run.mesh, lanes)
    one = jax.eval_shape(lambda: initial_params(run))
    params, rows = shapes(of_runs(one), ALL), shapes(stage.rows, ALL)
    number = shapes(jax.ShapeDtypeStruct((), np.int32), ALL)
    key = shapes(of_runs(jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))), ALL)
    hyper = shapes(of_runs(jax.tree.map(lambda _: jax.ShapeDtypeStruct((), run.task.dtype), run.task.hyper)), ALL)
    depths = jax.tree.map(lambda _: number, stage.depths)
    trainable = jax.eval_shape(tree.take, one, rows)
    shared = shapes(of_runs(fedca.shapes(run.config, run.task, trainable, len(run.server_images))), ALL)
    sent, carry = jax.eval_shape(start, params, rows, depths, shared)
    sent, carry = shapes(sent, ALL), shapes(carry, lanes)
    state = shapes(jax.eval_shape(init, sent), ALL)
    memory = shapes(of_runs(run.no_memory, run.lanes), lanes)
    return Program(
        start=jax.jit(start, out_shardings=(everywhere, by_lane)).lower(params, rows, depths, shared).compile(),
        steps=jax.jit(steps, donate_argnums=0)
        .lower(carry, sent, memory, images, shapes(plan, plan_lanes), number, number, key, hyper)
        .compile(),
        finish=jax.jit(finish, out_shardings=everywhere).lower(params, rows, state, sent, carry).compile(),
    )
