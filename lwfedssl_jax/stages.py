"""Strategies as lists of stages: which layers exist, which are trained, for how many rounds."""

from typing import NamedTuple

import jax
import numpy as np

from lwfedssl_jax import tree
from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.models.vit import EVERY_STAGE
from lwfedssl_jax.tree import Tree


class Stage(NamedTuple):
    """An ordinary federated run on a grown encoder (arXiv 2401.11647).

    Attributes:
      number: 1..S.
      first_round: rounds of the run before this stage.
      rounds: rounds of this stage.
      depth: layers L1..L_depth exist.
      frozen_depth: of these, L1..L_frozen_depth are frozen.
      trainable: mask (see tree.py): receives gradients, is averaged and exchanged.
      frozen: mask: exists, but is only run forward.
      rows: where the trainable leaves are, of one shape in as many stages as can share a program.
    """

    number: int
    first_round: int
    rounds: int
    depth: int
    frozen_depth: int
    trainable: Tree
    frozen: Tree
    rows: Tree

    @property
    def trainable_depth(self) -> int:
        """Number of layers that are trained."""
        return self.depth - self.frozen_depth


def make_stages(config: Config, layers: Tree) -> list[Stage]:
    """The stages of the config's strategy.

    Args:
      config: a resolved config.
      layers: each parameter's layer number (``Encoder.layers``), heads included.

    Raises:
      ConfigError: a parameter's layer number is not among 1..L.
    """
    depth, added = config.model.depth, config.layers_per_stage
    _check_layers(layers, depth)
    rounds_S = spread(config.federation.rounds, config.stages)
    stages = []
    for s in range(config.stages):
        last = min((s + 1) * added, depth)
        first = s * added + 1 if config.strategy.name == "layerwise" else 1
        trainable = jax.tree.map(lambda n, lo=first, hi=last: (n == EVERY_STAGE) | ((lo <= n) & (n <= hi)), layers)
        frozen = jax.tree.map(lambda n, lo=first: (n != EVERY_STAGE) & (n < lo), layers)
        rows = tree.rows(trainable, added if config.strategy.name == "layerwise" else depth)
        stages.append(Stage(s + 1, sum(rounds_S[:s]), rounds_S[s], last, first - 1, trainable, frozen, rows))
    return stages


def spread(rounds: int, stages: int) -> list[int]:
    """``rounds`` over ``stages`` as evenly as possible, nothing lost; earlier stages take the remainder."""
    return [rounds // stages + (s < rounds % stages) for s in range(stages)]


def _check_layers(layers: Tree, depth: int) -> None:
    for path, numbers in jax.tree.leaves_with_path(layers):
        if not np.all(np.isin(numbers, np.arange(EVERY_STAGE, depth + 1))):
            raise ConfigError(
                f"model: parameter {jax.tree_util.keystr(path)} belongs to layer {numbers}; "
                f"accepted: {EVERY_STAGE} (every stage) or 1 to {depth}"
            )
