"""What clients really fetch and send: joiners and returners need more than the layer that is being trained."""

import jax
import numpy as np

from lwfedssl_jax.config import Config
from lwfedssl_jax.method import fedca
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.tree import Tree


class Traffic:
    """Bytes that cross the network in a round; knows which finished layers each client has already.

    A drawn client fetches what the stage trains, and the frozen layers it lacks: all of them when it
    joins, those finished since its last round when it returns, the last stage's when a stage begins.
    Where the server calibrates, frozen layers change every round, and all are fetched.

    Args:
      params: all parameters, or their shapes.
      layers: each parameter's layer number (``client.param_layers``).
      clients: N.
      calibrated: whether the server changes frozen layers.
      dictionary: bytes of FedCA's dictionary that a client fetches and sends in a round.
      base: whether a client fetches FedCA's base model, as large as what is trained, when it joins.
    """

    def __init__(
        self, params: Tree, layers: Tree, clients: int, *, calibrated: bool, dictionary: tuple[int, int], base: bool
    ) -> None:
        self._layers = np.concatenate([np.ravel(n) for n in jax.tree.leaves(layers)])
        sizes = zip(jax.tree.leaves(params), jax.tree.leaves(layers), strict=True)
        self._bytes = np.concatenate(
            [np.full(n.size, np.prod(x.shape, dtype=np.int64) * x.dtype.itemsize // n.size) for x, n in sizes]
        )
        self._has = np.zeros(clients, np.int32)  # leading layers that a client holds in their final form
        self._has_base = np.full(clients, not base)
        self._calibrated, self._dictionary = calibrated, dictionary

    def exchanged(self, stage: Stage) -> int:
        """Bytes of what a client trains, fetched and sent in every round."""
        trainable = np.concatenate([np.ravel(m) for m in jax.tree.leaves(stage.trainable)])
        return int(self._bytes[trainable].sum())

    def upload(self, stage: Stage) -> int:
        """Bytes that a client sends in a round."""
        return self.exchanged(stage) + self._dictionary[1]

    def download(self, stage: Stage, cohort: list[int]) -> int:
        """Bytes that a round's drawn clients fetch together; they then have all frozen layers and the base model."""
        has = np.zeros(len(cohort), np.int32) if self._calibrated else self._has[cohort]
        self._has[cohort] = stage.frozen_depth
        upto = np.array([self._frozen_bytes(stage, first) for first in range(stage.frozen_depth + 1)])
        trained = len(cohort) + int((~self._has_base[cohort]).sum())
        self._has_base[cohort] = True
        frozen = int(upto[np.minimum(has, stage.frozen_depth)].sum())
        return trained * self.exchanged(stage) + frozen + len(cohort) * self._dictionary[0]

    def _frozen_bytes(self, stage: Stage, after: int) -> int:
        return int(self._bytes[(self._layers > after) & (self._layers <= stage.frozen_depth)].sum())


def make_traffic(config: Config, params: Tree, layers: Tree, clients: int) -> Traffic:
    """The traffic of a (resolved) config's run."""
    return Traffic(
        params,
        layers,
        clients,
        calibrated=bool(config.additions.calibration_steps),
        dictionary=fedca.dictionary_bytes(config),
        base=fedca.has_base(config),
    )
