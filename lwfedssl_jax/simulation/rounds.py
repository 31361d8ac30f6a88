"""The training round: parallel lanes of clients on one or more devices, and the streaming average.

A call runs a number of steps of the schedule in all lanes. The clients' contributions are added to
a sum per lane, so memory grows with the lanes, not with the cohort. Lanes are the only axis
that is split over devices and hosts; they exchange nothing before the end of the round.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from lwfedssl_jax import tree
from lwfedssl_jax.method.aggregation import Aggregator, RoundContext
from lwfedssl_jax.method.client import ClientStart, client_step
from lwfedssl_jax.method.compression import Compression
from lwfedssl_jax.method.depth_dropout import PER_ROUND, routes, skipped_layers, without_layers
from lwfedssl_jax.method.exchange import Exchange
from lwfedssl_jax.method.task import Broadcast, ClientState, Task, weights_of
from lwfedssl_jax.simulation.packing import Schedule
from lwfedssl_jax.system import seeds
from lwfedssl_jax.tree import Tree

LANES = "lanes"  # the mesh's only axis
ALL, BY_LANE = PartitionSpec(), PartitionSpec(LANES)
SCHEDULE_BY_LANE = PartitionSpec(None, LANES)


class Method(NamedTuple):
    """All static parts of a round, over which the programs close.

    Attributes:
      task: local training.
      aggregator: how the server combines the clients' models.
      start: how a client's state begins.
      exchange: what clients and server exchange in addition to models.
      compression: how clients' models are sent; None if as they are.
      mesh: the devices that the lanes are split over, evenly.
    """

    task: Task
    aggregator: Aggregator
    start: ClientStart
    exchange: Exchange
    compression: Compression | None
    mesh: Mesh


class Work(NamedTuple):
    """The work of one call.

    Attributes:
      images_GxNxHxWxC: uint8, the images that ``schedule.examples`` indexes: one pool for all lanes (G = 1) or one each
        (G = W).
      schedule: C steps, of which any part can be run: calls of all lengths share a program.
      first, steps: the row of the schedule to begin with, and how many to run.
    """

    images_GxNxHxWxC: jax.Array
    schedule: Schedule
    first: jax.Array
    steps: jax.Array


class Carry(NamedTuple):
    """The state that a round passes from call to call; every leaf has a leading lane axis W.

    Attributes:
      client: state of the client each lane is training.
      loss, samples: its loss summed over real samples, and their number.
      total: sums over the lane's finished clients.
      left_out: number of finished clients whose update was not finite, and is not in any sum.
      layers: layers run, summed over the steps.
    """

    client: ClientState
    loss: jax.Array
    samples: jax.Array
    total: "Total"
    left_out: jax.Array
    layers: jax.Array


class Total(NamedTuple):
    """Sums over finished clients, with n_i examples each.

    Attributes:
      examples: sum of n_i.
      weighted: sum of ``n_i * w_i``.
      squares: sum of ``n_i * ||w_i - w_sent||^2`` over all weights.
      loss, samples: loss summed over real samples, and their number.
      summed: the aggregator's contributions.
      having: with depth dropout by round, for each trainable leaf the sum of n_i over the clients that have it, row by
        row; else empty.
    """

    examples: jax.Array
    weighted: Tree
    squares: jax.Array
    loss: jax.Array
    samples: jax.Array
    summed: Tree
    having: Tree


class Update(NamedTuple):
    """What a client reports at the end of its last step.

    Attributes:
      trained: its trainable part.
      examples: n_i, float32.
      loss, samples: its loss summed over real samples, and their number.
    """

    trained: Tree
    examples: jax.Array
    loss: jax.Array
    samples: jax.Array


def contribution(method: Method, context: RoundContext, broadcast: Broadcast, update: Update) -> Total:
    """Return what one client adds to the round's sums; of ``broadcast``, what it does not have is not present."""
    trained, examples = update.trained, update.examples
    chex.assert_trees_all_equal_shapes_and_dtypes(trained, broadcast.trainable)
    weighted, having = jax.tree.map(lambda x: examples.astype(x.dtype) * x, trained), ()
    if method.task.drops_layers == PER_ROUND:
        having = jax.tree.map(lambda present: examples * present.astype(examples.dtype), broadcast.present)
        weighted = jax.tree.map(lambda n, x: per_row(n, x) * x, having, trained)
    return Total(
        examples=examples,
        weighted=weighted,
        squares=examples * squared_distance(trained, broadcast.trainable),
        loss=update.loss,
        samples=update.samples,
        summed=method.aggregator.add(context, broadcast, trained, examples),
        having=having,
    )


def per_row(numbers: jax.Array, leaf: jax.Array) -> jax.Array:
    """Return numbers, one or one for each row of a leaf, so that they can be multiplied with it."""
    return jnp.expand_dims(numbers, tuple(range(numbers.ndim, leaf.ndim))).astype(leaf.dtype)


