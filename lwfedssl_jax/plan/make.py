"""A plan: what every option costs, and which devices of a fleet can afford it."""

from typing import NamedTuple

from lwfedssl_jax.config import Config, device_classes
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.costs import fleet
from lwfedssl_jax.costs.ledger import ledgers_of
from lwfedssl_jax.costs.memory import Notice
from lwfedssl_jax.method.stages import stages_of
from lwfedssl_jax.plan.measured import NO_RESULTS, Results
from lwfedssl_jax.plan.options import Option, each_option, shares_by_stage
from lwfedssl_jax.plan.recommend import recommend


class Plan(NamedTuple):
    """What the command ``plan`` shows.

    Attributes:
      config: resolved, with the fleet.
      devices: the fleet's classes.
      examples: number of images that a client trains on.
      options: all that can run.
      refused: why each of the others cannot run with the rest of the config, by name.
      recommended: the option chosen by ``recommend``, or None if no class can take part throughout in any.
      reason: why this option is recommended, in sentences.
      results: measured accuracies.
    """

    config: Config
    devices: list[DeviceClass]
    examples: float
    options: list[Option]
    refused: dict[str, str]
    recommended: Option | None
    reason: str
    results: Results


def make_plan(config: Config, examples: float, results: Results = NO_RESULTS, notify: Notice = lambda _: None) -> Plan:
    """Compute the costs of every option, and in which of its stages each class can take part; compiles a step of each.

    Args:
      config: resolved; its strategy, layers per stage and ``runtime.remat`` are varied.
      examples: number of images that a client trains on.
      results: measured accuracies (``measured_accuracies``).
      notify: called with the name of what is being compiled.

    Raises:
      ConfigError: no option can run.
    """
    configs, refused = each_option(config)
    ledgers = ledgers_of(configs, memory=True, notify=notify)
    devices = device_classes(config)
    options = []
    for option, ledger in ledgers.items():
        strategy, layers, remat = option
        deadline = config.fleet.deadline_seconds
        parts = [fleet.participation(device, ledger["per_stage"], examples, deadline) for device in devices]
        accuracy = results.found.get((stages_of(configs[option]), remat))
        shares = shares_by_stage(devices, parts, len(ledger["per_stage"]))
        options.append(Option(strategy, layers, remat, ledger, parts, shares, accuracy))
    recommended, reason = recommend(config, devices, options, results.protocol)
    return Plan(config, devices, examples, options, refused, recommended, reason, results)
