"""A plan: what every option costs, and which devices of a fleet can afford it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lwfedssl_jax.config import Config, device_classes
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.costs import fleet
from lwfedssl_jax.costs.ledger import Ledger, ledgers_of
from lwfedssl_jax.costs.memory import Notice
from lwfedssl_jax.method.stages import stages_of
from lwfedssl_jax.plan.clients import Clients, left_out, members
from lwfedssl_jax.plan.measured import NO_RESULTS, Results
from lwfedssl_jax.plan.options import Option, each_option
from lwfedssl_jax.plan.published import Published, closest
from lwfedssl_jax.plan.recommend import Aim, Recommendation, recommend


class Plan(NamedTuple):
    """What the command ``plan`` shows.

    Attributes:
      config: resolved, with the fleet.
      devices: the fleet's classes.
      clients: how many images each client has, and its class.
      options: all that can run.
      refused: why each of the others cannot run with the rest of the config, by name.
      recommendation: the option to choose, its reasons, and its neighbours.
      results: measured accuracies.
      published: the paper's.
    """

    config: Config
    devices: list[DeviceClass]
    clients: Clients
    options: list[Option]
    refused: dict[str, str]
    recommendation: Recommendation
    results: Results
    published: Published


def make_plan(
    config: Config,
    clients: Clients,
    results: Results = NO_RESULTS,
    aim: Aim = "devices",
    notify: Notice = lambda _: None,
) -> Plan:
    """Compute the costs of every option, and in which of its stages each class can take part; compiles a step of each.

    Args:
      config: resolved; its strategy, layers per stage and ``runtime.remat`` are varied.
      clients: of the fleet (``clients.make_clients``).
      results: measured accuracies (``measured_accuracies``).
      aim: what the recommendation puts first.
      notify: called with the name of what is being compiled.

    Raises:
      ConfigError: no option can run.
    """
    configs, refused = each_option(config)
    ledgers = ledgers_of(configs, memory=True, notify=notify)
    devices, published = device_classes(config), closest(config)
    options = []
    for (strategy, layers, remat), ledger in ledgers.items():
        accuracy = results.found.get((stages_of(configs[strategy, layers, remat]), remat))
        known = published.accuracy(strategy, layers)
        options.append(
            make_option((strategy, layers, remat), ledger, devices, clients, config.fleet.deadline_seconds)._replace(
                published=known, measured=accuracy
            )
        )
    recommendation = recommend(config, devices, options, results.protocol, published, aim, clients.dealt)
    return Plan(config, devices, clients, options, refused, recommendation, results, published)


def make_option(
    name: tuple[str, int, bool], ledger: Ledger, devices: Sequence[DeviceClass], clients: Clients, deadline: float
) -> Option:
    """Make an option without accuracies.

    Args:
      name: its strategy, layers per stage and remat.
      ledger: with peak memory.
      devices, clients: of the fleet.
      deadline: seconds that a round may take; 0 for no deadline.
    """
    per_stage = ledger["per_stage"]
    parts = [
        fleet.participation(device, per_stage, members(clients, number), deadline)
        for number, device in enumerate(devices)
    ]
    can = fleet.able_clients(devices, clients.classes, per_stage, clients.sizes, deadline)
    everywhere = float((clients.weights * np.all([*can.values()], axis=0)).sum() / clients.number)
    left = [left_out(clients, can[cost["stage"]]) for cost in per_stage]
    return Option(*name, ledger, parts, left, everywhere, None, None)
