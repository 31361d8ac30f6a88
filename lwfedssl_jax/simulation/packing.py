"""Schedules clients in lanes: which client runs in which lane at which step, longest clients first.

Clients of a cohort have different amounts of data. Padding each to the longest would waste most
of the work; instead, W lanes each work through a queue of clients, one client after the other.

Every batch of every client can be drawn by itself: an epoch's order is that of hashes of (seed, round, client, epoch,
position). So a call's batches are drawn together when it is made, and memory grows with the lanes and not with the
cohort.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lwfedssl_jax.data.partition import Population
from lwfedssl_jax.system import seeds


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
    for i in np.argsort(-np.asarray(steps_K), kind="stable").tolist():
        load, lane = heap[0]
        result[lane].append(i)
        heapq.heapreplace(heap, (load + steps_K[i], lane))
    return result


class PackedRound(NamedTuple):
    """The work of a round, laid out in lanes.

    Attributes:
      length: steps of the longest lane.
      steps: steps of all clients.
      samples: that these train on, in all epochs together.
      calls: the schedule in pieces of one shape, each with the number of its steps to run;
        generated one by one, and only once.
    """

    length: int
    steps: int
    samples: int
    calls: Iterator[tuple[Schedule, int]]


class Draw(NamedTuple):
    """What the order of a client's examples depends on, in addition to the client and the epoch."""

    seed: int
    round: int


class Layout(NamedTuple):
    """How clients are packed.

    Attributes:
      lanes: W.
      batch_size: B.
      fewest: a batch with fewer samples is left out, as is a client with fewer examples.
      epochs: E.
      call_steps: C, steps per call.
      one_per_call: a lane begins a client only at a call's first step, so that the state before and
        after a call is that of one client per lane; lanes then wait for each other.
    """

    lanes: int
    batch_size: int
    fewest: int
    epochs: int
    call_steps: int
    one_per_call: bool = False


class Queue(NamedTuple):
    """Clients that follow each other in a lane, with the entries of an array each.

    Attributes:
      client: number.
      size: n, the number of its examples.
      per_epoch: batches of an epoch.
      steps: T, batches of all epochs.
      start: when its first step is, counted in steps.
    """

    client: np.ndarray
    size: np.ndarray
    per_epoch: np.ndarray
    steps: np.ndarray
    start: np.ndarray


