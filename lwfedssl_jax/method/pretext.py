"""What an objective lets the encoder see, and what its loss compares: two views, or an image with hidden patches.

This is the seam between an objective and local training: ``PRETEXTS`` has one entry for either, and the rest of the
package asks ``pretext_of``.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.data.views import two_views
from lwfedssl_jax.method.objectives import OBJECTIVES
from lwfedssl_jax.method.task import Broadcast, Route, Task
from lwfedssl_jax.method.terms import TERMS
from lwfedssl_jax.models.encoder import Patches, with_its_products
from lwfedssl_jax.models.vit import patches_of
from lwfedssl_jax.system import seeds
from lwfedssl_jax.tree import Tree


class Seen(NamedTuple):
    """What a step sees of a batch.

    Attributes:
      x: the encoder's input, all views of the batch one after the other; then what the frozen layers make of it.
      goal: what predictions are compared with and made from in addition, by the pretext; None for two views.
    """

    x: Tree
    goal: "HiddenPatches | None"


class HiddenPatches(NamedTuple):
    """Of an image with hidden patches: BxPxF, the numbers to predict; BxP, which are hidden; BxV, which are not."""

    patches: jax.Array
    hidden: jax.Array
    visible: jax.Array


# The outputs of the online branch by head, and the encoder's running averages after the batch.
Outputs = tuple[dict[str, jax.Array], Tree]


class Pretext(NamedTuple):
    """How a step of an objective goes.

    Attributes:
      see: ``(task, key, images_BxHxWxC) -> Seen``.
      online: ``(task, trainable, seen, mask_B, route) -> Outputs``, from what the frozen layers made of ``seen.x``.
      loss: ``(task, broadcast, outputs by head, those of the target branch or None, seen, mask_B) -> scalar``.
    """

    see: Callable[[Task, jax.Array, jax.Array], Seen]
    online: Callable[[Task, Tree, Seen, jax.Array, Route], Outputs]
    loss: Callable[[Task, Broadcast, dict[str, jax.Array], dict[str, jax.Array] | None, Seen, jax.Array], jax.Array]


def pretext_of(task: Task) -> Pretext:
    """Return how a step of the task's objective goes."""
    return PRETEXTS[task.objective.hides_patches]


def see_views(task: Task, key: jax.Array, images_BxHxWxC: jax.Array) -> Seen:
    """See two views of each image."""
    views = two_views(key, images_BxHxWxC, task.recipe, task.dtype)
    return Seen(views.reshape(-1, *views.shape[2:]), None)


def embed_views(task: Task, trainable: Tree, seen: Seen, mask_B: jax.Array, route: Route) -> Outputs:
    """Embed all views by the encoder and all heads that ``trainable`` has."""
    names = [name for name in task.heads if name in trainable]
    outputs, statistics = embed(task, trainable, seen.x, mask_B, route, names)
    return dict(zip(names, outputs, strict=True)), statistics


@with_its_products
def embed(
    task: Task, trainable: Tree, x: jax.Array, mask_B: jax.Array, route: Route, heads: Sequence[str]
) -> tuple[list[jax.Array], Tree]:
    """Pass all views (one after the other in ``x``'s first axis) through encoder and heads.

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


def compare_views(
    task: Task,
    broadcast: Broadcast,
    online: dict[str, jax.Array],
    target: dict[str, jax.Array] | None,
    seen: Seen,
    mask_B: jax.Array,
) -> jax.Array:
    """Compute the objective, with additional negatives if the server has sent a dictionary of them."""
    del seen
    last_2xBxD = online[list(task.heads)[-1]]
    goal_2xBxD = jax.lax.stop_gradient(target["projection"]) if target else last_2xBxD
    chex.assert_equal_shape([last_2xBxD, goal_2xBxD])
    extras, with_negatives = broadcast.extras, task.objective.loss_with_negatives
    if with_negatives and "dictionary" in extras:
        negatives = extras["dictionary"], extras["filled"]
        return with_negatives(last_2xBxD, goal_2xBxD, mask_B, task.hyper.temperature, negatives, **task.options)
    return task.objective.loss(last_2xBxD, goal_2xBxD, mask_B, task.hyper.temperature, **task.options)


def visible_patches(patches: int, mask_ratio: float) -> int:
    """Return how many of an image's patches are visible: at least one, and not all."""
    return min(max(round(patches * (1 - mask_ratio)), 1), patches - 1)


