"""The state that lasts between rounds, and how it is saved and resumed."""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from lwfedssl_jax.costs.traffic import Traffic
from lwfedssl_jax.method.aggregation import RoundContext
from lwfedssl_jax.method.depth_dropout import held_layers
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.task import Broadcast
from lwfedssl_jax.simulation import cohort
from lwfedssl_jax.simulation.cohort import Cohort
from lwfedssl_jax.simulation.memories import Memories
from lwfedssl_jax.simulation.packing import PackedRound
from lwfedssl_jax.simulation.program import Program, make_broadcast
from lwfedssl_jax.simulation.rounds import Carry
from lwfedssl_jax.simulation.setup import Prepared, initial_params
from lwfedssl_jax.system.devices import from_first
from lwfedssl_jax.tree import Tree


class RoundState(NamedTuple):
    """The state between rounds of a stage in addition to the parameters; for stacked runs, with the axis of runs.

    Attributes:
      server: the aggregator's state.
      clients: what clients keep, by their number.
      exchange: the state of the method's additional exchange, a dict on the host.
    """

    server: Tree
    clients: Memories
    exchange: Tree


class RoundStart(NamedTuple):
    """A round before its clients train: its stage and number, programs, broadcast, empty sums, context and state.

    ``params`` are all parameters.
    """

    stage: Stage
    number: int
    program: Program
    broadcast: Broadcast
    carry: Carry
    context: RoundContext
    state: RoundState
    params: Tree = None


class Trained(NamedTuple):
    """A round after its clients have trained.

    Attributes:
      carry: the sums over the clients that report.
      cohorts, works: of each run; no work if no client reports.
      fields: of each run's line, in place of those that are computed.
      exchange: the state of the method's additional exchange, if it has any.
    """

    carry: Carry
    cohorts: list[Cohort]
    works: list[PackedRound | None]
    fields: list[dict[str, Any]]
    exchange: Tree = None


def resume_one(run: Prepared, traffic: Traffic, rounds: int, saved: Tree) -> tuple[Tree, RoundState | None]:
    """Return one run's parameters and state after some rounds, on the host; the state is None at a stage's beginning.

    Args:
      run: prepared.
      traffic: is updated with the finished rounds.
      rounds: how many are finished.
      saved: as ``state_to_save`` returned it; empty for a new run.
    """
    count_traffic(run, traffic, rounds)
    params, stage = initial_params(run), stage_within(run, rounds)
    state = None if stage is None else RoundState(empty_server_state(run, stage, params), {}, run.exchange.start())
    if saved:
        params = saved["params"]
        if state is not None:
            memory = jax.tree.structure(run.start.empty_memory)
            clients = {int(client): jax.tree.unflatten(memory, leaves) for client, leaves in saved["clients"].items()}
            server = jax.tree.unflatten(jax.tree.structure(state.server), saved["server"])
            state = RoundState(server, clients, saved["dictionary"])
    if rounds:
        params = from_first(params)
        if state is not None:
            server, exchange = from_first((state.server, state.exchange))
            state = state._replace(server=server, exchange=exchange)
    return params, state


def count_traffic(run: Prepared, traffic: Traffic, rounds: int) -> None:
    """Update ``traffic`` with the clients that were drawn in the first ``rounds`` rounds."""
    for stage in run.stages:
        for number in range(stage.first_round + 1, min(stage.last_round, rounds) + 1):
            drawn = cohort.draw_cohort(run, number).drawn
            traffic.download(stage, drawn, held_layers(run.config, stage, number, drawn))


def stage_within(run: Prepared, rounds: int) -> Stage | None:
    """Return the stage that is partly finished after a total of ``rounds`` rounds, or None between stages."""
    return next((stage for stage in run.stages if stage.first_round < rounds < stage.last_round), None)


def empty_server_state(run: Prepared, stage: Stage, params: Tree) -> Tree:
    """Make zeros in the shape of the aggregator's state."""
    broadcast = functools.partial(make_broadcast, stage, rows=stage.rows, depths=stage.depths)
    shapes = jax.eval_shape(lambda params: run.aggregator.init(broadcast(params)), params)
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def state_to_save(params: Tree, state: RoundState | None) -> Tree:
    """Return all that a run needs to continue after a round, as dicts and lists of arrays."""
    server, clients, exchange = state or RoundState((), {}, {})
    kept = {str(client): jax.tree.leaves(memory) for client, memory in clients.items()}
    return {"params": params, "server": jax.tree.leaves(server), "clients": kept, "dictionary": exchange}