def mean_of(total: Total, broadcast: Broadcast, examples: jax.Array) -> tuple[Tree, Tree]:
    """Return the weighted mean over the clients that have a weight, and the same with what was sent for the others."""
    if not jax.tree.leaves(total.having):
        mean = jax.tree.map(lambda x: x / examples.astype(x.dtype), total.weighted)
        return mean, mean

    def mean_of_those(n: jax.Array, x: jax.Array, sent: jax.Array) -> jax.Array:
        return jnp.where(per_row(n, x) > 0, x / jnp.maximum(per_row(n, x), 1), sent)

    def mean_of_all(n: jax.Array, x: jax.Array, sent: jax.Array) -> jax.Array:
        return (x + per_row(examples - n, x) * sent) / examples.astype(x.dtype)

    trees = total.having, total.weighted, broadcast.trainable
    return jax.tree.map(mean_of_those, *trees), jax.tree.map(mean_of_all, *trees)


def is_finite(total: Total) -> jax.Array:
    """Return whether everything that a client adds is finite; its weights are if the squares of their change are."""
    statistics = {k: v for k, v in total.weighted.items() if k == "statistics"}
    leaves = jax.tree.leaves((total.squares, total.loss, statistics))
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def squared_distance(a: Tree, b: Tree) -> jax.Array:
    """Return ``||a - b||^2`` over all weights, in float32."""
    squares = jax.tree.map(lambda x, y: jnp.square(x - y).sum().astype(jnp.float32), weights_of(a), weights_of(b))
    return jnp.stack(jax.tree.leaves(squares)).sum()


def start_round(method: Method, broadcast: Broadcast, lanes: int) -> Carry:
    """Make the state of an empty round."""
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    client = method.start.begin(method.task, broadcast, None, none)
    update = Update(broadcast.trainable, zero, zero, none)
    shared = jax.eval_shape(lambda x: method.aggregator.shared(method.aggregator.init(x)), broadcast)
    context = RoundContext(none, jax.random.key(0), method.task.hyper, zero, shared)
    total = jax.eval_shape(functools.partial(contribution, method), context, broadcast, update)
    zeros = jax.tree.map(lambda x: jnp.zeros((lanes, *x.shape), x.dtype), total)

    def in_lanes(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, (lanes, *x.shape))

    client, zero, none = jax.tree.map(in_lanes, (client, zero, none))
    return Carry(client, zero, none, zeros, none, none)


def run_steps(
    method: Method, carry: Carry, broadcast: Broadcast, memory: Tree, work: Work, context: RoundContext
) -> Carry:
    """Run the steps of a call in every lane.

    Args:
      method: static.
      carry: from ``start_round`` or the call before; may be donated.
      broadcast: one copy for all lanes.
      memory: of the clients that lanes begin, with a leading lane axis; None if clients keep nothing.
      work: images and steps.
      context: of the round; its hyperparameters replace the task's, and its key is ``fold_in(seed, round)``, into
        which the client and the step are folded here.
    """
    batch = work.images_GxNxHxWxC
    chex.assert_rank(batch, 5)
    pool = ALL if len(batch) == 1 else BY_LANE
    return jax.shard_map(
        functools.partial(on_device, method),
        mesh=method.mesh,
        in_specs=(BY_LANE, ALL, BY_LANE, Work._make((pool, SCHEDULE_BY_LANE, ALL, ALL)), ALL),
        out_specs=BY_LANE,
        check_vma=False,  # nothing is reduced over lanes here; the check would sum what must not be summed
    )(carry, broadcast, memory, work, context)


def on_device(
    method: Method, carry: Carry, broadcast: Broadcast, memory: Tree, work: Work, context: RoundContext
) -> Carry:
    """Run ``run_steps`` for the lanes of one device."""
    method = method._replace(task=method.task._replace(hyper=context.hyper))
    images = work.images_GxNxHxWxC
    step = functools.partial(lane_step, method, broadcast, context)

    def body(c: jax.Array, carry: Carry) -> Carry:
        row = jax.tree.map(lambda x: x[c], work.schedule)
        if len(images) == 1:
            return over_lanes(functools.partial(step, images[0]), method.task.vmap_on_cpu, carry, row, memory)
        return over_lanes(
            lambda lane, row, memory, pool: step(pool, lane, row, memory),
            method.task.vmap_on_cpu, carry, row, memory, images,
        )  # fmt: skip

    return jax.lax.fori_loop(work.first, work.first + work.steps, body, carry)