def see_some_patches(task: Task, key: jax.Array, images_BxHxWxC: jax.Array) -> Seen:
    """See a random choice of the patches of the first view of each image."""
    view = two_views(key, images_BxHxWxC, task.recipe, task.dtype)[0]
    patches_BxPxF = patches_of(view, task.encoder.patch_size)
    b, p, _ = patches_BxPxF.shape
    count = visible_patches(p, task.options["mask_ratio"])
    mask_key = jax.random.fold_in(key, seeds.StepTag.HIDDEN_PATCHES)

    def choose(i: jax.Array) -> jax.Array:  # by sample, so that a padded batch hides what the unpadded one does
        return jnp.sort(jax.random.permutation(jax.random.fold_in(mask_key, i), p)[:count])

    visible_BxV = jax.vmap(choose)(jnp.arange(b))
    hidden_BxP = jnp.ones((b, p), bool).at[jnp.arange(b)[:, None], visible_BxV].set(False)
    values = jnp.take_along_axis(patches_BxPxF, visible_BxV[:, :, None], axis=1)
    goal = patches_BxPxF
    if task.options["normalised_pixels"]:
        goal = (goal - goal.mean(-1, keepdims=True)) * jax.lax.rsqrt(goal.var(-1, keepdims=True) + 1e-6)
    return Seen(Patches(values, visible_BxV), HiddenPatches(goal, hidden_BxP, visible_BxV))


@with_its_products
def decode(task: Task, trainable: Tree, seen: Seen, mask_B: jax.Array, route: Route) -> Outputs:
    """Predict the numbers of all patches from the tokens of those that are visible."""
    assert task.encoder.trainable_tokens
    assert seen.goal
    tokens, statistics = task.encoder.trainable_tokens(trainable, seen.x, mask_B, *route)
    return {"decoder": task.heads["decoder"].apply(trainable["decoder"], tokens, seen.goal.visible)}, statistics


def compare_patches(
    task: Task,
    broadcast: Broadcast,
    online: dict[str, jax.Array],
    target: dict[str, jax.Array] | None,
    seen: Seen,
    mask_B: jax.Array,
) -> jax.Array:
    """Compute the objective on hidden patches."""
    del broadcast, target
    assert seen.goal
    return task.objective.loss(online["decoder"], seen.goal.patches, seen.goal.hidden, mask_B)


# By ``Objective.hides_patches``.
PRETEXTS = {
    False: Pretext(see_views, embed_views, compare_views),
    True: Pretext(see_some_patches, decode, compare_patches),
}


def check_pretext(config: Config, task: Task) -> None:
    """Refuse an objective that hides patches where there are none to hide, or an addition that needs embeddings.

    Raises:
      ConfigError: the model has no patches, or one for the whole image; a term compares projections.
    """
    if not task.objective.hides_patches:
        return
    name, embedding = config.objective.name, [n for n, o in OBJECTIVES.items() if not o.hides_patches]
    if not task.encoder.patch_size:
        raise ConfigError(
            f"objective.name: {name} hides patches, which model.name {config.model.name} does not have; accepted: "
            f"{', '.join(embedding)}, or a vit"
        )
    height, width, _ = task.image_shape
    if height * width == task.encoder.patch_size**2:
        raise ConfigError(
            f"model.patch_size: {task.encoder.patch_size} makes one patch of an image, and objective.name {name} hides "
            "some of several; accepted: a smaller one"
        )
    compares = [name for name, term in TERMS.items() if term in task.terms and name in ("alignment", "base")]
    if compares:
        raise ConfigError(
            f"additions.terms: {compares[0]} compares projections, which objective.name {name} does not have; "
            f"accepted: other terms, or objective.name {' or '.join(embedding)}"
        )
