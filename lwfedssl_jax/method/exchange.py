"""What clients and the server exchange in addition to models; in plain federated averaging, nothing."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from lwfedssl_jax.method.task import Broadcast, Task
from lwfedssl_jax.tree import Tree


class Batch(NamedTuple):
    """One batch of a client.

    Attributes:
      images_BxHxWxC: uint8.
      mask_B: True for real samples, at least one.
      key: of the step.
    """

    images_BxHxWxC: jax.Array
    mask_B: jax.Array
    key: jax.Array


class Exchange(NamedTuple):
    """An additional exchange between clients and server, as sums over clients.

    Attributes:
      start: ``() -> state``, on the host, before a stage's first round; a dict that is part of ``Broadcast.extras``.
      for_cohort: ``cohort -> extras`` that a round's broadcast has because of who was drawn, on the host.
      shapes: ``(trainable, images) -> extras``, shapes of all of ``Broadcast.extras``, from those of the stage's
        trainable part and the number of the server's images.
      nothing: ``broadcast -> upload`` of an unfinished client, zeros.
      upload: ``(task, broadcast, trained, last batch, client, is_finished) -> upload``, which is summed over clients.
      finish: ``sum of uploads -> state``.
    """

    start: Callable[[], Tree]
    for_cohort: Callable[[list[int]], Tree]
    shapes: Callable[[Tree, int], Tree]
    nothing: Callable[[Broadcast], Tree]
    upload: Callable[[Task, Broadcast, Tree, Batch, jax.Array, jax.Array], Tree]
    finish: Callable[[Tree], Tree]


MODELS_ONLY = Exchange(
    start=dict,
    for_cohort=lambda cohort: {},
    shapes=lambda trainable, images: {},
    nothing=lambda broadcast: {},
    upload=lambda task, broadcast, trained, batch, client, is_finished: {},
    finish=lambda uploaded: {},
)
