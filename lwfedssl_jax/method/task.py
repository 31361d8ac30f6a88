"""The static part of local training: all that it needs in addition to parameters and data, made from a config."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike, DTypeLike

from lwfedssl_jax.config import MODELS, Config, ConfigError, ModelConfig, choose
from lwfedssl_jax.data import sources
from lwfedssl_jax.data.views import RECIPES, Recipe
from lwfedssl_jax.method.objectives import OBJECTIVES, Objective, options_of
from lwfedssl_jax.method.terms import Term, terms_of
from lwfedssl_jax.models import ARCHITECTURES
from lwfedssl_jax.models.decoder import DecoderSize, decoder_head
from lwfedssl_jax.models.dense import PRODUCTS, factor_type
from lwfedssl_jax.models.encoder import EVERY_STAGE, Depth, Encoder
from lwfedssl_jax.models.heads import Head, mlp_head
from lwfedssl_jax.tree import Tree


class Mechanism(NamedTuple):
    """The numbers of differential privacy (``privacy.py``).

    Attributes:
      clip: the root mean square to which an update is clipped.
      noise: standard deviation of the noise on the sum of the updates, in the norm to which these are clipped.
      quantile: share of the updates that an adapted clip leaves as they are.
      count_noise: standard deviation of the noise on their count.
    """

    clip: ArrayLike
    noise: ArrayLike = 0.0
    quantile: ArrayLike = 0.0
    count_noise: ArrayLike = 0.0


class Hyper(NamedTuple):
    """Hyperparameters that programs take as arguments: runs that differ only in these share compiled programs.

    Attributes:
      learning_rate: as the optimizer uses it (``Config.learning_rate``).
      weights: of the terms of the loss, in ``Task.terms``'s order.
      weight_decay, temperature, momentum, depth_dropout: the config's.
      mechanism: the config's clip; its noise is known when the run is prepared.
    """

    learning_rate: ArrayLike
    weight_decay: ArrayLike
    temperature: ArrayLike
    momentum: ArrayLike
    depth_dropout: ArrayLike
    weights: tuple[ArrayLike, ...]
    mechanism: Mechanism


class Task(NamedTuple):
    """Everything that local training needs in addition to parameters and data; all except ``hyper`` is static.

    Parameters are ``{"encoder": F, "statistics": F's running averages, "projection": H, "prediction": Q}``,
    Q only if the objective has one, and ``"decoder"`` in place of both if the objective hides patches. ``options`` are
    the objective's.
    """

    encoder: Encoder
    heads: dict[str, Head]
    objective: Objective
    optimizer: Callable[[Hyper], optax.GradientTransformation]
    recipe: Recipe
    dtype: DTypeLike
    image_shape: tuple[int, int, int]
    layers: int
    drops_layers: Literal["", "step", "round"]
    terms: tuple[Term, ...]
    options: dict[str, float]
    vmap_on_cpu: bool
    hyper: Hyper


Route = tuple[Depth, jax.Array | None]  # how many layers run, and which (see Encoder)


class Broadcast(NamedTuple):
    """What the server sends for a stage; one copy serves all lanes.

    Attributes:
      trainable: the trainable parameters; rows of stacked leaves past the stage's are idle.
      present: for each of its leaves, which rows are not idle (``tree.present``).
      frozen: the encoder's frozen part and its statistics.
      depth, frozen_depth: how many trainable and frozen layers there are.
      droppable: how many of the first of these depth dropout may skip.
      extras: what it sends in addition to the model (``Exchange``); empty in plain federated averaging.
    """

    trainable: Tree
    present: Tree
    frozen: Tree
    depth: Depth
    frozen_depth: Depth
    droppable: Depth
    extras: Tree = {}  # noqa: RUF012  (a pytree without leaves, which nobody changes)


class ClientState(NamedTuple):
    """The state of a client within a round.

    Attributes:
      trainable: the trainable parameters.
      opt_state: the optimizer's state.
      target: an average of the trainable encoder part and projection head; empty without a target branch.
      kept: what a client keeps between rounds in addition to its model (``Memory``); empty for stateless clients.
    """

    trainable: Tree
    opt_state: optax.OptState
    target: Tree
    kept: Tree = ()


def make_task(config: Config) -> Task:
    """Make the task of a resolved config.

    Raises:
      ConfigError: unknown data set, recipe of views, model, objective or term of the loss.
    """
    source = sources.find(config.data)
    recipe = choose("data.views", config.data.views, {"auto": RECIPES[source.views], **RECIPES})
    dtype = factor_type(config.runtime.precision)
    image_shape = (config.data.image_size, config.data.image_size, source.channels)
    objective = choose("objective.name", config.objective.name, OBJECTIVES)
    encoder = make_encoder(config.model, image_shape, config.runtime.precision, remat=config.runtime.remat)
    terms = terms_of(config)
    options = options_of(config)
    return Task(
        encoder=encoder,
        heads=make_heads(config, objective, encoder, options, image_shape),
        objective=objective,
        optimizer=lambda hyper: optax.flatten(optax.adamw(hyper.learning_rate, weight_decay=hyper.weight_decay)),
        recipe=recipe,
        dtype=np.promote_types(dtype, jnp.float32),
        image_shape=image_shape,
        layers=config.model.depth,
        drops_layers=config.additions.depth_dropout_per if config.additions.depth_dropout else "",
        terms=tuple(term for term, _ in terms),
        options=options,
        vmap_on_cpu=config.cpu_lanes > 1,
        hyper=Hyper(
            learning_rate=config.learning_rate,
            weight_decay=config.optimizer.weight_decay,
            temperature=config.objective.temperature,
            momentum=config.objective.momentum,
            depth_dropout=config.additions.depth_dropout,
            weights=tuple(weight for _, weight in terms),
            mechanism=Mechanism(config.privacy.clip),
        ),
    )


def make_heads(
    config: Config, objective: Objective, encoder: Encoder, options: dict[str, float], image_shape: tuple[int, int, int]
) -> dict[str, Head]:
    """Make the heads that clients train and exchange in every stage: projection and prediction, or a decoder.

    Raises:
      ConfigError: a decoder's heads do not divide its width.
    """
    hidden, output = config.objective.hidden_dim, config.objective.output_dim
    dtype = factor_type(config.runtime.precision)
    if objective.hides_patches and encoder.patch_size:
        height, width, channels = image_shape
        numbers = encoder.patch_size**2
        size = DecoderSize(
            patches=height * width // numbers,
            numbers=numbers * channels,
            width=int(options["decoder_width"]) or encoder.feature_dim,
            depth=int(options["decoder_depth"]),
            heads=int(options["decoder_heads"]) or config.model.heads,
        )
        if size.width % size.heads:
            raise ConfigError(
                f"objective.options: decoder_heads={size.heads} does not divide the decoder's width {size.width}; "
                f"accepted: {', '.join(str(n) for n in range(1, size.width + 1) if size.width % n == 0)}"
            )
        return {"decoder": decoder_head(size, encoder.feature_dim, dtype, remat=config.runtime.remat)}
    heads = {"projection": mlp_head(3, encoder.feature_dim, hidden, output, dtype)}
    if objective.has_prediction:
        heads["prediction"] = mlp_head(2, output, hidden, output, dtype)
    return heads


def make_encoder(
    model: ModelConfig, image_shape: tuple[int, int, int], precision: str, *, remat: bool = False
) -> Encoder:
    """Make the named model by its entry in ``ARCHITECTURES``, for a ``runtime.precision``.

    Raises:
      ConfigError: there is no model with that name, or no such architecture.
    """
    size = choose("model.name", model.name, MODELS)
    make = choose(f"MODELS[{model.name!r}].architecture", size.architecture, ARCHITECTURES)
    encoder = make(model, image_shape, factor_type(precision), remat=remat)
    return encoder._replace(products=PRODUCTS.get(precision, "highest"))


def init_params(task: Task, key: jax.Array) -> Tree:
    """Initialise the parameters of all layers and heads."""
    keys = jax.random.split(key, 1 + len(task.heads))
    heads = {name: head.init(k) for k, (name, head) in zip(keys[1:], task.heads.items(), strict=True)}
    return task.encoder.init(keys[0]) | heads


def param_layers(task: Task, params: Tree) -> Tree:
    """Return the layer number of every parameter; heads are trained in every stage."""
    heads: Tree = {name: jax.tree.map(lambda _: np.array(EVERY_STAGE), params[name]) for name in task.heads}
    return task.encoder.layers(params) | heads


def weights_of(trainable: Tree) -> Tree:
    """Return the trainable parameters that get a gradient: all except the statistics."""
    return {k: v for k, v in trainable.items() if k != "statistics"}