def make_queue(client_K: np.ndarray, size_K: np.ndarray, layout: Layout) -> Queue:
    """Lay out clients one after the other; with ``one_per_call``, each begins with a call."""
    full, rest = np.divmod(size_K, layout.batch_size)
    per_epoch = full + (rest >= layout.fewest)
    steps = layout.epochs * per_epoch
    time = -(-steps // layout.call_steps) * layout.call_steps if layout.one_per_call else steps
    return Queue(client_K, size_K, per_epoch, steps, np.cumsum(time) - time)


def pack_round(clients: Sequence[int], population: Population, layout: Layout, draw: Draw) -> PackedRound:
    """Pack the clients that report into lanes.

    Args:
      clients: their numbers; each has at least ``layout.fewest`` examples.
      population: of all clients.
      layout: how they are packed.
      draw: of the round; a client's batches depend only on this, on its number and on its number of examples.
    """
    client_K = np.asarray(clients)
    size_K = population.sizes[client_K].astype(np.int64)
    every = make_queue(client_K, size_K, layout)
    lanes = [make_queue(client_K[i], size_K[i], layout) for i in queues(every.steps.tolist(), layout.lanes)]
    lengths = call_lengths([lane.steps.tolist() for lane in lanes], layout)
    samples = layout.epochs * int(np.minimum(size_K, every.per_epoch * layout.batch_size).sum())
    calls = ((make_call(lanes, population, layout, draw, number), length) for number, length in enumerate(lengths))
    return PackedRound(sum(lengths), int(every.steps.sum()), samples, calls)


def call_lengths(steps: Sequence[Sequence[int]], layout: Layout) -> list[int]:
    """Return how many steps of each call are to be run; ``steps`` are those of each lane's clients."""
    size = layout.call_steps
    if layout.one_per_call:
        pieces = [[min(size, t - c) for t in lane for c in range(0, t, size)] for lane in steps]
        return [max(together) for together in itertools.zip_longest(*pieces, fillvalue=0)]
    longest = max(map(sum, steps))
    return [min(size, longest - start) for start in range(0, longest, size)]


def make_call(lanes: Sequence[Queue], population: Population, layout: Layout, draw: Draw, number: int) -> Schedule:
    """Make the schedule of a round's call by its number, from 0."""
    schedule = idle_schedule(layout.call_steps, layout.lanes, layout.batch_size)
    time = number * layout.call_steps + np.arange(layout.call_steps)
    found = [steps_at(queue, time) for queue in lanes if len(queue.client)]
    used = [w for w, queue in enumerate(lanes) if len(queue.client)]
    w = np.repeat(used, [len(c) for c, _, _ in found])
    c, step = (np.concatenate(parts) for parts in list(zip(*found, strict=True))[:2])
    client, size, per_epoch, steps, _ = (np.concatenate(parts) for parts in zip(*(q for _, _, q in found), strict=True))
    epoch, batch = np.divmod(step, per_epoch)
    schedule.examples[c, w] = batch_examples(population, draw, Batches(client, size, epoch, batch), layout.batch_size)
    schedule.real[c, w] = np.minimum(layout.batch_size, size - batch * layout.batch_size)
    schedule.client[c, w] = client
    schedule.step[c, w] = step
    schedule.weight[c, w] = np.where(step == steps - 1, size, 0)
    schedule.busy[c, w] = True
    return schedule


def steps_at(queue: Queue, time_C: np.ndarray) -> tuple[np.ndarray, np.ndarray, Queue]:
    """Return when a lane is busy (positions in ``time_C``), with which step of which client."""
    i = np.searchsorted(queue.start, time_C, side="right") - 1
    step = time_C - queue.start[i]
    busy = np.flatnonzero(step < queue.steps[i])
    return busy, step[busy], Queue(*(values[i[busy]] for values in queue))


class Batches(NamedTuple):
    """Batches of clients, with the entries of an array each: M of them, those of an epoch one after the other.

    Attributes:
      client: number.
      size: n, the number of its examples.
      epoch: from 0.
      batch: number in its epoch, from 0.
    """

    client: np.ndarray
    size: np.ndarray
    epoch: np.ndarray
    batch: np.ndarray


def batch_examples(population: Population, draw: Draw, batches: Batches, batch_size: int) -> np.ndarray:
    """Return the examples of each of M batches, MxB; a short batch is filled with other examples of its client."""
    position_MxB = (batches.batch[:, None] * batch_size + np.arange(batch_size)) % batches.size[:, None]
    begins = np.ones(len(batches.client), bool)
    begins[1:] = (np.diff(batches.client) != 0) | (np.diff(batches.epoch) != 0)
    row_M, bits_M = np.cumsum(begins) - 1, np.frexp(batches.size - 1)[1]
    bits_R, row_of = bits_M[begins], np.zeros(begins.sum(), int)
    for bits in np.unique(bits_R):  # rows of one sort have one length, up to a factor of 2
        rows, here = np.flatnonzero(bits_R == bits), bits_M == bits
        row_of[rows] = np.arange(len(rows))
        first = np.flatnonzero(begins)[rows]
        order = epoch_orders(draw, batches.client[first], batches.epoch[first], batches.size[first], int(bits))
        position_MxB[here] = order[row_of[row_M[here]][:, None], position_MxB[here]]
    return population.at(batches.client[:, None], position_MxB)


def epoch_orders(draw: Draw, client_R: np.ndarray, epoch_R: np.ndarray, size_R: np.ndarray, bits: int) -> np.ndarray:
    """Return random orders of the positions of R clients' epochs, each in a row of ``2**bits``, first those below n."""
    position = np.arange(2**bits, dtype=np.uint64)
    low = np.uint64(2**bits - 1)
    hashes = seeds.hashes(draw.seed, seeds.RngTag.BATCHES, draw.round, client_R[:, None], epoch_R[:, None], position)
    keys = np.where(position < size_R[:, None], (hashes & ~low) | position, np.uint64(2**64 - 1))
    keys.sort(axis=1)
    return (keys & low).astype(np.int64)


def pack_embeddings(
    client_W: Sequence[int | None], population: Population, layout: Layout, draw: Draw, most: int
) -> Iterator[tuple[Schedule, int]]:
    """Generate the calls in which clients embed images after their last step, each with the number of its rows.

    A client's are the first ``most`` images of one more epoch, in whole batches; their rows have the numbers of further
    steps.

    Args:
      client_W: each lane's client, or None.
      population, layout, draw: as for ``pack_round``.
      most: images per client.
    """
    used = [w for w, client in enumerate(client_W) if client is not None]
    clients = np.array([client for client in client_W if client is not None])
    every = make_queue(clients, population.sizes[clients].astype(np.int64), layout._replace(epochs=1))
    rows = np.minimum(every.per_epoch, -(-most // layout.batch_size))
    for first in range(0, int(rows.max()), layout.call_steps):
        schedule = idle_schedule(layout.call_steps, layout.lanes, layout.batch_size)
        count = np.clip(rows - first, 0, layout.call_steps)
        c = np.concatenate([np.arange(n) for n in count])
        of = (used, clients, every.size, every.per_epoch)
        w, client, size, per_epoch = (np.repeat(values, count) for values in of)
        batch, last = c + first, np.full_like(size, layout.epochs)
        schedule.examples[c, w] = batch_examples(
            population, draw, Batches(client, size, last, batch), layout.batch_size
        )
        schedule.real[c, w] = np.minimum(layout.batch_size, size - batch * layout.batch_size)
        schedule.client[c, w] = client
        schedule.step[c, w] = layout.epochs * per_epoch + batch
        schedule.busy[c, w] = True
        yield schedule, int(count.max())


def embedded(sizes_K: np.ndarray, layout: Layout, most: int) -> np.ndarray:
    """Return of how many images each client uploads the embeddings (``pack_embeddings``)."""
    per_epoch = make_queue(np.arange(len(sizes_K)), sizes_K.astype(np.int64), layout._replace(epochs=1)).per_epoch
    return np.minimum(np.minimum(sizes_K, most), per_epoch * layout.batch_size)


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
