"""Which client runs in which lane at which step: queues of clients, filled longest-first.

Clients of a cohort have unequal data. Padding each to the longest wastes most of the
work; here W lanes each work through a queue of clients, one client after the other.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
    """What each lane does at each of C steps.

    Attributes:
      examples: CxWxB, indices of the batch's images.
      real: CxW, number of real samples of the batch, always its first ones.
      client: CxW, the client's number in the population.
      step: CxW, the client's step in this round; 0 resets the lane to the global model.
      weight: CxW, n_i at the client's last step, else 0.
      busy: CxW, False where the lane has run out of clients (it trains on the first image
        and throws the result away: an all-masked batch would make NaNs).
    """

    examples: np.ndarray
    real: np.ndarray
    client: np.ndarray
    step: np.ndarray
    weight: np.ndarray
    busy: np.ndarray


def queues(steps_K: Sequence[int], lanes: int) -> list[list[int]]:
    """Clients (positions in ``steps_K``) of each lane: the longest next to the emptiest lane."""
    heap = [(0, lane) for lane in range(lanes)]
    result: list[list[int]] = [[] for _ in range(lanes)]
    for i in sorted(range(len(steps_K)), key=lambda i: -steps_K[i]):
        load, lane = heapq.heappop(heap)
        result[lane].append(i)
        heapq.heappush(heap, (load + steps_K[i], lane))
    return result


def batches(
    examples_n: np.ndarray, batch_size: int, epochs: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """A client's batches: indices TxB and real samples T, T = epochs * ceil(n / batch_size).

    Each epoch is a fresh permutation; its last batch may be short and is padded with the
    client's own examples.
    """
    per_epoch = -(-len(examples_n) // batch_size)
    padding = per_epoch * batch_size - len(examples_n)
    rows = [np.pad(rng.permutation(examples_n), (0, padding), mode="wrap") for _ in range(epochs)]
    counts = np.full((epochs, per_epoch), batch_size)
    counts[:, -1] -= padding
    return np.stack(rows).reshape(-1, batch_size), counts.reshape(-1)


def plan_round(
    clients: Sequence[int],
    examples: Sequence[np.ndarray],
    lanes: int,
    batch_size: int,
    epochs: int,
    seed: tuple[int, ...],
) -> Plan:
    """The whole round's plan, as many steps as its longest lane.

    Args:
      clients: numbers of the clients that report, each with at least one example.
      examples: every client's example indices.
      lanes: W.
      batch_size: B.
      epochs: E.
      seed: of the round; a client's batches depend on it and on the client alone.
    """
    todo = [batches(examples[c], batch_size, epochs, np.random.default_rng([*seed, c])) for c in clients]
    lanes_of = queues([len(counts) for _, counts in todo], lanes)
    length = max(sum(len(todo[i][1]) for i in lane) for lane in lanes_of)
    plan = Plan(
        examples=np.zeros((length, lanes, batch_size), np.int32),
        real=np.full((length, lanes), batch_size, np.int32),
        client=np.zeros((length, lanes), np.int32),
        step=np.zeros((length, lanes), np.int32),
        weight=np.zeros((length, lanes), np.float32),
        busy=np.zeros((length, lanes), bool),
    )
    for w, lane in enumerate(lanes_of):
        start = 0
        for i in lane:
            rows, counts = todo[i]
            here = slice(start, start + len(counts)), w
            plan.examples[here], plan.real[here] = rows, counts
            plan.client[here], plan.step[here] = clients[i], np.arange(len(counts))
            plan.weight[start + len(counts) - 1, w] = len(examples[clients[i]])
            plan.busy[here] = True
            start += len(counts)
    return plan


def chunks(plan: Plan, steps: int) -> list[tuple[Plan, int]]:
    """The plan cut into calls of ``steps`` steps, the last one padded, each with its real number of steps."""
    length = len(plan.busy)
    result = []
    for start in range(0, length, steps):
        real = min(steps, length - start)
        pad = [(0, steps - real)]
        part = Plan(*(np.pad(x[start : start + real], pad + [(0, 0)] * (x.ndim - 1)) for x in plan))
        result.append((part, real))
    return result
