"""Traffic: bytes that clients download and upload, by the stages' shapes and as measured in a run."""

from typing import NamedTuple

import jax
import numpy as np

from lwfedssl_jax import tree
from lwfedssl_jax.config import Config
from lwfedssl_jax.costs.operations import StagePart, stage_parts
from lwfedssl_jax.method import fedca
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.tree import Tree

BYTES_PER_PARAMETER = 4


class TrafficAdditions(NamedTuple):
    """What additions transfer in addition to the parameters that a stage trains.

    Attributes:
      refreshes_frozen: whether frozen layers change in every round and all of them are downloaded: the server's
        calibration.
      dictionary: bytes of FedCA's dictionary that a client downloads and uploads per round.
      has_base: whether a client downloads FedCA's base model once, which is as large as the trained parameters.
    """

    refreshes_frozen: bool
    dictionary: tuple[int, int]
    has_base: bool


class StageBytes(NamedTuple):
    """Bytes of one client that takes part in all rounds of a stage.

    Attributes:
      download, upload: of a client that has the frozen layers, unless calibration changes them.
      worst_case: both directions, of a client that downloads all frozen layers in every round.
    """

    download: int
    upload: int
    worst_case: int


def traffic_additions(config: Config) -> TrafficAdditions:
    """Return what the additions of a (resolved) config transfer."""
    calibrated = bool(config.additions.calibration_steps)
    return TrafficAdditions(calibrated, fedca.dictionary_bytes(config), fedca.has_base(config))


def stage_bytes(config: Config, part: StagePart) -> StageBytes:
    """Compute the traffic of one client in a stage, from the shapes of its parameters."""
    additions, rounds = traffic_additions(config), part.stage.rounds
    trainable = BYTES_PER_PARAMETER * tree.size(part.trainable)
    exchanged, everything = rounds * trainable, rounds * (trainable + BYTES_PER_PARAMETER * tree.size(part.frozen))
    extra_download, upload = (rounds * n for n in additions.dictionary)
    extra_download += trainable * additions.has_base  # such a run has a single stage
    download = (everything if additions.refreshes_frozen else exchanged) + extra_download
    return StageBytes(download, exchanged + upload, everything + extra_download + exchanged + upload)


def client_bytes(config: Config) -> int:
    """Compute the bytes, both directions, of one client that takes part in all rounds of a (resolved) config."""
    stages = [stage_bytes(config, part) for part in stage_parts(config)]
    return sum(stage.download + stage.upload for stage in stages)


class Traffic:
    """The traffic of a run's clients by round; keeps track of the frozen layers that each client has.

    A drawn client downloads what the stage trains, and the frozen layers that it does not have: all of them when it
    joins, those finished since its last round when it returns, the last stage's when a stage begins. With calibration
    frozen layers change every round, and all are downloaded.

    Args:
      params: all parameters, or their shapes.
      layers: each parameter's layer number (``task.param_layers``).
      clients: N.
      additions: what is transferred in addition to the trained parameters.
    """

    def __init__(self, params: Tree, layers: Tree, clients: int, additions: TrafficAdditions) -> None:
        self._layers = np.concatenate([np.ravel(n) for n in jax.tree.leaves(layers)])
        sizes = zip(jax.tree.leaves(params), jax.tree.leaves(layers), strict=True)
        self._bytes = np.concatenate(
            [np.full(n.size, np.prod(x.shape, dtype=np.int64) * x.dtype.itemsize // n.size) for x, n in sizes]
        )
        self._known_layers = np.zeros(clients, np.int32)  # leading layers that a client has in their final form
        self._has_base = np.full(clients, not additions.has_base)
        self._additions = additions

    def exchanged(self, stage: Stage) -> int:
        """Return the bytes that a client trains, and so downloads and uploads in every round."""
        trainable = np.concatenate([np.ravel(m) for m in jax.tree.leaves(stage.trainable)])
        return int(self._bytes[trainable].sum())

    def upload(self, stage: Stage) -> int:
        """Return the bytes that a client uploads in a round."""
        return self.exchanged(stage) + self._additions.dictionary[1]

    def download(self, stage: Stage, cohort: list[int]) -> int:
        """Return the bytes that a round's drawn clients download together, and record that they have them."""
        known = self._known_layers[cohort]
        known = np.zeros_like(known) if self._additions.refreshes_frozen else known
        self._known_layers[cohort] = stage.frozen_depth
        missing = np.array([self._frozen_bytes(stage, first) for first in range(stage.frozen_depth + 1)])
        models = len(cohort) + int((~self._has_base[cohort]).sum())
        self._has_base[cohort] = True
        frozen = int(missing[np.minimum(known, stage.frozen_depth)].sum())
        return models * self.exchanged(stage) + frozen + len(cohort) * self._additions.dictionary[0]

    def _frozen_bytes(self, stage: Stage, after: int) -> int:
        return int(self._bytes[(self._layers > after) & (self._layers <= stage.frozen_depth)].sum())


def make_traffic(config: Config, params: Tree, layers: Tree, clients: int) -> Traffic:
    """Make the traffic of a (resolved) config's run; see ``Traffic`` for the arguments."""
    return Traffic(params, layers, clients, traffic_additions(config))
