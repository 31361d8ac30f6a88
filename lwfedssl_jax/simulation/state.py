"""What lasts between rounds, saved and resumed."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from lwfedssl_jax.costs.traffic import Traffic
from lwfedssl_jax.method import fedca
from lwfedssl_jax.method.stateful_clients import Memory
from lwfedssl_jax.simulation.cohort import draw_cohort
from lwfedssl_jax.simulation.program import broadcast
from lwfedssl_jax.simulation.setup import Prepared, initial_params
from lwfedssl_jax.system.devices import from_first
from lwfedssl_jax.tree import Tree


class RoundState(NamedTuple):
    """What lasts from round to round of a stage besides the parameters; of runs that go together, a leading run axis.

    Attributes:
      server: the aggregator's state.
      clients: what clients keep, by their number.
      dictionary: FedCA's, from the round before; empty without it.
    """

    server: Tree
    clients: dict[int, Memory]
    dictionary: Tree


def resume_one(run: Prepared, traffic: Traffic, rounds: int, saved: Tree) -> tuple[Tree, RoundState | None]:
    """What ``Simulator.take_up`` gives of one run, on the host; ``traffic`` hears of the rounds that were."""
    params, server, clients, dictionary = initial_params(run), None, {}, {}
    for stage in run.stages:
        last = stage.first_round + stage.rounds
        for number in range(stage.first_round + 1, min(last, rounds) + 1):
            traffic.download(stage, draw_cohort(run, number)[0])
        if stage.first_round < rounds < last:
            sent = functools.partial(broadcast, stage, rows=stage.rows, depths=stage.depths)
            shapes = jax.eval_shape(lambda p, sent=sent: run.aggregator.init(sent(p)), params)
            server = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
            dictionary = fedca.empty(run.config, run.task)
    if saved:
        params = saved["params"]
        form, no_memory = jax.tree.structure(server), jax.tree.structure(run.no_memory)
        server = jax.tree.unflatten(form, saved["server"]) if server is not None else None
        clients = {int(c): jax.tree.unflatten(no_memory, leaves) for c, leaves in saved["clients"].items()}
        dictionary = saved["dictionary"] if server is not None else {}
    if rounds:
        params, server, dictionary = from_first((params, server, dictionary))
    return params, None if server is None else RoundState(server, clients, dictionary)


def state_to_save(params: Tree, state: RoundState | None) -> Tree:
    """All that a run needs to continue after a round, as dicts and lists of arrays."""
    server, clients, dictionary = state or RoundState((), {}, {})
    kept = {str(client): jax.tree.leaves(memory) for client, memory in clients.items()}
    return {"params": params, "server": jax.tree.leaves(server), "clients": kept, "dictionary": dictionary}
