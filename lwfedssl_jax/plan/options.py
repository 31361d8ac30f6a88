"""The options of a plan: strategy, layers per stage and ``runtime.remat``."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from lwfedssl_jax.analysis.wording import count_of
from lwfedssl_jax.config import Config, ConfigError, divisors, override
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.costs.fleet import Participation
from lwfedssl_jax.costs.ledger import Ledger, each_strategy
from lwfedssl_jax.data import sources
from lwfedssl_jax.method.stages import STRATEGIES
from lwfedssl_jax.plan.measured import Measured


class Option(NamedTuple):
    """An option of a plan, and what each device class can do under it.

    Attributes:
      strategy, layers_per_stage, remat: as in the config.
      ledger: with peak memory.
      parts: the participation of each class.
      shares: shares of the devices that can take part in each stage, followed by that for all stages.
      measured: its accuracies, or None if the results contain none.
    """

    strategy: str
    layers_per_stage: int
    remat: bool
    ledger: Ledger
    parts: list[Participation]
    shares: list[float]
    measured: Measured | None

    @property
    def name(self) -> str:
        """The name of the option in a sentence, such as "progressive, 2 layers per stage, with runtime.remat"."""
        stages = len(self.ledger["per_stage"])
        name = name_option(self.strategy, self.layers_per_stage) if stages > 1 else self.strategy
        return f"{name}, with runtime.remat" if self.remat else name

    @property
    def everywhere(self) -> float:
        """Share of the devices that can take part in every stage."""
        return self.shares[-1]

    @property
    def seconds(self) -> float:
        """Seconds of the whole run on the slowest class of those that take part throughout; 0 if no speed is known."""
        stages = len(self.ledger["per_stage"])
        return max((p.seconds for p in self.parts if p.seconds is not None and len(p.stages) == stages), default=0.0)


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


def shares_by_stage(devices: Sequence[DeviceClass], parts: Sequence[Participation], stages: int) -> list[float]:
    """Return the shares of the devices that can take part in each stage, followed by that for all stages."""
    total = sum(device.count for device in devices)
    pairs = list(zip(devices, parts, strict=True))
    shares = [sum(d.count for d, p in pairs if s in p.stages) / total for s in range(1, stages + 1)]
    return [*shares, sum(d.count for d, p in pairs if len(p.stages) == stages) / total]


def examples_of_a_client(config: Config, given: int | None) -> float:
    """Return the images per client: the mean if clients differ, the median for partition.kind shared.

    Args:
      config: resolved.
      given: the user's value; None to derive it from a data set whose size is known without reading it from disk.

    Raises:
      ConfigError: the number is not known.
    """
    if given is not None:
        if given < 1:
            raise ConfigError(f"--examples: {given} is out of range; accepted: at least 1")
        return given
    source = sources.find(config.data)
    if config.partition.kind == "shared":
        return config.partition.examples_per_client
    if config.data.name not in ("digits", "synthetic"):
        raise ConfigError(
            f"--examples: missing, and the number of images per client of data.name {config.data.name} is not known "
            "without reading it; accepted: that number"
        )
    synthetic = config.data.name == "synthetic"
    total = config.data.synthetic_examples if synthetic else len(source.load(config.data).train_images)
    return (total - round(config.partition.server_share * total)) / config.partition.clients
