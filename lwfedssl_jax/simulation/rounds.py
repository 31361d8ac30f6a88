"""The round: lanes of clients side by side, over one device or many, and the streaming average.

A call runs a number of steps of the plan in all lanes; what clients contribute streams into
a sum per lane, so memory grows with the lanes, not with the cohort. Lanes are the one axis
that is split over devices and hosts; nothing crosses it before the round's end.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from lwfedssl_jax import tree
from lwfedssl_jax.method import fedca
from lwfedssl_jax.method.aggregation import Aggregator
from lwfedssl_jax.method.client import client_init, client_step
from lwfedssl_jax.method.depth_dropout import routes
from lwfedssl_jax.method.stateful_clients import ClientStart, Memory, start_client
from lwfedssl_jax.method.task import Broadcast, ClientState, Hyper, Task, weights_of
from lwfedssl_jax.simulation.packing import Schedule
from lwfedssl_jax.tree import Tree

LANES = "lanes"  # the mesh's only axis
ALL, BY_LANE = PartitionSpec(), PartitionSpec(LANES)
PLAN_BY_LANE = PartitionSpec(None, LANES)


class Carry(NamedTuple):
    """What a round hands from call to call; every leaf has a leading lane axis W.

    Attributes:
      client: state of the client each lane is training.
      loss, samples: its loss summed over real samples, and their number.
      total: sums over the lane's finished clients.
      left_out: finished clients whose update was not finite, and is in no sum.
      layers: layers run, summed over the steps.
    """

    client: ClientState
    loss: jax.Array
    samples: jax.Array
    total: "Total"
    left_out: jax.Array
    layers: jax.Array


class Total(NamedTuple):
    """What finished clients add up to, n_i examples each.

    Attributes:
      examples: sum of n_i.
      weighted: sum of ``n_i * w_i``.
      squares: sum of ``n_i * ||w_i - w_sent||^2`` over all weights.
      loss, samples: loss summed over real samples, and their number.
      summed: the aggregator's contributions.
      dictionary: what they add to FedCA's; empty without it.
    """

    examples: jax.Array
    weighted: Tree
    squares: jax.Array
    loss: jax.Array
    samples: jax.Array
    summed: Tree
    dictionary: Tree


def contribution(
    aggregator: Aggregator,
    sent: Broadcast,
    trained: Tree,
    examples: jax.Array,
    loss: jax.Array,
    samples: jax.Array,
    uploaded: Tree,
) -> Total:
    """What one client adds."""
    weighted = jax.tree.map(lambda x: examples.astype(x.dtype) * x, trained)
    squares = examples * squared_distance(trained, sent.trainable)
    summed = aggregator.add(sent, trained, examples)
    return Total(examples, weighted, squares, loss, samples, summed, uploaded)


def is_finite(total: Total) -> jax.Array:
    """Whether all that a client adds is; its weights are where the squares of their change are."""
    statistics = {k: v for k, v in total.weighted.items() if k == "statistics"}
    leaves = jax.tree.leaves((total.squares, total.loss, statistics, total.dictionary))
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def squared_distance(a: Tree, b: Tree) -> jax.Array:
    """``||a - b||^2`` over all weights, float32."""
    of_leaves = jax.tree.map(lambda x, y: jnp.square(x - y).sum().astype(jnp.float32), weights_of(a), weights_of(b))
    return jnp.stack(jax.tree.leaves(of_leaves)).sum()


def start_round(task: Task, aggregator: Aggregator, sent: Broadcast, lanes: int) -> Carry:
    """An empty round."""
    client = client_init(task, sent.trainable)
    wide = lambda x: jnp.broadcast_to(x, (lanes, *x.shape))  # noqa: E731
    add = functools.partial(contribution, aggregator)
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    total = jax.eval_shape(add, sent, sent.trainable, zero, zero, none, fedca.no_upload(sent))
    zeros = jax.tree.map(lambda x: jnp.zeros((lanes, *x.shape), x.dtype), total)
    return Carry(jax.tree.map(wide, client), wide(zero), wide(none), zeros, wide(none), wide(none))


def run_steps(
    task: Task,
    aggregator: Aggregator,
    start: ClientStart | None,
    mesh: Mesh,
    carry: Carry,
    sent: Broadcast,
    memory: Memory | None,
    images_GxNxHxWxC: jax.Array,
    plan: Schedule,
    first: jax.Array,
    steps: jax.Array,
    round_key: jax.Array,
    hyper: Hyper,
) -> Carry:
    """Run ``steps`` steps of ``plan``, from its row ``first`` on, in every lane.

    Args:
      task, aggregator, start: static.
      mesh: the devices the lanes are split over, evenly.
      carry: from ``start_round`` or the call before; may be donated.
      sent: one copy for all lanes.
      memory: where ``start`` needs it, that of the client each lane begins with, if it begins one.
      images_GxNxHxWxC: uint8, what ``plan.examples`` counts in: one pool for all lanes (G = 1)
        or one for each (G = W).
      plan: C steps, of which any part can be run: calls of all lengths share a program.
      round_key: ``fold_in(seed, round)``; client and step are folded in here.
      hyper: in place of the task's.
    """
    batch_size = plan.examples.shape[-1]
    shared_pool = len(images_GxNxHxWxC) == 1

    def on_device(
        carry: Carry,
        sent: Broadcast,
        memory: Memory | None,
        images: jax.Array,
        plan: Schedule,
        first: jax.Array,
        steps: jax.Array,
        round_key: jax.Array,
        hyper: Hyper,
    ) -> Carry:
        of_run = task._replace(hyper=hyper)

        def lane_step(lane: Carry, row: Schedule, memory: Memory | None, pool_NxHxWxC: jax.Array) -> Carry:
            state = tree.where(row.step == 0, start_client(of_run, start, sent, memory), lane.client)
            key = jax.random.fold_in(jax.random.fold_in(round_key, row.client), row.step)
            mask_B = jnp.arange(batch_size) < row.real
            batch_BxHxWxC = pool_NxHxWxC[row.examples]
            state, loss = client_step(of_run, state, sent, batch_BxHxWxC, mask_B, key)
            if start is not None:  # what a client keeps is read from its lane after the call
                state = tree.where(row.busy, state, lane.client)
            client, weight = jnp.asarray(row.client), jnp.asarray(row.weight)
            uploaded = fedca.upload(of_run, sent, state.trainable, batch_BxHxWxC, mask_B, key, client, weight)
            real = jnp.where(row.busy, row.real, 0)
            loss = jnp.where(real > 0, loss.astype(jnp.float32) * real.astype(jnp.float32), 0)
            loss = jnp.where(row.step == 0, 0, lane.loss) + loss
            samples = jnp.where(row.step == 0, 0, lane.samples) + real
            added = contribution(aggregator, sent, state.trainable, weight, loss, samples, uploaded)
            # `where`, not a product with 0: NaN, also of an unfinished client, must not reach the sum.
            finished, good = weight > 0, is_finite(added)
            total = tree.where(finished & good, jax.tree.map(jnp.add, lane.total, added), lane.total)
            left_out = lane.left_out + (finished & ~good).astype(jnp.int32)
            layers = sum(count for count, _ in routes(of_run, sent, key))
            layers = lane.layers + jnp.where(row.busy, layers, 0)
            return Carry(state, loss, samples, total, left_out, layers)

        def body(c: jax.Array, carry: Carry) -> Carry:
            row = jax.tree.map(lambda x: x[c], plan)
            if shared_pool:
                with_pool = lambda lane, row, memory: lane_step(lane, row, memory, images[0])  # noqa: E731
                return over_lanes(with_pool, task.vmap_on_cpu, carry, row, memory)
            return over_lanes(lane_step, task.vmap_on_cpu, carry, row, memory, images)

        return jax.lax.fori_loop(first, first + steps, body, carry)

    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(BY_LANE, ALL, BY_LANE, ALL if shared_pool else BY_LANE, PLAN_BY_LANE, ALL, ALL, ALL, ALL),
        out_specs=BY_LANE,
        check_vma=False,  # nothing is reduced over lanes here; the check would sum what is not to be summed
    )(carry, sent, memory, images_GxNxHxWxC, plan, first, steps, round_key, hyper)


def over_lanes(f: Callable[..., Carry], vmap_on_cpu: bool, *lanes: Tree) -> Carry:
    """``f`` for every lane of this device: by ``vmap``, but on a CPU one after the other.

    There a product with different weights for every lane is slower than one product a lane.
    """
    if len(jax.tree.leaves(lanes)[0]) == 1:
        one = f(*jax.tree.map(lambda x: x[0], lanes))
        return jax.tree.map(lambda x: x[None], one)
    if jax.default_backend() == "cpu" and not vmap_on_cpu:
        return jax.lax.map(lambda lane: f(*lane), lanes)
    return jax.vmap(f)(*lanes)


def finish_round(
    aggregator: Aggregator, state: Tree, sent: Broadcast, carry: Carry
) -> tuple[Tree, Tree, dict[str, jax.Array], Tree]:
    """The round's end on the server.

    Returns:
      The server's state; the trainable part after the round; ``loss``, the mean of a sample,
      ``client_distance``, the clients' weighted root mean squared distance from their mean,
      ``left_out``, how many clients are in neither, their updates not being finite, and
      ``layers``, run in all steps; FedCA's dictionary.
    """
    total = jax.tree.map(lambda x: x.sum(0), carry.total)
    examples = jnp.maximum(total.examples, 1)
    mean = jax.tree.map(lambda x: x / examples.astype(x.dtype), total.weighted)
    state, trainable = aggregator.finish(state, sent, mean, total.summed)
    # The variance by its two moments, both around what was sent, near which all clients are.
    variance = total.squares / examples - squared_distance(mean, sent.trainable)
    measured = {
        "loss": total.loss / jnp.maximum(total.samples, 1).astype(total.loss.dtype),
        "client_distance": jnp.sqrt(jnp.maximum(variance, 0)),
        "left_out": carry.left_out.sum(),
        "layers": carry.layers.sum(),
    }
    return state, trainable, measured, fedca.join(total.dictionary)
