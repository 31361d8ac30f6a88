"""Moves the models that clients keep between rounds between the host and the lanes."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh

from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.stateful_clients import Memory, to_memory
from lwfedssl_jax.simulation.lanes import placer
from lwfedssl_jax.simulation.packing import Schedule
from lwfedssl_jax.simulation.rounds import BY_LANE, Carry

Memories = dict[int, Memory]  # by client number


def recall(empty: Memory, clients: Memories, schedule: Schedule, mesh: Mesh) -> Memory:
    """Load the memories of the clients that lanes begin in a call; other lanes get an empty memory."""
    begins = schedule.busy[0] & (schedule.step[0] == 0)
    numbers = zip(schedule.client[0], begins, strict=True)
    lanes = [clients.get(int(client), empty) if begin else empty for client, begin in numbers]
    return placer(mesh, BY_LANE)(jax.tree.map(lambda *leaves: np.stack(leaves), *lanes))


def remember(clients: Memories, carry: Carry, schedule: Schedule, stage: Stage) -> None:
    """Store the finite models of the clients that a call has finished, at most one per lane."""
    memory_of = jax.vmap(functools.partial(to_memory, stage))
    lanes, losses = jax.device_get((memory_of(carry.client), carry.loss))
    for lane in np.flatnonzero(schedule.weight.max(axis=0)):
        memory = jax.tree.map(lambda x, lane=lane: np.array(x[lane]), lanes)
        if all(np.isfinite(x).all() for x in jax.tree.leaves((memory, losses[lane]))):
            clients[int(schedule.client[0, lane])] = memory
