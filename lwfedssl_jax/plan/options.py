"""Which strategy and how many layers a stage a fleet can afford."""

from collections.abc import Sequence
from typing import NamedTuple

from lwfedssl_jax.config import Config, ConfigError, divisors, override
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.costs.fleet import Participation
from lwfedssl_jax.costs.ledger import Ledger, each_strategy
from lwfedssl_jax.data import sources
from lwfedssl_jax.method.stages import STRATEGIES, stages_of
from lwfedssl_jax.plan.measured import Measured


class Option(NamedTuple):
    """A way to train, and what each class can do of it.

    Attributes:
      strategy, layers_per_stage, remat: of the config.
      ledger: with peak memory.
      parts: of each class.
      shares: of the devices that can take part in each stage, and last in every one.
      measured: None where no results have it.
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
        """For a sentence."""
        layers = f", {self.layers_per_stage} layer{'s' * (self.layers_per_stage > 1)} a stage"
        remat = ", with runtime.remat" if self.remat else ""
        return f"{self.strategy}{layers if len(self.ledger['per_stage']) > 1 else ''}{remat}"

    @property
    def everywhere(self) -> float:
        """Share of the devices that can take part in every stage."""
        return self.shares[-1]

    @property
    def seconds(self) -> float:
        """Of the whole run on the slowest class whose speed is known, of those that take part throughout."""
        all_ = len(self.ledger["per_stage"])
        return max((p.seconds for p in self.parts if p.seconds is not None and len(p.stages) == all_), default=0.0)


def each_option(config: Config) -> tuple[dict[tuple[str, int, bool], Config], dict[str, str]]:
    """Each strategy with the numbers of layers a stage that divide the depth, and the config's own, and remat or not.

    Returns:
      The config by strategy, layers a stage and ``runtime.remat``, one for all that have the same stages; and why
      strategies are refused.

    Raises:
      ConfigError: all are.
    """
    depth = config.model.depth
    numbers = sorted({*divisors(depth)[:-1], config.strategy.layers_per_stage})
    found: dict[tuple[str, int, bool], Config] = {}
    refused: dict[str, str] = {}
    for strategy in STRATEGIES:
        for remat in (False, True):
            seen = {stages_of(config, s, k) for s, k, _ in found if s != strategy}
            for number in numbers:
                stages = stages_of(config, strategy, number)
                if stages in seen:
                    continue
                seen.add(stages)
                layers = depth if len(stages) == 1 else number
                changes = {"strategy.layers_per_stage": layers, "runtime.remat": remat}
                of_strategy, why = each_strategy(override(config, changes))
                if strategy in of_strategy:
                    found[strategy, layers, remat] = of_strategy[strategy]
                else:
                    refused[f"{strategy}, {layers} layer{'s' * (layers > 1)} a stage"] = why[strategy]
    if not found:
        raise ConfigError(next(iter(refused.values())))
    return found, refused


def shares_by_stage(devices: Sequence[DeviceClass], parts: Sequence[Participation], stages: int) -> list[float]:
    """Share of the devices that can take part in each stage, and at the end in all of them."""
    total = sum(device.count for device in devices)
    pairs = list(zip(devices, parts, strict=True))
    of_stage = [sum(d.count for d, p in pairs if s in p.stages) / total for s in range(1, stages + 1)]
    return [*of_stage, sum(d.count for d, p in pairs if len(p.stages) == stages) / total]


def examples_of_a_client(config: Config, given: int | None) -> float:
    """How many images a client trains on; the mean where they are unequal, and the median of shared ones.

    Args:
      config: resolved.
      given: by the user; None to take them from a data set whose size is known without reading one from disk.

    Raises:
      ConfigError: it is not known.
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
            f"--examples: nothing, and how many images a client of data.name {config.data.name} has is not known "
            "without reading it; accepted: their number"
        )
    synthetic = config.data.name == "synthetic"
    total = config.data.synthetic_examples if synthetic else len(source.load(config.data).train_images)
    return (total - round(config.partition.server_share * total)) / config.partition.clients
