"""Traffic: bytes that clients download and upload, by the stages' shapes and as measured in a run."""

from collections.abc import Collection
from typing import NamedTuple

import jax
import numpy as np

from lwfedssl_jax import tree
from lwfedssl_jax.config import Config
from lwfedssl_jax.costs.operations import StagePart, stage_parts
from lwfedssl_jax.method import fedca
from lwfedssl_jax.method.compression import SECURE_SUM, upload_bytes
from lwfedssl_jax.method.depth_dropout import PER_ROUND
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.task import weights_of
from lwfedssl_jax.tree import Tree

BYTES_PER_PARAMETER = 4


class TrafficAdditions(NamedTuple):
    """What additions transfer in addition to the parameters that a stage trains.

    Attributes:
      refreshes_frozen: whether frozen layers change in every round and all of them are downloaded: the server's
        calibration.
      dictionary: bytes of FedCA's dictionary that a client downloads and uploads per round.
      has_base: whether a client downloads FedCA's base model once, which is as large as the trained parameters.
      compression: of uploads (``compression.upload_bytes``).
    """

    refreshes_frozen: bool
    dictionary: tuple[int, int]
    has_base: bool
    compression: str = "none"


class StageBytes(NamedTuple):
    """Bytes of one client that takes part in all rounds of a stage.

    Attributes:
      download, upload: of a client that has the frozen layers, unless calibration changes them.
      worst_case: both directions, of a client that downloads all frozen layers that it holds in every round.
      frozen: of all frozen layers, once; 0 if calibration changes them.
    """

    download: int
    upload: int
    worst_case: int
    frozen: int


def traffic_additions(config: Config) -> TrafficAdditions:
    """Return what the additions of a (resolved) config transfer."""
    calibrated = bool(config.additions.calibration_steps)
    bits = config.privacy.secure_sum_bits
    compression = f"{SECURE_SUM}{bits}" if bits else config.federation.compression
    return TrafficAdditions(calibrated, fedca.dictionary_bytes(config), fedca.has_base(config), compression)


def stage_bytes(config: Config, part: StagePart) -> StageBytes:
    """Compute the traffic of one client in a stage, from the shapes of its parameters; with depth dropout, its mean."""
    additions, rounds = traffic_additions(config), part.stage.rounds
    trainable, frozen = (BYTES_PER_PARAMETER * (tree.size(x) - skipped_size(config, part, x)) for x in part[1:])
    exchanged, everything = round(rounds * trainable), round(rounds * (trainable + frozen))
    extra_download, upload = (rounds * n for n in additions.dictionary)
    extra_download += round(trainable) * additions.has_base  # such a run has a single stage
    sent = exchanged if additions.compression == "none" else rounds * compressed_bytes(config, part)
    download = (everything if additions.refreshes_frozen else exchanged) + extra_download
    once = 0 if additions.refreshes_frozen else BYTES_PER_PARAMETER * tree.size(part.frozen)
    return StageBytes(download, sent + upload, everything + extra_download + sent + upload, once)


def compressed_bytes(config: Config, part: StagePart) -> int:
    """Return the bytes that a client uploads in a round of a stage; running averages are not compressed."""
    weights = weights_of(part.trainable)
    masks = jax.tree.leaves(weights_of(part.stage.trainable))
    shapes = jax.tree.leaves(weights, is_leaf=lambda x: x is None)
    matrices = [
        int(np.prod(x.shape)) // rows
        for mask, x in zip(masks, shapes, strict=True)
        if (rows := int(np.sum(mask)))
        for _ in range(rows)
    ]
    whole = BYTES_PER_PARAMETER * (tree.size(part.trainable) - tree.size(weights))
    return whole + upload_bytes(traffic_additions(config).compression, matrices)


def skipped_size(config: Config, part: StagePart, params: Tree) -> float:
    """Return how many of a stage's trainable or frozen parameters a client does without on average: depth dropout."""
    if config.additions.depth_dropout_per != PER_ROUND:
        return 0
    is_frozen = params is part.frozen
    mask, stage = part.stage.frozen if is_frozen else part.stage.trainable, part.stage
    droppable = min(stage.trained_before, stage.frozen_depth)
    droppable = droppable if is_frozen else stage.trained_before - droppable
    rows = stage.frozen_depth if is_frozen else stage.trainable_depth
    leaves = zip(jax.tree.leaves(mask), jax.tree.leaves(params, is_leaf=lambda x: x is None), strict=True)
    stacked = sum(tree.size(x) for m, x in leaves if np.ndim(m) and x is not None)
    return config.additions.depth_dropout * droppable * stacked / max(rows, 1)


def client_bytes(config: Config) -> int:
    """Compute the bytes, both directions, of one client that takes part in all rounds of a (resolved) config."""
    stages = [stage_bytes(config, part) for part in stage_parts(config)]
    return sum(stage.download + stage.upload for stage in stages)


