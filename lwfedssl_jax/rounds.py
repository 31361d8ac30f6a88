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

from lwfedssl_jax import fedca, tree
from lwfedssl_jax.aggregation import Aggregator
from lwfedssl_jax.client import ClientState, Sent, Task, client_init, client_step, routes, weights_of
from lwfedssl_jax.packing import Plan
from lwfedssl_jax.starts import Memory, Start, begin
from lwfedssl_jax.tree import Tree

LANES = "lanes"  # the mesh's only axis
ALL, BY_LANE = PartitionSpec(), PartitionSpec(LANES)
PLAN_BY_LANE = PartitionSpec(None, LANES)


class Carry(NamedTuple):
    """What a round hands from call to call; every leaf has a leading lane axis W.

    Attributes:
      client: state of the client each lane is training.
      total: sums over the lane's finished clients.
      loss, samples: loss summed over real samples, and their number.
      layers: layers run, summed over the steps.
    """

    client: ClientState
    total: "Total"
    loss: jax.Array
    samples: jax.Array
    layers: jax.Array


class Total(NamedTuple):
    """What finished clients add up to, n_i examples each.

    Attributes:
      examples: sum of n_i.
      weighted: sum of ``n_i * w_i``.
      squares: sum of ``n_i * ||w_i - w_sent||^2`` over all weights.
      summed: the aggregator's contributions.
      dictionary: what they add to FedCA's; empty without it.
    """

    examples: jax.Array
    weighted: Tree
    squares: jax.Array
    summed: Tree
    dictionary: Tree


def contribution(aggregator: Aggregator, sent: Sent, trained: Tree, examples: jax.Array, uploaded: Tree) -> Total:
    """What one client adds."""
    weighted = jax.tree.map(lambda x: examples.astype(x.dtype) * x, trained)
    squares = examples * squared_distance(trained, sent.trainable)
    return Total(examples, weighted, squares, aggregator.add(sent, trained, examples), uploaded)


def squared_distance(a: Tree, b: Tree) -> jax.Array:
    """``||a - b||^2`` over all weights, float32."""
    of_leaves = jax.tree.map(lambda x, y: jnp.square(x - y).sum().astype(jnp.float32), weights_of(a), weights_of(b))
    return jnp.stack(jax.tree.leaves(of_leaves)).sum()


def start_round(task: Task, aggregator: Aggregator, sent: Sent, lanes: int) -> Carry:
    """An empty round."""
    client = client_init(task, sent.trainable)
    wide = lambda x: jnp.broadcast_to(x, (lanes, *x.shape))  # noqa: E731
    add = functools.partial(contribution, aggregator)
    total = jax.eval_shape(add, sent, sent.trainable, jnp.zeros((), jnp.float32), fedca.no_upload(sent))
    zeros = jax.tree.map(lambda x: jnp.zeros((lanes, *x.shape), x.dtype), total)
    loss, count = jnp.zeros(lanes, jnp.float32), jnp.zeros(lanes, jnp.int32)
    return Carry(jax.tree.map(wide, client), zeros, loss, count, count)


def run_steps(
    task: Task,
    aggregator: Aggregator,
    start: Start | None,
    mesh: Mesh,
    carry: Carry,
    sent: Sent,
    memory: Memory | None,
    images_GxNxHxWxC: jax.Array,
    plan: Plan,
    first: jax.Array,
    steps: jax.Array,
    round_key: jax.Array,
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
    """
    batch_size = plan.examples.shape[-1]
    shared_pool = len(images_GxNxHxWxC) == 1

    def on_device(
        carry: Carry,
        sent: Sent,
        memory: Memory | None,
        images: jax.Array,
        plan: Plan,
        first: jax.Array,
        steps: jax.Array,
        round_key: jax.Array,
    ) -> Carry:
        def lane_step(lane: Carry, row: Plan, memory: Memory | None, pool_NxHxWxC: jax.Array) -> Carry:
            state = tree.where(row.step == 0, begin(task, start, sent, memory), lane.client)
            key = jax.random.fold_in(jax.random.fold_in(round_key, row.client), row.step)
            mask_B = jnp.arange(batch_size) < row.real
            batch_BxHxWxC = pool_NxHxWxC[row.examples]
            state, loss = client_step(task, state, sent, batch_BxHxWxC, mask_B, key)
            if start is not None:  # what a client keeps is read from its lane after the call
                state = tree.where(row.busy, state, lane.client)
            client, weight = jnp.asarray(row.client), jnp.asarray(row.weight)
            uploaded = fedca.upload(task, sent, state.trainable, batch_BxHxWxC, mask_B, key, client, weight)
            added = contribution(aggregator, sent, state.trainable, weight, uploaded)
            # `where`, not a product with 0: an unfinished client's NaN must not reach the sum.
            total = tree.where(weight > 0, jax.tree.map(jnp.add, lane.total, added), lane.total)
            samples = jnp.where(row.busy, row.real, 0)
            loss = jnp.where(samples > 0, loss.astype(jnp.float32) * samples.astype(jnp.float32), 0)
            layers = sum(count for count, _ in routes(task, sent, key))
            layers = lane.layers + jnp.where(row.busy, layers, 0)
            return Carry(state, total, lane.loss + loss, lane.samples + samples, layers)

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
        in_specs=(BY_LANE, ALL, BY_LANE, ALL if shared_pool else BY_LANE, PLAN_BY_LANE, ALL, ALL, ALL),
        out_specs=BY_LANE,
        check_vma=False,  # nothing is reduced over lanes here; the check would sum what is not to be summed
    )(carry, sent, memory, images_GxNxHxWxC, plan, first, steps, round_key)


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
    aggregator: Aggregator, state: Tree, sent: Sent, carry: Carry
) -> tuple[Tree, Tree, dict[str, jax.Array], Tree]:
    """The round's end on the server.

    Returns:
      The server's state; the trainable part after the round; ``loss``, the mean of a sample,
      ``client_distance``, the clients' weighted root mean squared distance from their mean, and
      ``layers``, run in all steps; FedCA's dictionary.
    """
    total = jax.tree.map(lambda x: x.sum(0), carry.total)
    examples = jnp.maximum(total.examples, 1)
    mean = jax.tree.map(lambda x: x / examples.astype(x.dtype), total.weighted)
    state, trainable = aggregator.finish(state, sent, mean, total.summed)
    # The variance by its two moments, both around what was sent, near which all clients are.
    variance = total.squares / examples - squared_distance(mean, sent.trainable)
    measured = {
        "loss": carry.loss.sum() / carry.samples.sum().astype(carry.loss.dtype),
        "client_distance": jnp.sqrt(jnp.maximum(variance, 0)),
        "layers": carry.layers.sum(),
    }
    return state, trainable, measured, fedca.join(total.dictionary)
