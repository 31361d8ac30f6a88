"""The options of a plan: strategy, layers per stage and ``runtime.remat``."""

import itertools
from typing import NamedTuple

from lwfedssl_jax.analysis.wording import count_of
from lwfedssl_jax.config import Config, ConfigError, divisors, override
from lwfedssl_jax.costs.fleet import Participation, fetched_bytes
from lwfedssl_jax.costs.ledger import Ledger, each_strategy
from lwfedssl_jax.method.stages import STRATEGIES
from lwfedssl_jax.plan.clients import Left
from lwfedssl_jax.plan.measured import Measured
from lwfedssl_jax.plan.privacy import Price


class Option(NamedTuple):
    """An option of a plan, and what each device class can do under it.

    Attributes:
      strategy, layers_per_stage, remat: as in the config.
      ledger: with peak memory.
      parts: the participation of each class.
      left: whom each stage leaves out.
      everywhere: share of the clients that can take part in every stage, of those that have images.
      seconds: of the whole run, each round as long as the slowest class needs that has clients; 0 if a speed of one of
        them is not known.
      energy_wh: watt-hours of a device of the class that needs most, of those of which that is known; 0 without any.
      config: resolved.
      published: the accuracy in [0, 1] by which it is ranked without results, or None if the paper has none.
      estimated: whether ``published`` is estimated from others that the paper has.
      measured: its accuracies, or None if the results contain none.
      privacy: what the epsilon that is asked for takes, or None if none is, or if no client can take part.
    """

    strategy: str
    layers_per_stage: int
    remat: bool
    ledger: Ledger
    parts: list[Participation]
    left: list[Left]
    everywhere: float
    seconds: float
    energy_wh: float
    config: Config
    published: float | None = None
    estimated: bool = False
    measured: Measured | None = None
    privacy: Price | None = None

    @property
    def name(self) -> str:
        """The name of the option in a sentence, such as "progressive, 2 layers per stage, with runtime.remat"."""
        stages = len(self.ledger["per_stage"])
        name = name_option(self.strategy, self.layers_per_stage) if stages > 1 else self.strategy
        return f"{name}, with runtime.remat" if self.remat else name

    @property
    def ranked(self) -> Measured | None:
        """The measured accuracies, if it is ranked by them."""
        return self.measured if self.measured and self.measured.ranked else None

    @property
    def runs_key(self) -> tuple[str, int, str]:
        """What options have in common that the same runs measure: with and without ``runtime.remat``, off a fleet."""
        return self.strategy, self.layers_per_stage, str(self.measured and self.measured.by_seed)

    @property
    def shares(self) -> list[float]:
        """Share of the clients that can take part in each stage."""
        return [1 - left.share for left in self.left]

    @property
    def traffic_bytes(self) -> int:
        """Bytes, both directions, of a device that takes part in every round of all stages."""
        return self.ledger["total_bytes"] + fetched_bytes(self.ledger["per_stage"])


def name_option(strategy: str, layers_per_stage: int) -> str:
    """Name a strategy with its layers per stage, for a sentence."""
    return f"{strategy}, {count_of(layers_per_stage, 'layer')} per stage"


def each_option(config: Config) -> tuple[dict[tuple[str, int, bool], Config], dict[str, str]]:
    """Make a config for each strategy, with each number of layers per stage, with and without ``runtime.remat``.

    The numbers of layers are those that divide the depth, and the config's own. Of options with the same stages there
    is only one.

    Returns:
      The configs by strategy, layers per stage and ``runtime.remat``; and, by name, why others cannot run.

    Raises:
      ConfigError: no option can run.
    """
    depth = config.model.depth
    numbers = sorted({*divisors(depth)[:-1], config.strategy.layers_per_stage})
    configs: dict[tuple[str, int, bool], Config] = {}
    refused: dict[str, str] = {}
    for strategy, remat in itertools.product(STRATEGIES, (False, True)):
        seen = {depths_of(config, s, k) for s, k, _ in configs if s != strategy}
        for number in numbers:
            stages = depths_of(config, strategy, number)
            if stages in seen:
                continue
            seen.add(stages)
            layers = depth if len(stages) == 1 else number
            changes = {"strategy.layers_per_stage": layers, "runtime.remat": remat}
            by_strategy, why = each_strategy(override(config, changes))
            if strategy in by_strategy:
                configs[strategy, layers, remat] = by_strategy[strategy]
            else:
                refused[name_option(strategy, layers)] = why[strategy]
    if not configs:
        raise ConfigError(next(iter(refused.values())))
    return configs, refused


def depths_of(config: Config, strategy: str, layers_per_stage: int) -> tuple[tuple[int, int], ...]:
    """Return ``(frozen_depth, depth)`` of each stage of an option."""
    return tuple(STRATEGIES[strategy](config.model.depth, layers_per_stage))