class Traffic:
    """The traffic of a run's clients by round; keeps track of the frozen layers that each client has.

    A drawn client downloads what the stage trains, and the frozen layers that it does not have: all of them when it
    joins, those finished since its last round when it returns, the last stage's when a stage begins. With calibration
    frozen layers change every round, and all are downloaded. Layers that depth dropout takes from a client for a round
    are neither downloaded nor uploaded.

    Args:
      params: all parameters, or their shapes.
      layers: each parameter's layer number (``task.param_layers``).
      clients: N.
      additions: what is transferred in addition to the trained parameters.
    """

    def __init__(self, params: Tree, layers: Tree, clients: int, additions: TrafficAdditions) -> None:
        numbers = jax.tree.leaves(layers)
        each = zip(jax.tree.leaves(params), numbers, strict=True)
        self._row_bytes = np.concatenate(
            [np.full(n.size, np.prod(x.shape, dtype=np.int64) * x.dtype.itemsize // n.size) for x, n in each]
        )
        paths = jax.tree.leaves_with_path(layers)
        self._is_weight = np.repeat(["statistics" not in jax.tree_util.keystr(path) for path, _ in paths],
                                    [n.size for n in numbers])  # fmt: skip
        # A layer is two parts: what is stacked with other layers, which depth dropout can skip, and the rest.
        part_of_row = np.concatenate([2 * np.ravel(n) + (n.ndim > 0) for n in numbers])
        self._layer_of_part = np.arange(max(0, *part_of_row) // 2 * 2 + 2) // 2
        of_layers = part_of_row >= 2
        self._part_bytes = np.bincount(
            part_of_row[of_layers], self._row_bytes[of_layers], len(self._layer_of_part)
        ).astype(np.int64)
        self._has = np.zeros((clients, len(self._layer_of_part)), bool)  # parts that a client has in their final form
        self._has_base = np.full(clients, not additions.has_base)
        self._additions = additions

    def exchanged(self, stage: Stage) -> int:
        """Return the bytes that a client trains, and so downloads and uploads in every round, if it skips no layer."""
        trainable = np.concatenate([np.ravel(m) for m in jax.tree.leaves(stage.trainable)])
        return int(self._row_bytes[trainable].sum())

    def upload(self, stage: Stage, clients: list[int], held: np.ndarray | None = None) -> int:
        """Return the bytes that the round's reporting clients upload together; ``held`` is as for ``download``."""
        if self._additions.compression != "none":
            return len(clients) * self._compressed(stage)
        return len(clients) * self.exchanged(stage) - int(self._skipped(stage, self._holds(clients, held)).sum())

    def _compressed(self, stage: Stage) -> int:
        """The bytes that a client uploads in a round of a stage; running averages are not compressed."""
        trained = np.concatenate([np.ravel(m) for m in jax.tree.leaves(stage.trainable)])
        rows, is_weight = self._row_bytes[trained] // BYTES_PER_PARAMETER, self._is_weight[trained]
        return upload_bytes(self._additions.compression, rows[is_weight].tolist()) + BYTES_PER_PARAMETER * int(
            rows[~is_weight].sum()
        )

    def download(self, stage: Stage, clients: list[int], held: np.ndarray | None = None) -> int:
        """Return the bytes that a round's drawn clients download together, and record that they have them.

        Args:
          stage: that the round is in.
          clients: K, their numbers.
          held: KxL, which layers each holds in this round; None: all.
        """
        holds = self._holds(clients, held)
        frozen = (self._layer_of_part > 0) & (self._layer_of_part <= stage.frozen_depth)
        self._has[:, ~frozen] = False
        has = np.zeros_like(holds) if self._additions.refreshes_frozen else self._has[clients]
        missing = holds & ~has & frozen
        self._has[clients] |= missing
        models = len(clients) + int((~self._has_base[clients]).sum())
        self._has_base[clients] = True
        skipped = int(self._skipped(stage, holds).sum())
        return models * self.exchanged(stage) - skipped + int((missing @ self._part_bytes).sum())

    def round_bytes(self, stage: Stage, missing_layers: Collection[int]) -> tuple[int, int]:
        """Return the bytes that a client down- and uploads in a round; ``missing_layers``: frozen ones, by number."""
        layers = self._part_bytes[np.isin(self._layer_of_part, list(missing_layers))].sum()
        return self.exchanged(stage) + int(layers), self.upload(stage, [0])

    def _holds(self, clients: list[int], held: np.ndarray | None) -> np.ndarray:
        """Which parts clients hold, one row each."""
        holds = np.ones((len(clients), len(self._layer_of_part)), bool)
        if held is not None:
            holds[:, 3::2] = held
        return holds

    def _skipped(self, stage: Stage, holds: np.ndarray) -> np.ndarray:
        """The bytes of each client's trainable layers that it does without."""
        trained = (self._layer_of_part > stage.frozen_depth) & (self._layer_of_part <= stage.depth)
        return (~holds & trained) @ self._part_bytes


def make_traffic(config: Config, params: Tree, layers: Tree, clients: int) -> Traffic:
    """Make the traffic of a (resolved) config's run; see ``Traffic`` for the arguments."""
    return Traffic(params, layers, clients, traffic_additions(config))
