"""Strategies as lists of stages: which layers exist, which are trained, for how many rounds."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from lwfedssl_jax import tree
from lwfedssl_jax.config import Config, ConfigError, choose, override
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
    """Make the stages of the config's strategy; with ``strategy.pacing`` adaptive, as they are planned (``pacing.py``).

    Args:
      config: a resolved config.
      layers: each parameter's layer number (``Encoder.layers``), heads included.

    Raises:
      ConfigError: see ``stage_depths`` and ``stage_rounds``; a parameter's layer number is not among 1..L.
    """
    depths = stage_depths(config)
    _check_layers(layers, config.model.depth)
    rounds_S = stage_rounds(config, len(depths))
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


def stage_rounds(config: Config, stages: int) -> list[int]:
    """Return how many rounds each of a number of stages has, of at most ``federation.rounds`` stages.

    Raises:
      ConfigError: ``strategy.rounds_per_stage`` does not fit the stages (``listed_rounds``).
    """
    rounds, strategy = config.federation.rounds, config.strategy
    if strategy.rounds_per_stage:
        if listed := listed_rounds(config, stages):
            return listed
        raise ConfigError(
            f"strategy.rounds_per_stage: {strategy.rounds_per_stage} does not fit the {stages} stages of "
            f"{strategy.name} with {strategy.layers_per_stage} of {config.model.depth} layers per stage; "
            f"accepted: {stages} numbers, or () to use strategy.first_stage_share"
        )
    if strategy.first_stage_share and stages > 1:
        first = min(max(round(strategy.first_stage_share * rounds), 1), rounds - (stages - 1))
        return [first, *spread(rounds - first, stages - 1)]
    return spread(rounds, stages)


def listed_rounds(config: Config, stages: int) -> list[int]:
    """Return ``strategy.rounds_per_stage`` for a number of stages, or an empty list if it does not fit them.

    If the list is of stages of fewer layers, which divide ``strategy.layers_per_stage``, neighbours are added up.
    """
    listed, layers, depth = config.strategy.rounds_per_stage, config.strategy.layers_per_stage, config.model.depth
    if len(listed) == stages:
        return list(listed)
    if stages == 1:
        return [sum(listed)]
    for fewer in range(1, layers):
        if -(-depth // fewer) == len(listed) and layers % fewer == 0:
            group = layers // fewer
            added = [sum(listed[first : first + group]) for first in range(0, len(listed), group)]
            return added if len(added) == stages else []
    return []


def rounds_fit(config: Config) -> bool:
    """Return whether ``strategy.rounds_per_stage``, if it is set, fits the stages of the config's strategy."""
    stages = len(STRATEGIES[config.strategy.name](config.model.depth, config.strategy.layers_per_stage))
    return not config.strategy.rounds_per_stage or bool(listed_rounds(config, stages))


ADAPTIVE_COSTS = "strategy.pacing adaptive: costs are those of the planned rounds, which a run may change."


def alike(config: Config) -> str:
    """Return a sentence if the config's strategy, with others, trains all layers in one stage; or an empty text."""
    depth, layers = config.model.depth, config.strategy.layers_per_stage
    single = [name for name, stages in STRATEGIES.items() if stages(depth, layers) == [(0, depth)]]
    if config.strategy.name not in single or len(single) < 2:
        return ""
    return f"strategy.layers_per_stage {layers} is the whole encoder: {', '.join(single)} are the same run."


def even_rounds(config: Config, names: Sequence[str]) -> str:
    """Return a sentence that names the options whose stages ``strategy.rounds_per_stage`` does not fit."""
    listed = " ".join(map(str, config.strategy.rounds_per_stage))
    return f"strategy.rounds_per_stage {listed} does not fit, and rounds are even: {'; '.join(names)}."


def with_fitting_rounds(config: Config) -> Config:
    """Return the config with even stages if ``strategy.rounds_per_stage`` does not fit them."""
    even = {"strategy.rounds_per_stage": (), "strategy.first_stage_share": 0.0}
    return config if rounds_fit(config) else override(config, even)


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


Stages = tuple[tuple[int, int, int], ...]  # (frozen_depth, depth, rounds) of each


def stages_of(config: Config) -> Stages:
    """Return the stages of a config; options with equal stages are the same, except for ``runtime.remat``.

    Raises:
      ConfigError: see ``stage_depths`` and ``stage_rounds``.
    """
    depths = stage_depths(config)
    rounds_S = stage_rounds(config, len(depths))
    return tuple((frozen, depth, rounds) for (frozen, depth), rounds in zip(depths, rounds_S, strict=True))
