"""FedCA's two modules (Zhang et al., 2020, arXiv 2010.08982): a dictionary of embeddings, and a base model.

Clients upload embeddings computed by their trained models, and the next round's clients use all of them as
additional negatives (``additions.dictionary``). The server trains a base model on public images before the first
round, and local models are aligned with its projections of these images (the term ``base``). ``Broadcast.extras`` has

* ``dictionary`` MxO, normalised, ``filled`` M, and ``cohort`` K, the round's clients in order: M = K * the
  embeddings of each, and a client's slot is its place in ``cohort``;
* ``base``, the base model's trainable part, and ``public`` NxHxWxC uint8.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.data.views import two_views
from lwfedssl_jax.method import terms
from lwfedssl_jax.method.client import embed
from lwfedssl_jax.method.exchange import MODELS_ONLY, Batch, Exchange
from lwfedssl_jax.method.objectives import OBJECTIVES, unit_norm
from lwfedssl_jax.method.stages import stage_depths
from lwfedssl_jax.method.task import Broadcast, Task
from lwfedssl_jax.models.encoder import with_its_products
from lwfedssl_jax.tree import Tree

NOBODY = 2**31 - 1  # pads a cohort; larger than any client's number


def check_fedca(config: Config) -> None:
    """Refuse settings of FedCA that cannot work or would have no effect.

    Raises:
      ConfigError: a dictionary with an objective without negatives, or larger than a batch; a base term without
        a single stage, steps for the base model or images on the server; such steps without the term.
    """
    count, objective, steps = config.additions.dictionary, config.objective.name, config.additions.base_steps
    having = [name for name, o in OBJECTIVES.items() if o.loss_with_negatives]
    if count and objective not in having:
        raise ConfigError(
            f"additions.dictionary: {count} embeddings would be negatives, but objective.name {objective} uses none; "
            f"accepted: 0, or objective.name {' or '.join(having)}"
        )
    if count > config.optimizer.batch_size:
        raise ConfigError(
            f"additions.dictionary: {count} is more than a batch holds; "
            f"accepted: 0 to optimizer.batch_size {config.optimizer.batch_size}"
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
    """Return the bytes of the dictionary that a client downloads and uploads per round, in float32 with all slots."""
    upload = config.additions.dictionary * config.objective.output_dim * 4
    return config.cohort_size * upload, upload


def make_exchange(config: Config, task: Task) -> Exchange:
    """Return FedCA's exchange, or an empty one if the config has neither a dictionary nor a base model."""
    per_client = config.additions.dictionary
    if not (per_client or has_base(config)):
        return MODELS_ONLY
    shapes = functools.partial(extras_shapes, config, task)
    if not per_client:
        return MODELS_ONLY._replace(shapes=shapes)
    return Exchange(
        start=functools.partial(empty_dictionary, config, task),
        for_cohort=functools.partial(cohort_slots, config),
        shapes=shapes,
        nothing=no_upload,
        upload=upload_last_batch,
        finish=join_uploads,
    )


def empty_dictionary(config: Config, task: Task) -> dict[str, np.ndarray]:
    """Make the dictionary before a stage's first round."""
    slots = config.cohort_size * config.additions.dictionary
    embeddings = np.zeros((slots, config.objective.output_dim), task.dtype)
    return {"dictionary": embeddings, "filled": np.zeros(slots, bool)}


def cohort_slots(config: Config, cohort: list[int]) -> dict[str, np.ndarray]:
    """Return ``cohort`` K: a round's clients, in order, padded to the largest cohort."""
    missing = config.cohort_size - len(cohort)
    return {"cohort": np.pad(np.array(cohort, np.int32), (0, missing), constant_values=NOBODY)}


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
        for name, x in (empty_dictionary(config, task) | cohort_slots(config, [])).items():
            extras[name] = jax.ShapeDtypeStruct(x.shape, x.dtype)
    if has_base(config):
        extras |= {"base": trainable, "public": jax.ShapeDtypeStruct((images, *task.image_shape), jnp.uint8)}
    return extras


def no_upload(broadcast: Broadcast) -> Tree:
    """Return what an unfinished client adds to the dictionary: zeros."""
    extras = broadcast.extras
    return {"dictionary": jnp.zeros_like(extras["dictionary"]), "filled": jnp.zeros_like(extras["filled"], jnp.int32)}


@with_its_products
def upload_last_batch(
    task: Task, broadcast: Broadcast, trained: Tree, batch: Batch, client: jax.Array, is_finished: jax.Array
) -> Tree:
    """Compute what a client adds to the dictionary: normalised projections of the first samples of its last batch.

    Args:
      task: static.
      broadcast: from the server.
      trained: the client's trainable part after its step.
      batch: of the step; the first view is embedded, as the step saw it, and by all layers.
      client: its number.
      is_finished: whether this was the client's last step; before it nothing is added.
    """
    cohort_K = broadcast.extras["cohort"]

    def finished() -> Tree:
        view = two_views(batch.key, batch.images_BxHxWxC, task.recipe, task.dtype)[0]
        x = task.encoder.frozen_forward(broadcast.frozen, view, broadcast.frozen_depth, None)
        projections, _ = embed(task, trained, x, batch.mask_B, (broadcast.depth, None), ["projection"])
        nothing = no_upload(broadcast)
        count = len(nothing["filled"]) // len(cohort_K)
        real = batch.mask_B[:count]
        z = jnp.where(real[:, None], unit_norm(projections[0][0, :count]), 0)
        at = jnp.searchsorted(cohort_K, client) * count + jnp.arange(count)
        added = {"dictionary": z.astype(task.dtype), "filled": real.astype(jnp.int32)}
        return {name: x.at[at].set(added[name]) for name, x in nothing.items()}

    # Only last steps need this forward pass; lanes under ``vmap`` run it in every step.
    return jax.lax.cond(is_finished, finished, functools.partial(no_upload, broadcast))


def join_uploads(uploaded: Tree) -> Tree:
    """Make the dictionary from the sum of the clients' uploads."""
    return {"dictionary": uploaded["dictionary"], "filled": uploaded["filled"] > 0}
