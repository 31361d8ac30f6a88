"""A plan: what every option costs, and which devices of a fleet can afford it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lwfedssl_jax.analysis.statistics import common_seeds
from lwfedssl_jax.config import Config, device_classes
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.costs import fleet
from lwfedssl_jax.costs.ledger import Ledger, ledgers_of
from lwfedssl_jax.costs.memory import Notice
from lwfedssl_jax.method.stages import stages_of
from lwfedssl_jax.plan.clients import Clients, left_out, members
from lwfedssl_jax.plan.measured import NO_RESULTS, Results
from lwfedssl_jax.plan.options import Option, each_option
from lwfedssl_jax.plan.privacy import Asked, price
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
      asked: the epsilon that is asked for, or None.
    """

    config: Config
    devices: list[DeviceClass]
    clients: Clients
    options: list[Option]
    refused: dict[str, str]
    recommendation: Recommendation
    results: Results
    published: Published
    asked: Asked | None = None


def make_plan(
    config: Config,
    clients: Clients,
    results: Results = NO_RESULTS,
    aim: Aim = "devices",
    asked: Asked | None = None,
    notify: Notice = lambda _: None,
) -> Plan:
    """Compute the costs of every option, and in which of its stages each class can take part; compiles a step of each.

    Args:
      config: resolved; its strategy, layers per stage and ``runtime.remat`` are varied.
      clients: of the fleet (``clients.make_clients``).
      results: measured accuracies (``measured_accuracies``).
      aim: what the recommendation puts first.
      asked: the epsilon whose noise is computed, or None.
      notify: called with the name of what is being compiled.

    Raises:
      ConfigError: no option can run.
    """
    configs, refused = each_option(config)
    ledgers = ledgers_of(configs, memory=True, notify=notify)
    devices, published = device_classes(config), closest(config)
    options = []
    for (strategy, layers, remat), ledger in ledgers.items():
        option_config = configs[strategy, layers, remat]
        option = make_option(option_config, ledger, devices, clients)
        accuracy = published.accuracy(strategy, layers)
        estimated = accuracy is not None and not published.has(strategy, layers)
        measured = results.found.get((stages_of(option_config), remat))
        private = price(option_config, ledger, option.shares, asked) if asked else None
        options.append(option._replace(published=accuracy, estimated=estimated, measured=measured, privacy=private))
    options = over_common_seeds(options)
    recommendation = recommend(config, devices, options, results, published, aim, clients.dealt)
    return Plan(config, devices, clients, options, refused, recommendation, results, published, asked)


def over_common_seeds(options: Sequence[Option]) -> list[Option]:
    """Rank measured options over the seeds that they share (``Measured.seeds``)."""
    runs = {option.runs_key: option.measured for option in options if option.measured}
    seeds = common_seeds([[*measured.by_seed] for measured in runs.values()])
    return [o._replace(measured=o.measured._replace(seeds=seeds)) if o.measured else o for o in options]


def make_option(config: Config, ledger: Ledger, devices: Sequence[DeviceClass], clients: Clients) -> Option:
    """Make an option without accuracies.

    Args:
      config: of the option, resolved.
      ledger: of the config, with peak memory.
      devices, clients: of the fleet.
    """
    per_stage, deadline = ledger["per_stage"], config.fleet.deadline_seconds
    parts = [
        fleet.participation(device, per_stage, members(clients, number), deadline)
        for number, device in enumerate(devices)
    ]
    can = fleet.able_clients(devices, clients.classes, per_stage, clients.sizes, deadline)
    has_images = clients.weights * (clients.sizes > 0)
    everywhere = float((has_images * np.all([*can.values()], axis=0)).sum() / has_images.sum())
    present = [part for number, part in enumerate(parts) if (clients.classes == number).any()]
    return Option(
        strategy=config.strategy.name,
        layers_per_stage=config.strategy.layers_per_stage,
        remat=config.runtime.remat,
        ledger=ledger,
        parts=parts,
        left=[left_out(clients, can[cost["stage"]]) for cost in per_stage],
        everywhere=everywhere,
        seconds=run_seconds(ledger, present),
        energy_wh=max((part.energy_wh or 0.0 for part in present), default=0.0),
        config=config,
    )


def run_seconds(ledger: Ledger, parts: Sequence[fleet.Participation]) -> float:
    """Return the seconds of a run whose rounds are as long as the slowest class needs; 0 if a speed is not known."""
    if any(part.round_seconds is None or part.fetch_seconds is None for part in parts):
        return 0.0
    total = max((part.fetch_seconds or 0.0 for part in parts), default=0.0)
    for number, cost in enumerate(ledger["per_stage"]):
        seconds = [part.round_seconds[number] for part in parts if part.round_seconds and part.shares[number]]
        total += cost["rounds"] * max(seconds, default=0.0)
    return total