def lane_step(
    method: Method,
    broadcast: Broadcast,
    context: RoundContext,
    pool_NxHxWxC: jax.Array,
    lane: Carry,
    row: Schedule,
    memory: Tree,
) -> Carry:
    """Run one step of the client that a lane is training; after its last step, add its update to the lane's sums."""
    task = method.task
    state = tree.where(row.step == 0, method.start.begin(task, broadcast, memory, context.number), lane.client)
    client_key = jax.random.fold_in(context.key, row.client)
    mask_B = jnp.arange(row.examples.shape[-1]) < row.real
    key = jax.random.fold_in(client_key, row.step)
    skipped_L = skipped_layers(task, broadcast, client_key, key)
    if skipped_L is not None and task.drops_layers == PER_ROUND:
        broadcast = without_layers(broadcast, skipped_L)
    state, loss = client_step(task, state, broadcast, pool_NxHxWxC[row.examples], mask_B, key, skipped_L)
    if memory is not None or method.exchange.embeddings:  # its lane is read after the call
        state = tree.where(row.busy, state, lane.client)
    weight = jnp.asarray(row.weight)
    real = jnp.where(row.busy, row.real, 0)
    loss = jnp.where(real > 0, loss.astype(jnp.float32) * real.astype(jnp.float32), 0)
    loss = jnp.where(row.step == 0, 0, lane.loss) + loss
    samples = jnp.where(row.step == 0, 0, lane.samples) + real
    trained = state.trainable
    if method.compression:
        message = method.compression.pack(compression_key(context, row.client), broadcast, trained)
        trained = method.compression.unpack(broadcast, message)
    layers = sum(count for count, _ in routes(broadcast, skipped_L))
    lane = lane._replace(client=state, loss=loss, samples=samples)
    lane = lane._replace(layers=lane.layers + jnp.where(row.busy, layers, 0))
    return accumulate(method, context, broadcast, lane, row.client, Update(trained, weight, loss, samples))


def compression_key(context: RoundContext, client: ArrayLike) -> jax.Array:
    """Return the key with which a client's update is compressed."""
    return jax.random.fold_in(jax.random.fold_in(context.key, client), seeds.ClientTag.COMPRESSION)


def accumulate(
    method: Method, context: RoundContext, broadcast: Broadcast, lane: Carry, client: ArrayLike, update: Update
) -> Carry:
    """Add a client's update to a lane's sums, if the client has finished: before that, its weight is 0."""
    own_key = jax.random.fold_in(jax.random.fold_in(context.key, client), seeds.ClientTag.CONTRIBUTION)
    added = contribution(method, context._replace(key=own_key), broadcast, update)
    # `where`, not a product with 0: NaN, also of an unfinished client, must not reach the sum.
    finished, good = update.examples > 0, is_finite(added)
    total = tree.where(finished & good, jax.tree.map(jnp.add, lane.total, added), lane.total)
    return lane._replace(total=total, left_out=lane.left_out + (finished & ~good).astype(jnp.int32))


def over_lanes(f: Callable[..., Tree], vmap_on_cpu: bool, *lanes: Tree) -> Tree:
    """Apply ``f`` to every lane of this device: by ``vmap``, except on a CPU, where lanes run one after the other.

    On a CPU, a product with different weights for every lane is slower than one product per lane.
    """
    if len(jax.tree.leaves(lanes)[0]) == 1:
        one = f(*jax.tree.map(lambda x: x[0], lanes))
        return jax.tree.map(lambda x: x[None], one)
    if jax.default_backend() == "cpu" and not vmap_on_cpu:
        return jax.lax.map(lambda lane: f(*lane), lanes)
    return jax.vmap(f)(*lanes)


class RoundEnd(NamedTuple):
    """The result of a round on the server.

    Attributes:
      state: the aggregator's.
      trainable: the trainable part after the round.
      measured: ``loss``, the mean over samples; ``client_distance``, the clients' weighted root mean squared distance
        from their mean; ``left_out``, how many clients are in neither because their updates are not finite;
        ``layers``, run in all steps; and ``aggregator``, what the aggregator measured.
    """

    state: Tree
    trainable: Tree
    measured: dict[str, Tree]


def finish_round(method: Method, context: RoundContext, state: Tree, broadcast: Broadcast, carry: Carry) -> RoundEnd:
    """Finish the round on the server."""
    total = jax.tree.map(lambda x: x.sum(0), carry.total)
    examples = jnp.maximum(total.examples, 1)
    mean, everyone = mean_of(total, broadcast, examples)
    context = context._replace(key=jax.random.fold_in(context.key, seeds.RoundTag.FINISH))
    state, trainable, found = method.aggregator.finish(context, state, broadcast, mean, total.summed)
    chex.assert_trees_all_equal_shapes_and_dtypes(trainable, broadcast.trainable)
    # The variance by its first two moments, both around the weights that were sent, near which all clients are.
    variance = total.squares / examples - squared_distance(everyone, broadcast.trainable)
    measured = {
        "loss": total.loss / jnp.maximum(total.samples, 1).astype(total.loss.dtype),
        "client_distance": jnp.sqrt(jnp.maximum(variance, 0)),
        "left_out": carry.left_out.sum(),
        "layers": carry.layers.sum(),
        "aggregator": found,
    }
    return RoundEnd(state, trainable, measured)
