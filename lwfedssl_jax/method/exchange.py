"""What clients and the server exchange in addition to models; in plain federated averaging, nothing."""

from collections.abc import Callable
from typing import NamedTuple

from lwfedssl_jax.tree import Tree


class Exchange(NamedTuple):
    """An additional exchange between clients and server.

    Attributes:
      start: ``() -> state``, on the host, before a stage's first round; a dict that is part of ``Broadcast.extras``.
      shapes: ``(trainable, images) -> extras``, shapes of all of ``Broadcast.extras``, from those of the stage's
        trainable part and the number of the server's images.
      embeddings: of how many of its images each client uploads the embeddings, by its trained model; 0: of none.
    """

    start: Callable[[], Tree]
    shapes: Callable[[Tree, int], Tree]
    embeddings: int


MODELS_ONLY = Exchange(start=dict, shapes=lambda trainable, images: {}, embeddings=0)
