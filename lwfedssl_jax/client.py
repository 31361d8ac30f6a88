"""Local training: what one client does with one batch.

Only the stage's trainable part is differentiated, optimised and averaged into the target.
The frozen part is run forward once a view, for both branches: the target's frozen layers
equal the online ones at all times, an average of equals.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from lwfedssl_jax import tree
from lwfedssl_jax.additions import PUBLIC_STREAM, Local, Term, kept_layers, terms_of
from lwfedssl_jax.augment import RECIPES, Recipe, normalise, two_views
from lwfedssl_jax.config import MODELS, Config, EvaluationConfig, FleetConfig, ModelConfig, VitSize, choose, override
from lwfedssl_jax.data import sources
from lwfedssl_jax.models.encoder import EVERY_STAGE, Depth, Encoder
from lwfedssl_jax.models.heads import Head, mlp_head
from lwfedssl_jax.models.resnet import resnet
from lwfedssl_jax.models.vit import vit
from lwfedssl_jax.objectives import OBJECTIVES, Objective
from lwfedssl_jax.tree import Tree


class Hyper(NamedTuple):
    """Numbers of a config that programs take as arguments: runs that differ in these alone share what is compiled.

    Attributes:
      learning_rate: as the optimizer runs at (``Config.learning_rate``).
      weights: of the terms of the loss, in ``Task.terms``'s order.
      weight_decay, temperature, momentum, depth_dropout: the config's.
    """

    learning_rate: ArrayLike
    weight_decay: ArrayLike
    temperature: ArrayLike
    momentum: ArrayLike
    depth_dropout: ArrayLike
    weights: tuple[ArrayLike, ...]


class Task(NamedTuple):
    """Everything that local training needs besides parameters and data; all but ``hyper`` is static.

    Parameters are ``{"encoder": F, "statistics": F's running averages, "projection": H, "prediction": Q}``,
    Q only where the objective has it.
    """

    encoder: Encoder
    heads: dict[str, Head]
    objective: Objective
    optimizer: Callable[[Hyper], optax.GradientTransformation]
    recipe: Recipe
    dtype: DTypeLike
    image_shape: tuple[int, int, int]
    layers: int
    drops_layers: bool
    terms: tuple[Term, ...]
    divergence: float
    vmap_on_cpu: bool
    hyper: Hyper


Route = tuple[Depth, jax.Array | None]  # how many layers run, and which (see Encoder)


class Sent(NamedTuple):
    """What the server sends for a stage; one copy serves all lanes.

    Attributes:
      trainable: the trainable parameters; rows of stacked leaves past the stage's are idle.
      present: for each of its leaves, which rows are not idle (``tree.present``).
      frozen: the encoder's frozen part and its statistics.
      depth, frozen_depth: how many trainable and frozen layers there are.
      droppable: how many of all these, the first ones, depth dropout may skip.
      shared: what FedCA sends besides (fedca.py); empty without it.
    """

    trainable: Tree
    present: Tree
    frozen: Tree
    depth: Depth
    frozen_depth: Depth
    droppable: Depth
    shared: Tree = {}  # noqa: RUF012  (a pytree without leaves, which nobody changes)


class ClientState(NamedTuple):
    """A client within a round: trainable parameters, optimizer state, target branch.

    ``target`` is an average of the trainable encoder part and projection head, and empty for
    objectives without a target branch. ``scale`` is FedEMA's (starts.py).
    """

    trainable: Tree
    opt_state: optax.OptState
    target: Tree
    scale: jax.Array


# Fields that programs take as arguments, or never see: batches, cohorts and judgements are the host's.
FREE_FIELDS = (
    "partition.kind",
    "partition.beta",
    "partition.shards_per_client",
    "partition.allow_empty",
    "partition.examples_per_client",
    "partition.size_sigma",
    "objective.temperature",
    "objective.momentum",
    "federation.dropout",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "runtime.seed",
    "runtime.trackers",
)


def program_config(config: Config) -> Config:
    """A stand-in for all configs that run by the same programs: they differ in ``FREE_FIELDS``, in how they are
    judged, in their fleet, and in the weights of terms and the rate of depth dropout where these are not 0.
    """
    named = (text.partition("=") for text in config.additions.terms)
    free: dict[str, Any] = {name: operator.attrgetter(name)(Config()) for name in FREE_FIELDS}
    free["additions.terms"] = tuple(f"{name}=1" for name, _, weight in named if float(weight))
    free["additions.depth_dropout"] = 0.5 if config.additions.depth_dropout else 0.0
    return dataclasses.replace(override(config, free), evaluation=EvaluationConfig(), fleet=FleetConfig())


def priced_config(config: Config) -> Config:
    """``program_config`` with the rate of depth dropout: all configs with one ledger."""
    return override(program_config(config), {"additions.depth_dropout": config.additions.depth_dropout})


def make_task(config: Config) -> Task:
    """The task of a resolved config.

    Raises:
      ConfigError: unknown data set, objective or term of the loss.
    """
    source = sources.find(config.data)
    recipe_name = source.views if config.data.views == "auto" else config.data.views
    dtype = jnp.dtype(config.runtime.precision)
    image_shape = (config.data.image_size, config.data.image_size, source.channels)
    objective = choose("objective.name", config.objective.name, OBJECTIVES)
    hidden, output = config.objective.hidden_dim, config.objective.output_dim
    encoder = make_encoder(config.model, image_shape, dtype, remat=config.runtime.remat)
    terms = terms_of(config)
    heads = {"projection": mlp_head(3, encoder.feature_dim, hidden, output, dtype)}
    if objective.has_prediction:
        heads["prediction"] = mlp_head(2, output, hidden, output, dtype)
    return Task(
        encoder=encoder,
        heads=heads,
        objective=objective,
        optimizer=lambda hyper: optax.adamw(hyper.learning_rate, weight_decay=hyper.weight_decay),
        recipe=RECIPES[recipe_name],
        dtype=np.promote_types(dtype, jnp.float32),
        image_shape=image_shape,
        layers=config.model.depth,
        drops_layers=bool(config.additions.depth_dropout),
        terms=tuple(term for term, _ in terms),
        divergence=config.federation.divergence,
        vmap_on_cpu=config.cpu_lanes > 1,
        hyper=Hyper(
            learning_rate=config.learning_rate,
            weight_decay=config.optimizer.weight_decay,
            temperature=config.objective.temperature,
            momentum=config.objective.momentum,
            depth_dropout=config.additions.depth_dropout,
            weights=tuple(weight for _, weight in terms),
        ),
    )


def make_encoder(
    model: ModelConfig, image_shape: tuple[int, int, int], dtype: DTypeLike, *, remat: bool = False
) -> Encoder:
    """The named model, see ``vit`` and ``resnet``."""
    make = vit if isinstance(MODELS[model.name], VitSize) else resnet
    return make(model, image_shape, dtype, remat=remat)


def init_params(task: Task, key: jax.Array) -> Tree:
    """Fresh parameters of all layers and heads."""
    keys = jax.random.split(key, 1 + len(task.heads))
    heads = {name: head.init(k) for k, (name, head) in zip(keys[1:], task.heads.items(), strict=True)}
    return task.encoder.init(keys[0]) | heads


def param_layers(task: Task, params: Tree) -> Tree:
    """Layer number of every parameter; heads are trained in every stage."""
    heads: Tree = {name: jax.tree.map(lambda _: np.array(EVERY_STAGE), params[name]) for name in task.heads}
    return task.encoder.layers(params) | heads


def weights_of(trainable: Tree) -> Tree:
    """What of the trainable parameters gets a gradient: all but the statistics."""
    return {k: v for k, v in trainable.items() if k != "statistics"}


def client_init(task: Task, trainable: Tree) -> ClientState:
    """State at the start of a round, from what the server sent."""
    target = {k: trainable[k] for k in ("encoder", "projection")} if task.objective.has_target else {}
    return ClientState(trainable, task.optimizer(task.hyper).init(weights_of(trainable)), target, jnp.zeros(()))


def client_step(
    task: Task, state: ClientState, sent: Sent, images_BxHxWxC: jax.Array, mask_B: jax.Array, key: jax.Array
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


def routes(task: Task, sent: Sent, key: jax.Array) -> tuple[Route, Route]:
    """Which trainable and which frozen layers a step runs: all, or those that depth dropout keeps."""
    if not task.drops_layers:
        return (sent.depth, None), (sent.frozen_depth, None)
    kept = functools.partial(kept_layers, key, task.hyper.depth_dropout, sent.droppable, layers=task.layers)
    order, count = kept(sent.frozen_depth, sent.depth)
    frozen_order, frozen_count = kept(0, sent.frozen_depth)
    return (count, order), (frozen_count, frozen_order)


def public_batch(task: Task, sent: Sent, size: int, key: jax.Array) -> jax.Array | None:
    """At most ``size`` of the public images, drawn for a step without repeats and normalised: PxHxWxC."""
    if "public" not in sent.shared:
        return None
    images = sent.shared["public"]
    shape = (min(size, len(images)),)
    drawn = jax.random.choice(jax.random.fold_in(key, PUBLIC_STREAM), len(images), shape, replace=False)
    return normalise(images[drawn], task.recipe).astype(task.dtype)


def _keep_present(present: jax.Array, update: jax.Array) -> jax.Array:
    """Idle rows have no gradient, but weight decay would move them."""
    return jnp.where(present.reshape(-1, *[1] * (update.ndim - 1)) if present.ndim else present, update, 0)


def _loss(
    task: Task,
    weights: Tree,
    state: ClientState,
    sent: Sent,
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
