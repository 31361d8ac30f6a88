"""Local training: what one client does with one batch.

Only the stage's trainable part is differentiated, optimised and averaged into the target.
The frozen part is run forward once a view, for both branches: the target's frozen layers
equal the online ones at all times, an average of equals.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from lwfedssl_jax import tree
from lwfedssl_jax.augment import RECIPES, Recipe, two_views
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import sources
from lwfedssl_jax.models.heads import Head, mlp_head
from lwfedssl_jax.models.vit import EVERY_STAGE, Depth, Encoder, vit
from lwfedssl_jax.objectives import OBJECTIVES, Objective
from lwfedssl_jax.tree import Tree


class Task(NamedTuple):
    """Everything static that local training needs; parameters are
    ``{"encoder": F, "projection": H, "prediction": Q}``, Q only where the objective has it.
    """

    encoder: Encoder
    heads: dict[str, Head]
    objective: Objective
    temperature: float
    momentum: float
    optimizer: optax.GradientTransformation
    recipe: Recipe
    dtype: DTypeLike
    image_shape: tuple[int, int, int]
    feature_dim: int


class Sent(NamedTuple):
    """What the server sends for a stage; one copy serves all lanes.

    Attributes:
      trainable: the trainable parameters; rows of stacked leaves past the stage's are idle.
      present: for each of its leaves, which rows are not idle (``tree.present``).
      frozen: the encoder's frozen part.
      depth, frozen_depth: how many trainable and frozen layers there are.
    """

    trainable: Tree
    present: Tree
    frozen: Tree
    depth: Depth
    frozen_depth: Depth


class ClientState(NamedTuple):
    """A client within a round: trainable parameters, optimizer state, target branch.

    ``target`` is an average of the trainable encoder part and projection head, and empty for
    objectives without a target branch.
    """

    trainable: Tree
    opt_state: optax.OptState
    target: Tree


def make_task(config: Config) -> Task:
    """The task of a resolved config.

    Raises:
      ConfigError: unknown data set.
    """
    source = sources.find(config.data)
    recipe_name = source.views if config.data.views == "auto" else config.data.views
    dtype = jnp.dtype(config.runtime.precision)
    image_shape = (config.data.image_size, config.data.image_size, source.channels)
    objective = OBJECTIVES[config.objective.name]
    hidden, output = config.objective.hidden_dim, config.objective.output_dim
    heads = {"projection": mlp_head(3, config.model.width, hidden, output, dtype)}
    if objective.has_prediction:
        heads["prediction"] = mlp_head(2, output, hidden, output, dtype)
    return Task(
        encoder=vit(config.model, image_shape, dtype, remat=config.runtime.remat),
        heads=heads,
        objective=objective,
        temperature=config.objective.temperature,
        momentum=config.objective.momentum,
        optimizer=optax.adamw(config.learning_rate, weight_decay=config.optimizer.weight_decay),
        recipe=RECIPES[recipe_name],
        dtype=np.promote_types(dtype, jnp.float32),
        image_shape=image_shape,
        feature_dim=config.model.width,
    )


def init_params(task: Task, key: jax.Array) -> Tree:
    """Fresh parameters of all layers and heads."""
    keys = jax.random.split(key, 1 + len(task.heads))
    heads = {name: head.init(k) for k, (name, head) in zip(keys[1:], task.heads.items(), strict=True)}
    return {"encoder": task.encoder.init(keys[0]), **heads}


def param_layers(task: Task, params: Tree) -> Tree:
    """Layer number of every parameter; heads are trained in every stage."""
    heads = {name: params[name] for name in task.heads}
    return {
        "encoder": task.encoder.layers(params["encoder"]),
        **jax.tree.map(lambda _: np.array(EVERY_STAGE), heads),
    }


def client_init(task: Task, trainable: Tree) -> ClientState:
    """State at the start of a round, from what the server sent."""
    target = {k: trainable[k] for k in ("encoder", "projection")} if task.objective.has_target else {}
    return ClientState(trainable, task.optimizer.init(trainable), target)


def client_step(
    task: Task, state: ClientState, sent: Sent, images_BxHxWxC: jax.Array, mask_B: jax.Array, key: jax.Array
) -> tuple[ClientState, jax.Array]:
    """One optimizer step on one batch, then the target's moving average.

    Args:
      task: static.
      state: the client's.
      sent: what the server sent; its frozen part is shared by all clients and both branches.
      images_BxHxWxC: uint8.
      mask_B: True for real samples, at least one.
      key: draws the views.

    Returns:
      The new state and the batch's loss.
    """
    views = two_views(key, images_BxHxWxC, task.recipe, task.dtype)
    x = task.encoder.frozen_forward(sent.frozen, views.reshape(-1, *views.shape[2:]), sent.frozen_depth)
    x = jax.lax.stop_gradient(x)
    loss, grads = jax.value_and_grad(_loss, argnums=1)(task, state.trainable, state.target, x, mask_B, sent.depth)
    updates, opt_state = task.optimizer.update(grads, state.opt_state, state.trainable)
    updates = jax.tree.map(_keep_present, sent.present, updates)
    trainable = optax.apply_updates(state.trainable, updates)
    target = tree.ema(state.target, {k: trainable[k] for k in state.target}, task.momentum)
    return ClientState(trainable, opt_state, target), loss


def _keep_present(present: jax.Array, update: jax.Array) -> jax.Array:
    """Idle rows have no gradient, but weight decay would move them."""
    return jnp.where(present.reshape(-1, *[1] * (update.ndim - 1)) if present.ndim else present, update, 0)


def _loss(task: Task, trainable: Tree, target: Tree, x: jax.Array, mask_B: jax.Array, depth: Depth) -> jax.Array:
    online = embed(task, trainable, x, mask_B, depth, list(task.heads))
    goal = jax.lax.stop_gradient(embed(task, target, x, mask_B, depth, ["projection"])) if target else online
    return task.objective.loss(online, goal, mask_B, task.temperature)


def embed(
    task: Task, trainable: Tree, x: jax.Array, mask_B: jax.Array, depth: Depth, heads: Sequence[str]
) -> jax.Array:
    """All views (one after the other in ``x``'s first axis) through encoder and heads: ``z_VxBxO``.

    Each view has its own batch statistics in the heads.
    """
    z_BxD = task.encoder.trainable_forward(trainable["encoder"], x, depth)
    z_VxBxD = z_BxD.reshape(-1, len(mask_B), task.feature_dim)

    def apply_heads(z_BxD: jax.Array) -> jax.Array:
        for name in heads:
            z_BxD = task.heads[name].apply(trainable[name], z_BxD, mask_B)
        return z_BxD

    return jax.vmap(apply_heads)(z_VxBxD)
