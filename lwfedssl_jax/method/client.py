"""Local training: what one client does with one batch.

Only the stage's trainable part is differentiated, optimised and averaged into the target.
The frozen part is run forward once a view, for both branches: the target's frozen layers
equal the online ones at all times, an average of equals.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from lwfedssl_jax import tree
from lwfedssl_jax.data.views import standardise, two_views
from lwfedssl_jax.method.depth_dropout import routes
from lwfedssl_jax.method.task import Broadcast, ClientState, Route, Task, weights_of
from lwfedssl_jax.method.terms import Local
from lwfedssl_jax.system.seeds import PUBLIC_STREAM
from lwfedssl_jax.tree import Tree


def client_init(task: Task, trainable: Tree) -> ClientState:
    """State at the start of a round, from what the server sent."""
    target = {k: trainable[k] for k in ("encoder", "projection")} if task.objective.has_target else {}
    return ClientState(trainable, task.optimizer(task.hyper).init(weights_of(trainable)), target, jnp.zeros(()))


def client_step(
    task: Task, state: ClientState, sent: Broadcast, images_BxHxWxC: jax.Array, mask_B: jax.Array, key: jax.Array
) -> tuple[ClientState, jax.Array]:
    """One optimizer step on one batch, then the target's moving average.

    Args:
      task: static, but for its numbers, which may be traced.
      state: the client's.
      sent: what the server sent; its frozen part is shared by all clients and both branches.
      images_BxHxWxC: uint8.
      mask_B: True for real samples, at least one.
      key: draws the views.

    Returns:
      The new state and the batch's loss.
    """
    views = two_views(key, images_BxHxWxC, task.recipe, task.dtype)
    route, frozen_route = routes(task, sent, key)
    x = task.encoder.frozen_forward(sent.frozen, views.reshape(-1, *views.shape[2:]), *frozen_route)
    x = jax.lax.stop_gradient(x)
    weights = weights_of(state.trainable)
    gradient = jax.value_and_grad(_loss, argnums=1, has_aux=True)
    public = public_batch(task, sent, len(mask_B), key)
    (loss, statistics), grads = gradient(task, weights, state, sent, x, mask_B, route, public)
    updates, opt_state = task.optimizer(task.hyper).update(grads, state.opt_state, weights)
    updates = jax.tree.map(_keep_present, weights_of(sent.present), updates)
    weights = optax.apply_updates(weights, updates)
    target = tree.ema(state.target, {k: weights[k] for k in state.target}, task.hyper.momentum)
    return state._replace(trainable=weights | {"statistics": statistics}, opt_state=opt_state, target=target), loss


def public_batch(task: Task, sent: Broadcast, size: int, key: jax.Array) -> jax.Array | None:
    """At most ``size`` of the public images, drawn for a step without repeats and normalised: PxHxWxC."""
    if "public" not in sent.shared:
        return None
    images = sent.shared["public"]
    shape = (min(size, len(images)),)
    drawn = jax.random.choice(jax.random.fold_in(key, PUBLIC_STREAM), len(images), shape, replace=False)
    return standardise(images[drawn], task.recipe).astype(task.dtype)


def _keep_present(present: jax.Array, update: jax.Array) -> jax.Array:
    """Idle rows have no gradient, but weight decay would move them."""
    return jnp.where(present.reshape(-1, *[1] * (update.ndim - 1)) if present.ndim else present, update, 0)


def _loss(
    task: Task,
    weights: Tree,
    state: ClientState,
    sent: Broadcast,
    x: jax.Array,
    mask_B: jax.Array,
    route: Route,
    public: jax.Array | None,
) -> tuple[jax.Array, Tree]:
    statistics = {"statistics": state.trainable["statistics"]}
    outputs, new_statistics = embed(task, weights | statistics, x, mask_B, route, list(task.heads))
    projection, online = outputs[0], outputs[-1]

    def project(weights: Tree) -> jax.Array:
        return embed(task, weights | statistics, x, mask_B, route, ["projection"])[0][0]

    def project_public() -> tuple[jax.Array, jax.Array]:
        assert public is not None  # where the base term is, the server shares images
        real = jnp.ones(len(public), bool)
        models = weights | statistics, sent.shared["base"]
        z, goal = (embed(task, model, public, real, route, ["projection"])[0][0][0] for model in models)
        return z, goal

    goal = jax.lax.stop_gradient(project(state.target)) if state.target else online
    with_negatives = task.objective.loss_with_negatives
    if with_negatives and "dictionary" in sent.shared:
        negatives = sent.shared["dictionary"], sent.shared["filled"]
        loss = with_negatives(online, goal, mask_B, task.hyper.temperature, negatives)
    else:
        loss = task.objective.loss(online, goal, mask_B, task.hyper.temperature)
    received = weights_of(sent.trainable)
    local = Local(
        weights, received, weights_of(sent.present), projection, lambda: project(received), mask_B, project_public
    )
    for term, weight in zip(task.terms, task.hyper.weights, strict=True):
        loss += weight * term(local)
    return loss, new_statistics


def embed(
    task: Task, trainable: Tree, x: jax.Array, mask_B: jax.Array, route: Route, heads: Sequence[str]
) -> tuple[list[jax.Array], Tree]:
    """All views (one after the other in ``x``'s first axis) through encoder and heads.

    Returns:
      ``z_VxBxO`` after each head, each view with its own batch statistics there, and the
      encoder's running averages after this batch.
    """
    z_BxD, statistics = task.encoder.trainable_forward(trainable, x, mask_B, *route)
    z = z_BxD.reshape(-1, len(mask_B), task.encoder.feature_dim)
    outputs = []
    for name in heads:
        z = jax.vmap(task.heads[name].apply, in_axes=(None, 0, None))(trainable[name], z, mask_B)
        outputs.append(z)
    return outputs, statistics
