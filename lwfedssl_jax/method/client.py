"""Local training: what one client does with one batch.

Only the stage's trainable part is differentiated, optimised and averaged into the target.
The frozen part is run forward once, for both branches, because the target's frozen layers always
equal the online ones. What the encoder sees, and what is compared, depends on the objective (pretext.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from lwfedssl_jax import tree
from lwfedssl_jax.data.views import standardise
from lwfedssl_jax.method.depth_dropout import routes
from lwfedssl_jax.method.pretext import Seen, embed, pretext_of
from lwfedssl_jax.method.task import Broadcast, ClientState, Route, Task, weights_of
from lwfedssl_jax.method.terms import Local
from lwfedssl_jax.models.encoder import with_its_products
from lwfedssl_jax.tree import Tree


class ClientStart(NamedTuple):
    """How a client's state begins in a round.

    Attributes:
      begin: ``(task, broadcast, memory, round) -> state``; ``memory`` is None if only the state's shapes matter.
      empty_memory: what a client keeps between rounds before it first takes part, zeros on the host; None where
        clients keep nothing.
    """

    begin: Callable[[Task, Broadcast, Tree, jax.Array], ClientState]
    empty_memory: Tree = None


def client_init(task: Task, trainable: Tree) -> ClientState:
    """A client's state at the start of a round, from the trainable parameters of the broadcast."""
    target = {k: trainable[k] for k in ("encoder", "projection")} if task.objective.has_target else {}
    return ClientState(trainable, task.optimizer(task.hyper).init(weights_of(trainable)), target)


# The unchanged global model, with no state kept between rounds.
FROM_BROADCAST = ClientStart(lambda task, broadcast, memory, number: client_init(task, broadcast.trainable))


@with_its_products
def client_step(
    task: Task,
    state: ClientState,
    broadcast: Broadcast,
    images_BxHxWxC: jax.Array,
    mask_B: jax.Array,
    key: jax.Array,
    skipped_L: jax.Array | None = None,
) -> tuple[ClientState, jax.Array]:
    """Take one optimizer step on one batch, then update the target's moving average.

    Args:
      task: static, except for its numbers, which may be traced.
      state: the client's.
      broadcast: from the server; its frozen part is shared by all clients and both branches.
      images_BxHxWxC: uint8.
      mask_B: True for real samples, at least one.
      key: draws the views.
      skipped_L: which of the encoder's layers the step skips (depth dropout); None: none.

    Returns:
      The new state and the batch's loss.
    """
    chex.assert_shape(images_BxHxWxC, (len(mask_B), *task.image_shape))
    chex.assert_type([images_BxHxWxC, mask_B], [jnp.uint8, bool])
    pretext, (route, frozen_route) = pretext_of(task), routes(broadcast, skipped_L)
    seen = pretext.see(task, key, images_BxHxWxC)
    x = task.encoder.frozen_forward(broadcast.frozen, seen.x, *frozen_route)
    seen = seen._replace(x=jax.lax.stop_gradient(x))
    weights = weights_of(state.trainable)
    gradient = jax.value_and_grad(_loss, argnums=1, has_aux=True)
    (loss, statistics), grads = gradient(task, weights, state, broadcast, Step(seen, mask_B, route, key))
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, weights)
    updates, opt_state = task.optimizer(task.hyper).update(grads, state.opt_state, weights)
    updates = jax.tree.map(_keep_present, weights_of(broadcast.present), updates)
    weights = optax.apply_updates(weights, updates)
    target = tree.ema(state.target, {k: weights[k] for k in state.target}, task.hyper.momentum)
    return state._replace(trainable=weights | {"statistics": statistics}, opt_state=opt_state, target=target), loss


def _keep_present(present: jax.Array, update: jax.Array) -> jax.Array:
    """Keep idle rows as they are: they have no gradient, but weight decay would change them."""
    return jnp.where(present.reshape(-1, *[1] * (update.ndim - 1)) if present.ndim else present, update, 0)


class Step(NamedTuple):
    """The inputs to the loss of one step.

    Attributes:
      seen: of the batch, after the frozen layers.
      mask_B: True for real samples.
      route: which trainable layers run.
      key: of the step.
    """

    seen: Seen
    mask_B: jax.Array
    route: Route
    key: jax.Array


def _loss(task: Task, weights: Tree, state: ClientState, broadcast: Broadcast, step: Step) -> tuple[jax.Array, Tree]:
    seen, mask_B, route, key = step
    pretext, statistics = pretext_of(task), {"statistics": state.trainable["statistics"]}
    outputs, new_statistics = pretext.online(task, weights | statistics, seen, mask_B, route)
    target = pretext.online(task, state.target | statistics, seen, mask_B, route)[0] if state.target else None
    loss = pretext.loss(task, broadcast, outputs, target, seen, mask_B)
    received = weights_of(broadcast.trainable)

    def received_projection() -> jax.Array:
        return embed(task, received | statistics, seen.x, mask_B, route, ["projection"])[0][0]

    def project_images(model: Tree, images_PxHxWxC: jax.Array) -> jax.Array:
        plain = standardise(images_PxHxWxC, task.recipe).astype(task.dtype)
        real = jnp.ones(len(plain), bool)
        return embed(task, statistics | model, plain, real, route, ["projection"])[0][0][0]

    local = Local(
        weights=weights,
        received=received,
        present=weights_of(broadcast.present),
        projection=outputs.get("projection"),
        received_projection=received_projection,
        mask=mask_B,
        extras=broadcast.extras,
        project_images=project_images,
        key=key,
    )
    for term, weight in zip(task.terms, task.hyper.weights, strict=True):
        loss += weight * term(local)
    return loss, new_statistics
