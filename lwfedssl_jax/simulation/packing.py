"""Schedules clients in lanes: which client runs in which lane at which step, longest clients first.

Clients of a cohort have different amounts of data. Padding each to the longest would waste most
of the work; instead, W lanes each work through a queue of clients, one client after the other. A
client's batches are drawn when its turn comes, so memory grows with the lanes and not
with the cohort.
"""

import functools
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
    """Return the clients (positions in ``steps_K``) of each lane; the longest goes next to the emptiest lane."""
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
    """Draw a client's batches: indices TxB and real samples T, T = epochs * ceil(n / batch_size).

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
    """The work of a round, laid out in lanes.

    Attributes:
      length: steps of the longest lane.
      steps: steps of all clients.
      calls: the schedule in pieces of one shape, each with the number of its steps to run;
        generated one by one, and only once.
    """

    length: int
    steps: int
    calls: Iterator[tuple[Schedule, int]]


class CohortData(NamedTuple):
    """The data to be packed: that of the K clients that report, each with at least one example.

    Attributes:
      clients: their numbers.
      examples: client i's example indices are ``examples[i]``.
      sizes_K: the number of examples that each of ``clients`` has.
    """

    clients: Sequence[int]
    examples: Sequence[np.ndarray]
    sizes_K: Sequence[int]


class Layout(NamedTuple):
    """How clients are packed.

    Attributes:
      lanes: W.
      batch_size: B.
      epochs: E.
      call_steps: C, steps per call.
      one_per_call: a lane begins a client only at a call's first step, so that the state before and
        after a call is that of one client per lane; lanes then wait for each other.
    """

    lanes: int
    batch_size: int
    epochs: int
    call_steps: int
    one_per_call: bool = False


def pack_round(cohort: CohortData, layout: Layout, seed: tuple[int, ...]) -> PackedRound:
    """Pack a cohort into lanes.

    Args:
      cohort: the clients that report.
      layout: how they are packed.
      seed: of the round; a client's batches depend only on this and on the client.
    """
    steps_K = [layout.epochs * -(-n // layout.batch_size) for n in cohort.sizes_K]
    lanes = queues(steps_K, layout.lanes)
    lengths = call_lengths(steps_K, lanes, layout)
    clients = [map(functools.partial(client_schedule, cohort, layout, seed), lane) for lane in lanes]
    return PackedRound(sum(lengths), sum(steps_K), pack_calls(clients, lengths, layout))


def call_lengths(steps_K: Sequence[int], lanes: Sequence[Sequence[int]], layout: Layout) -> list[int]:
    """Return how many steps of each call are to be run."""
    size = layout.call_steps
    if layout.one_per_call:
        pieces = [[min(size, steps_K[i] - c) for i in lane for c in range(0, steps_K[i], size)] for lane in lanes]
        return [max(together) for together in itertools.zip_longest(*pieces, fillvalue=0)]
    longest = max(sum(steps_K[i] for i in lane) for lane in lanes)
    return [min(size, longest - start) for start in range(0, longest, size)]


def client_schedule(cohort: CohortData, layout: Layout, seed: tuple[int, ...], i: int) -> Schedule:
    """Make the schedule of the T steps of the cohort's i-th client, without a lane axis."""
    client = cohort.clients[i]
    rng = np.random.default_rng([*seed, client])
    rows, real = batches(cohort.examples[client], layout.batch_size, layout.epochs, rng)
    weight = np.zeros(len(real), np.float32)
    weight[-1] = cohort.sizes_K[i]
    ones = np.ones(len(real), np.int32)
    return Schedule(rows, real, client * ones, np.arange(len(real)), weight, ones > 0)


def pack_calls(
    clients: Sequence[Iterator[Schedule]], lengths: Sequence[int], layout: Layout
) -> Iterator[tuple[Schedule, int]]:
    """Generate the calls of a round, each with the number of its steps to run.

    Args:
      clients: schedules of each lane's clients, one after the other; made when their turn comes.
      lengths: of the calls.
      layout: how clients are packed.
    """
    current = [next(lane, None) for lane in clients]
    for length in lengths:
        schedule = idle_schedule(layout.call_steps, layout.lanes, layout.batch_size)
        for w, lane in enumerate(clients):
            current[w] = fill_lane(schedule, w, current[w], lane, layout)
        yield schedule, length


def fill_lane(
    schedule: Schedule, w: int, client: Schedule | None, waiting: Iterator[Schedule], layout: Layout
) -> Schedule | None:
    """Write a lane's part of a call; returns what is left of the client that the lane is at, or the next client."""
    c = 0
    while client is not None and c < (1 if layout.one_per_call else layout.call_steps):
        count = min(layout.call_steps - c, len(client.busy))
        for array, values in zip(schedule, client, strict=True):
            array[c : c + count, w] = values[:count]
        c += count
        client = Schedule(*(values[count:] for values in client)) if count < len(client.busy) else next(waiting, None)
    return client


def side_by_side(rounds: Sequence[Iterator[tuple[Schedule, int]]], idle: Schedule) -> Iterator[tuple[Schedule, int]]:
    """Combine the calls of several rounds, with a leading axis over rounds; a round that has ended is idle.

    Args:
      rounds: ``PackedRound.calls`` of each round, all of one shape.
      idle: of that shape (``empty_plan``).
    """
    for calls in itertools.zip_longest(*rounds):
        plans = [idle if call is None else call[0] for call in calls]
        yield Schedule(*map(np.stack, zip(*plans, strict=True))), max(call[1] for call in calls if call)


def idle_schedule(steps: int, lanes: int, batch_size: int) -> Schedule:
    """Make a schedule of idle lanes."""
    return Schedule(
        examples=np.zeros((steps, lanes, batch_size), np.int32),
        real=np.full((steps, lanes), batch_size, np.int32),
        client=np.zeros((steps, lanes), np.int32),
        step=np.zeros((steps, lanes), np.int32),
        weight=np.zeros((steps, lanes), np.float32),
        busy=np.zeros((steps, lanes), bool),
    )
