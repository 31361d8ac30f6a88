"""Which client runs in which lane at which step: queues of clients, filled longest-first.

Clients of a cohort have unequal data. Padding each to the longest wastes most of the
work; here W lanes each work through a queue of clients, one client after the other. A
client's batches are drawn when its turn comes, so memory grows with the lanes and not
with the cohort.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Schedule(NamedTuple):
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


class PackedRound(NamedTuple):
    """A round's work, laid out in lanes.

    Attributes:
      length: steps of the longest lane.
      steps: steps of all clients.
      calls: the plan in pieces of one shape, each with the number of its steps that count;
        made one by one, and only once.
    """

    length: int
    steps: int
    calls: Iterator[tuple[Schedule, int]]


def pack_round(
    clients: Sequence[int],
    examples: Sequence[np.ndarray],
    sizes_K: Sequence[int],
    lanes: int,
    batch_size: int,
    epochs: int,
    call_steps: int,
    seed: tuple[int, ...],
    one_a_call: bool = False,
) -> PackedRound:
    """Lay a cohort out in lanes.

    Args:
      clients: numbers of the K clients that report, each with at least one example.
      examples: client i's example indices are ``examples[i]``.
      sizes_K: how many each of ``clients`` has.
      lanes: W.
      batch_size: B.
      epochs: E.
      call_steps: C, steps of a call.
      seed: of the round; a client's batches depend on it and on the client alone.
      one_a_call: a lane begins a client only at a call's first step, so that a call's state before
        and after is that of one client a lane; lanes then wait for each other.
    """
    steps_K = [epochs * -(-n // batch_size) for n in sizes_K]
    lanes_of = queues(steps_K, lanes)
    if one_a_call:
        pieces = [
            [min(call_steps, steps_K[i] - c) for i in lane for c in range(0, steps_K[i], call_steps)]
            for lane in lanes_of
        ]
        lengths = [max(of_lanes) for of_lanes in itertools.zip_longest(*pieces, fillvalue=0)]
    else:
        longest = max(sum(steps_K[i] for i in lane) for lane in lanes_of)
        lengths = [min(call_steps, longest - start) for start in range(0, longest, call_steps)]

    def client_steps(i: int) -> Schedule:
        """A client's T steps, without a lane axis."""
        rng = np.random.default_rng([*seed, clients[i]])
        rows, real = batches(examples[clients[i]], batch_size, epochs, rng)
        weight = np.zeros(len(real), np.float32)
        weight[-1] = sizes_K[i]
        ones = np.ones(len(real), np.int32)
        return Schedule(rows, real, clients[i] * ones, np.arange(len(real)), weight, ones > 0)

    def calls() -> Iterator[tuple[Schedule, int]]:
        waiting = [iter(lane) for lane in lanes_of]
        current: list[Schedule | None] = [next((client_steps(i) for i in lane), None) for lane in waiting]
        for length in lengths:
            plan = idle_schedule(call_steps, lanes, batch_size)
            for w, lane in enumerate(waiting):
                c = 0
                while (client := current[w]) is not None and c < (1 if one_a_call else call_steps):
                    count = min(call_steps - c, len(client.busy))
                    for array, values in zip(plan, client, strict=True):
                        array[c : c + count, w] = values[:count]
                    c += count
                    rest = Schedule(*(values[count:] for values in client))
                    current[w] = rest if len(rest.busy) else next((client_steps(i) for i in lane), None)
            yield plan, length

    return PackedRound(sum(lengths), sum(steps_K), calls())


def side_by_side(rounds: Sequence[Iterator[tuple[Schedule, int]]], idle: Schedule) -> Iterator[tuple[Schedule, int]]:
    """The calls of several rounds at once, with a leading axis over rounds; one that has ended is idle.

    Args:
      rounds: each one's ``Round.calls``, all of one shape.
      idle: of that shape (``empty_plan``).
    """
    for calls in itertools.zip_longest(*rounds):
        plans = [idle if call is None else call[0] for call in calls]
        yield Schedule(*map(np.stack, zip(*plans, strict=True))), max(call[1] for call in calls if call)


def idle_schedule(steps: int, lanes: int, batch_size: int) -> Schedule:
    """A plan of idle lanes."""
    return Schedule(
        examples=np.zeros((steps, lanes, batch_size), np.int32),
        real=np.full((steps, lanes), batch_size, np.int32),
        client=np.zeros((steps, lanes), np.int32),
        step=np.zeros((steps, lanes), np.int32),
        weight=np.zeros((steps, lanes), np.float32),
        busy=np.zeros((steps, lanes), bool),
    )
