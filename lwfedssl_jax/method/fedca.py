"""FedCA's two modules (Zhang et al., 2020, arXiv 2010.08982): a dictionary of embeddings, and a base model.

Clients upload embeddings of up to ``additions.dictionary`` of their images, computed by their trained models in one
more pass over these, and the next round's clients use all of them as additional negatives. The server trains a base
model on public images before the first round, and local models are aligned with its projections of these images (the
term ``base``). ``Broadcast.extras`` has

* ``dictionary`` MxO, normalised, and ``filled`` M, False for empty slots: M = K * ``additions.dictionary``, and a
  client's slots are at its place among the round's clients;
* ``base``, the base model's trainable part, and ``public`` NxHxWxC uint8.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.data.views import two_views
from lwfedssl_jax.method import terms
from lwfedssl_jax.method.exchange import MODELS_ONLY, Exchange
from lwfedssl_jax.method.objectives import OBJECTIVES, unit_norm
from lwfedssl_jax.method.pretext import embed
from lwfedssl_jax.method.stages import stage_depths
from lwfedssl_jax.method.task import Broadcast, Route, Task
from lwfedssl_jax.models.encoder import with_its_products
from lwfedssl_jax.tree import Tree


def check_fedca(config: Config) -> None:
    """Refuse settings of FedCA that cannot work or would have no effect.

    Raises:
      ConfigError: a dictionary with an objective without negatives; a base term without a single stage, steps for
        the base model or images on the server; such steps without the term.
    """
    count, objective, steps = config.additions.dictionary, config.objective.name, config.additions.base_steps
    if count and config.federation.sampling != "fixed":
        raise ConfigError(
            f"additions.dictionary: {count} embeddings need slots for each client, and with federation.sampling "
            f"{config.federation.sampling} there may be any number of them; accepted: 0, or federation.sampling fixed"
        )
    having = [name for name, o in OBJECTIVES.items() if o.loss_with_negatives]
    if count and objective not in having:
        raise ConfigError(
            f"additions.dictionary: {count} embeddings would be negatives, but objective.name {objective} uses none; "
            f"accepted: 0, or objective.name {' or '.join(having)}"
        )
    if not has_base(config):
        if steps:
            raise ConfigError(
                f"additions.base_steps: {steps} steps would train a base model that no term uses; "
                "accepted: 0, or base=WEIGHT in additions.terms"
            )
        return
    if len(stage_depths(config)) > 1:
        raise ConfigError(
            f"additions.terms: base aligns whole models and needs a single stage, found strategy.name "
            f"{config.strategy.name}; accepted: no base, or strategy.name end_to_end"
        )
    if not steps:
        raise ConfigError(
            "additions.base_steps: 0 steps cannot train the model that the term base of additions.terms needs; "
            "accepted: at least 1, or no base"
        )
    if not config.partition.server_share:
        raise ConfigError(
            f"partition.server_share: {config.partition.server_share} leaves no public images for the term base of "
            "additions.terms; accepted: above 0, or no base"
        )


def has_base(config: Config) -> bool:
    """Return whether clients are aligned with a base model."""
    return any(term is terms.base for term, _ in terms.terms_of(config))


def dictionary_bytes(config: Config) -> tuple[int, int]:
    """Return the bytes of a whole dictionary that a client downloads and uploads per round, in float32."""
    upload = config.additions.dictionary * config.objective.output_dim * 4
    return config.cohort_size * upload, upload


def make_exchange(config: Config, task: Task) -> Exchange:
    """Return FedCA's exchange, or an empty one if the config has neither a dictionary nor a base model."""
    if not (config.additions.dictionary or has_base(config)):
        return MODELS_ONLY
    return Exchange(
        start=functools.partial(empty_dictionary, config, task),
        shapes=functools.partial(extras_shapes, config, task),
        embeddings=config.additions.dictionary,
    )


def empty_dictionary(config: Config, task: Task) -> dict[str, np.ndarray]:
    """Make the dictionary before a stage's first round: empty, with N slots for each of the round's K clients."""
    if not config.additions.dictionary:
        return {}
    slots = config.cohort_size * config.additions.dictionary
    embeddings = np.zeros((slots, config.objective.output_dim), task.dtype)
    return {"dictionary": embeddings, "filled": np.zeros(slots, bool)}


def extras_shapes(config: Config, task: Task, trainable: Tree, images: int) -> Tree:
    """Shapes of ``Broadcast.extras``.

    Args:
      config: resolved.
      task: of this config.
      trainable: shapes of the stage's trainable part.
      images: number of public images.
    """
    extras: Tree = {}
    if config.additions.dictionary:
        for name, x in empty_dictionary(config, task).items():
            extras[name] = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if has_base(config):
        extras |= {"base": trainable, "public": jax.ShapeDtypeStruct((images, *task.image_shape), jnp.uint8)}
    return extras


@with_its_products
def embed_images(
    task: Task,
    broadcast: Broadcast,
    trained: Tree,
    images_BxHxWxC: jax.Array,
    mask_B: jax.Array,
    key: jax.Array,
    routes: tuple[Route, Route],
) -> jax.Array:
    """Compute a client's embeddings of some of its images for the dictionary, BxO: normalised projections.

    Args:
      task: static.
      broadcast: from the server.
      trained: the client's trainable part after its training.
      images_BxHxWxC: uint8; one view of each is embedded.
      mask_B: True for real images.
      key: draws the views.
      routes: the trainable and the frozen layers that the client has.
    """
    view = two_views(key, images_BxHxWxC, task.recipe, task.dtype)[0]
    route, frozen_route = routes
    x = task.encoder.frozen_forward(broadcast.frozen, view, *frozen_route)
    projections, _ = embed(task, trained, x, mask_B, route, ["projection"])
    return unit_norm(projections[0][0]).astype(task.dtype)
