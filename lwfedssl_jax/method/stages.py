"""Strategies as lists of stages: which layers exist, which are trained, for how many rounds."""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from lwfedssl_jax import tree
from lwfedssl_jax.config import Config, ConfigError, choose
from lwfedssl_jax.models.encoder import EVERY_STAGE
from lwfedssl_jax.tree import Tree


class Stage(NamedTuple):
    """A stage: consecutive rounds in which the same layers exist and the same are trained (arXiv 2401.11647).

    Attributes:
      number: 1..S.
      first_round: how many rounds of the run come before this stage.
      rounds: rounds of this stage.
      depth: layers L1..L_depth exist.
      frozen_depth: of these, L1..L_frozen_depth are frozen.
      trained_before: of these, L1..L_trained_before have been trained in earlier stages; depth dropout may skip them.
      trainable: mask (see tree.py): receives gradients, is averaged and exchanged.
      frozen: mask: exists, but is only run forward.
      rows: positions of the trainable leaves, with one shape for as many stages as can share a program.
    """

    number: int
    first_round: int
    rounds: int
    depth: int
    frozen_depth: int
    trained_before: int
    trainable: Tree
    frozen: Tree
    rows: Tree

    @property
    def last_round(self) -> int:
        """Number of this stage's last round; a run's rounds begin with 1."""
        return self.first_round + self.rounds

    @property
    def trainable_depth(self) -> int:
        """Number of layers that are trained."""
        return self.depth - self.frozen_depth

    @property
    def depths(self) -> tuple[np.int32, np.int32, np.int32]:
        """Numbers of trained, frozen and droppable layers."""
        return np.int32(self.trainable_depth), np.int32(self.frozen_depth), np.int32(self.trained_before)


# A strategy: ``(L, layers_per_stage) -> (frozen_depth, depth) of each stage``, both from 0 to L.
Strategy = Callable[[int, int], list[tuple[int, int]]]

STRATEGIES: dict[str, Strategy] = {
    "end_to_end": lambda layers, k: [(0, layers)],
    "layerwise": lambda layers, k: [(first, min(first + k, layers)) for first in range(0, layers, k)],
    "progressive": lambda layers, k: [(0, min(first + k, layers)) for first in range(0, layers, k)],
}


def stage_depths(config: Config) -> list[tuple[int, int]]:
    """Return ``(frozen_depth, depth)`` of each stage of the config's strategy.

    Raises:
      ConfigError: no such strategy, more stages than rounds, or stages that do not grow to the whole encoder.
    """
    depths = choose("strategy.name", config.strategy.name, STRATEGIES)(
        config.model.depth, config.strategy.layers_per_stage
    )
    last = [0, *[depth for _, depth in depths]]
    in_order = all(a <= b for a, b in itertools.pairwise(last)) and last[-1] == config.model.depth
    if not in_order or not all(0 <= frozen < depth for frozen, depth in depths):
        raise ConfigError(
            f"strategy.name: {config.strategy.name} gives stages {depths}; accepted: (frozen_depth, depth) with "
            f"0 <= frozen_depth < depth, depths that never fall and end with model.depth {config.model.depth}"
        )
    if len(depths) > config.federation.rounds:
        raise ConfigError(
            f"federation.rounds: {config.federation.rounds} rounds are fewer than the {len(depths)} stages; "
            f"accepted: at least {len(depths)}, or a larger strategy.layers_per_stage"
        )
    return depths


def make_stages(config: Config, layers: Tree) -> list[Stage]:
    """Make the stages of the config's strategy.

    Args:
      config: a resolved config.
      layers: each parameter's layer number (``Encoder.layers``), heads included.

    Raises:
      ConfigError: see ``stage_depths``; a parameter's layer number is not among 1..L.
    """
    depths = stage_depths(config)
    _check_layers(layers, config.model.depth)
    rounds_S = spread(config.federation.rounds, len(depths))
    longest = max(last - frozen for frozen, last in depths)
    stages = []
    for s, (frozen_depth, last) in enumerate(depths):
        frozen, trainable = freeze(layers, frozen_depth, last)
        rows = tree.rows(trainable, longest)
        before = depths[s - 1][1] if s else 0
        first_round = sum(rounds_S[:s])
        stages.append(Stage(s + 1, first_round, rounds_S[s], last, frozen_depth, before, trainable, frozen, rows))
    return stages


def freeze(layers: Tree, frozen_depth: int, depth: int) -> tuple[Tree, Tree]:
    """Return masks of the frozen and of the trainable parameters if L1..L_depth exist.

    A negative layer number marks parameters that exist only while L_depth is the last layer.
    """
    every = EVERY_STAGE
    frozen = jax.tree.map(lambda n: (n > 0) & (n <= frozen_depth), layers)
    trainable = jax.tree.map(lambda n: (n == every) | (n == -depth) | ((frozen_depth < n) & (n <= depth)), layers)
    return frozen, trainable


def spread(rounds: int, stages: int) -> list[int]:
    """Spread ``rounds`` over ``stages`` as evenly as possible; earlier stages take the remainder."""
    return [rounds // stages + (s < rounds % stages) for s in range(stages)]


def _check_layers(layers: Tree, depth: int) -> None:
    for path, numbers in jax.tree.leaves_with_path(layers):
        if not np.all(np.isin(numbers, np.arange(-depth, depth + 1))):
            raise ConfigError(
                f"model: parameter {jax.tree_util.keystr(path)} belongs to layer {numbers}; "
                f"accepted: {EVERY_STAGE} (every stage), 1 to {depth}, or -1 to -{depth} (one stage)"
            )


Stages = tuple[tuple[int, int], ...]  # (frozen_depth, depth) of each


def stages_of(config: Config, strategy: str, layers_per_stage: int) -> Stages:
    """Return the stages of a strategy; options with equal stages are the same, except for ``runtime.remat``."""
    return tuple(STRATEGIES[strategy](config.model.depth, layers_per_stage))
