"""FedCA's two modules (Zhang et al., 2020, arXiv 2010.08982): a dictionary of embeddings, and a base model.

Clients upload embeddings that their trained models make, and the next round's clients have all of them as
further negatives (``additions.dictionary``). A base model, which the server trains on public images before the
first round, pulls local models to its projections of these (the term ``base``). ``Sent.shared`` has

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
from lwfedssl_jax.method.objectives import OBJECTIVES, unit_norm
from lwfedssl_jax.method.stages import stage_depths
from lwfedssl_jax.method.task import Broadcast, Task
from lwfedssl_jax.tree import Tree

NOBODY = 2**31 - 1  # fills a cohort up; larger than any client's number


def check(config: Config) -> None:
    """Refuse what cannot be had, or would do nothing.

    Raises:
      ConfigError: a dictionary without an objective that has negatives, or of more than a batch; a base term without
        a single stage, steps for the base model or images of the server; such steps without the term.
    """
    count, objective, steps = config.additions.dictionary, config.objective.name, config.additions.base_steps
    having = [name for name, o in OBJECTIVES.items() if o.loss_with_negatives]
    if count and objective not in having:
        raise ConfigError(
            f"additions.dictionary: {count} embeddings would be negatives, and objective.name {objective} has none; "
            f"accepted: 0, or objective.name {' or '.join(having)}"
        )
    if count > config.optimizer.batch_size:
        raise ConfigError(
            f"additions.dictionary: {count} is more than a client's last batch has; "
            f"accepted: 0 to optimizer.batch_size {config.optimizer.batch_size}"
        )
    if not has_base(config):
        if steps:
            raise ConfigError(
                f"additions.base_steps: {steps} steps would train a base model that nothing uses; "
                "accepted: 0, or base=WEIGHT in additions.terms"
            )
        return
    if len(stage_depths(config)) > 1:
        raise ConfigError(
            f"additions.terms: base has whole models to align and needs a single stage, found strategy.name "
            f"{config.strategy.name}; accepted: no base, or strategy.name end_to_end"
        )
    if not steps:
        raise ConfigError(
            "additions.base_steps: 0 steps leave the term base of additions.terms without a trained model; "
            "accepted: at least 1, or no base"
        )
    if not config.partition.server_share:
        raise ConfigError(
            f"partition.server_share: {config.partition.server_share} leaves no public images to the term base of "
            "additions.terms; accepted: above 0, or no base"
        )


def has_base(config: Config) -> bool:
    """Whether clients are pulled to a base model."""
    return any(term is terms.base for term, _ in terms.terms_of(config))


def dictionary_bytes(config: Config) -> tuple[int, int]:
    """What of the dictionary a client downloads and uploads in a round, float32, all slots counted."""
    upload = config.additions.dictionary * config.objective.output_dim * 4
    return config.cohort_size * upload, upload


def empty(config: Config, task: Task) -> dict[str, np.ndarray]:
    """The dictionary before a stage's first round."""
    slots = config.cohort_size * config.additions.dictionary
    if not slots:
        return {}
    embeddings = np.zeros((slots, config.objective.output_dim), task.dtype)
    return {"dictionary": embeddings, "filled": np.zeros(slots, bool)}


def padded(config: Config, cohort: list[int]) -> np.ndarray:
    """``cohort`` K: a round's clients, in order."""
    return np.pad(np.array(cohort, np.int32), (0, config.cohort_size - len(cohort)), constant_values=NOBODY)


def shapes(config: Config, task: Task, trainable: Tree, images: int) -> Tree:
    """Shapes of ``Sent.shared``.

    Args:
      config: resolved.
      task: of it.
      trainable: shapes of the stage's trainable part.
      images: how many public ones there are.
    """
    shared: Tree = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in empty(config, task).items()}
    if shared:
        shared["cohort"] = jax.ShapeDtypeStruct((config.cohort_size,), jnp.int32)
    if has_base(config):
        shared |= {"base": trainable, "public": jax.ShapeDtypeStruct((images, *task.image_shape), jnp.uint8)}
    return shared


def no_upload(sent: Broadcast) -> Tree:
    """What clients that have not finished add to the dictionary; empty without one."""
    if "dictionary" not in sent.shared:
        return {}
    slots = jnp.zeros_like(sent.shared["filled"], jnp.int32)
    return {"dictionary": jnp.zeros_like(sent.shared["dictionary"]), "filled": slots}


def upload(
    task: Task,
    sent: Broadcast,
    trained: Tree,
    images_BxHxWxC: jax.Array,
    mask_B: jax.Array,
    key: jax.Array,
    client: jax.Array,
    weight: jax.Array,
) -> Tree:
    """What a client adds to the dictionary: normalised projections of the first samples of its last batch.

    Args:
      task: static.
      sent: what the server sent.
      trained: what the client made of its trainable part.
      images_BxHxWxC, mask_B, key: of the step; the first view is embedded, as the step saw it, and by all layers.
      client: its number.
      weight: above 0 at the client's last step; before it nothing is added.
    """
    if "dictionary" not in sent.shared:
        return {}
    cohort_K = sent.shared["cohort"]

    def finished() -> Tree:
        view = two_views(key, images_BxHxWxC, task.recipe, task.dtype)[0]
        x = task.encoder.frozen_forward(sent.frozen, view, sent.frozen_depth, None)
        projections, _ = embed(task, trained, x, mask_B, (sent.depth, None), ["projection"])
        nothing = no_upload(sent)
        count = len(nothing["filled"]) // len(cohort_K)
        real = mask_B[:count]
        z = jnp.where(real[:, None], unit_norm(projections[0][0, :count]), 0)
        at = jnp.searchsorted(cohort_K, client) * count + jnp.arange(count)
        added = {"dictionary": z.astype(task.dtype), "filled": real.astype(jnp.int32)}
        return {name: x.at[at].set(added[name]) for name, x in nothing.items()}

    # A pass forward that only last steps need; lanes under ``vmap`` run it in every step.
    return jax.lax.cond(weight > 0, finished, functools.partial(no_upload, sent))


def join(uploaded: Tree) -> Tree:
    """The dictionary from the sum of what clients added."""
    return uploaded and {"dictionary": uploaded["dictionary"], "filled": uploaded["filled"] > 0}
