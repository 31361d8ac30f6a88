"""The round: lanes of clients under ``vmap``, and the weighted average.

A call runs a number of steps of the plan in all lanes; results stream into per-lane sums,
so memory grows with the lanes, not with the cohort.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lwfedssl_jax import tree
from lwfedssl_jax.client import ClientState, Task, client_init, client_step
from lwfedssl_jax.packing import Plan
from lwfedssl_jax.tree import Tree


class Carry(NamedTuple):
    """What a round hands from call to call; every leaf has a leading lane axis W.

    Attributes:
      client: state of the client each lane is training.
      total: ``sum of n_i * trainable_i`` over the lane's finished clients.
      loss, samples: loss summed over real samples, and their number.
    """

    client: ClientState
    total: Tree
    loss: jax.Array
    samples: jax.Array


def start_round(task: Task, trainable: Tree, lanes: int) -> Carry:
    """An empty round from the global model's trainable part."""
    client = client_init(task, trainable)
    wide = lambda x: jnp.broadcast_to(x, (lanes, *x.shape))  # noqa: E731
    zeros = jax.tree.map(lambda x: jnp.zeros((lanes, *x.shape), x.dtype), trainable)
    return Carry(jax.tree.map(wide, client), zeros, jnp.zeros(lanes, jnp.float32), jnp.zeros(lanes, jnp.int32))


def run_steps(
    task: Task,
    carry: Carry,
    frozen: Tree,
    trainable: Tree,
    images_NxHxWxC: jax.Array,
    plan: Plan,
    steps: jax.Array,
    round_key: jax.Array,
) -> Carry:
    """Run the first ``steps`` steps of ``plan`` in every lane.

    Args:
      task: static.
      carry: from ``start_round`` or the call before; may be donated.
      frozen, trainable: the global model's parts, one copy for all lanes.
      images_NxHxWxC: all training images, uint8.
      plan: C steps; of these ``steps`` are run, so calls of any length share a program.
      round_key: ``fold_in(seed, round)``; client and step are folded in here.
    """
    batch = jnp.arange(plan.examples.shape[-1])

    def lane_step(lane: Carry, row: Plan) -> Carry:
        state = tree.where(row.step == 0, client_init(task, trainable), lane.client)
        key = jax.random.fold_in(jax.random.fold_in(round_key, row.client), row.step)
        images_BxHxWxC = images_NxHxWxC[row.examples]
        state, loss = client_step(task, state, frozen, images_BxHxWxC, batch < row.real, key)
        # `where`, not a product with 0: an unfinished client's NaN must not reach the sum.
        add = jax.tree.map(lambda s, x: s + row.weight.astype(x.dtype) * x, lane.total, state.trainable)
        samples = jnp.where(row.busy, row.real, 0)
        return Carry(
            state,
            tree.where(row.weight > 0, add, lane.total),
            lane.loss + jnp.where(samples > 0, loss.astype(jnp.float32) * samples.astype(jnp.float32), 0),
            lane.samples + samples,
        )

    def body(c: jax.Array, carry: Carry) -> Carry:
        return jax.vmap(lane_step)(carry, jax.tree.map(lambda x: x[c], plan))

    return jax.lax.fori_loop(0, steps, body, carry)


def finish_round(carry: Carry, examples: jax.Array) -> tuple[Tree, jax.Array]:
    """The weighted average ``sum of n_i * trainable_i / sum of n_i``, and the mean loss of a sample.

    Args:
      carry: after all calls.
      examples: ``sum of n_i`` over the clients that reported, above 0.
    """
    average = jax.tree.map(lambda x: x.sum(0) / examples.astype(x.dtype), carry.total)
    return average, carry.loss.sum() / carry.samples.sum().astype(carry.loss.dtype)
