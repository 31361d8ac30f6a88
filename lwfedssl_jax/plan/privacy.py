"""What an epsilon takes under each option of a plan: noise, and clients in a round."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lwfedssl_jax.analysis.wording import count_of, short_number
from lwfedssl_jax.config import Config, ConfigError, override
from lwfedssl_jax.config.rules import LEAST_DELTA
from lwfedssl_jax.costs import accountant, privacy
from lwfedssl_jax.costs.ledger import Ledger
from lwfedssl_jax.method.aggregation import make_aggregator
from lwfedssl_jax.method.privacy import check_privacy
from lwfedssl_jax.method.task import make_task


class Asked(NamedTuple):
    """The epsilon and the delta that a plan is made for."""

    epsilon: float
    delta: float


class Price(NamedTuple):
    """What they take under an option.

    Attributes:
      noise_multiplier: standard deviation of the noise on a sum of updates, in the norm to which these are clipped.
      noise_over_clip: norm of a round's noise over the largest that the mean update can have, in the stage with most
        parameters.
      clients: how many clients a round takes until that is 1, if the shares that are drawn and drop out stay the same.
    """

    noise_multiplier: float
    noise_over_clip: float
    clients: int


def asked_of(config: Config, epsilon: float | None, delta: float | None) -> Asked | None:
    """Return what is asked: by the options of the command, or else by the config; None if nothing is.

    Raises:
      ConfigError: a value is out of range, or dp-accounting is not installed.
    """
    if epsilon is None:
        if delta is not None:
            raise ConfigError(f"--delta: {delta} needs --epsilon; accepted: both options, or neither")
        accountant.check_accountant(config)
        return Asked(config.privacy.epsilon, accountant.delta_of(config)) if config.privacy.epsilon else None
    if not 0 < epsilon < math.inf:
        raise ConfigError(f"--epsilon: {epsilon} is out of range; accepted: above 0")
    delta = accountant.delta_of(config) if delta is None else delta
    population = accountant.population(config)
    if not LEAST_DELTA <= delta < 1 / population:
        raise ConfigError(
            f"--delta: {delta} is not between {LEAST_DELTA} and 1 / {population:,.0f} clients; "
            f"accepted: {LEAST_DELTA} to less than {1 / population:.3g}"
        )
    clip = {"privacy.clip": config.privacy.clip or 1.0, "privacy.epsilon": epsilon, "privacy.noise_multiplier": 0.0}
    private = override(config, clip)
    try:
        accountant.check_accountant(private)
        check_privacy(private, make_task(private), make_aggregator(private))
    except ConfigError as error:
        raise ConfigError(f"--epsilon: {epsilon} cannot be had: {error}") from None
    return Asked(epsilon, delta)


def price(config: Config, ledger: Ledger, shares: Sequence[float], asked: Asked) -> Price | None:
    """Compute the noise for a client that takes part in every stage, and what it means for a round.

    None if there is a stage in which no client can take part.

    Args:
      config: of the option, resolved.
      ledger: of the config.
      shares: of the clients that can take part in each stage.
      asked: epsilon and delta.
    """
    per_stage = ledger["per_stage"]
    if not all(shares):
        return None
    clients = [max(1, round(share * config.partition.clients)) for share in shares]
    exposure = accountant.exposure([(cost["rounds"], n) for cost, n in zip(per_stage, clients, strict=True)], config)
    multiplier = accountant.noise_for((exposure,), *asked)
    by_stage = [privacy.stage_privacy(config, cost, multiplier, n) for cost, n in zip(per_stage, clients, strict=True)]
    ratio, parameters = max((stage["noise_over_clip"], stage["parameters"]) for stage in by_stage)
    larger = accountant.noise_cohort(config) / config.cohort_size
    on_sum = float(np.asarray(accountant.mechanism(config, multiplier).noise)) * larger
    needed = math.ceil(on_sum * math.sqrt(parameters) / (1 - config.federation.dropout))
    return Price(multiplier, ratio, needed)


def words(config: Config, asked: Asked, prices: dict[str, Price], nobody: Sequence[str]) -> str:
    """Say what an epsilon takes under the options of a plan.

    Args:
      config: resolved.
      asked: epsilon and delta.
      prices: by the option's name.
      nobody: names of options in which no client can take part.
    """
    left_out = f" No client can take part in {', '.join(nobody)}." if nobody else ""
    if not prices:
        return f"Privacy: no option can be taken part in.{left_out}"
    multipliers = [price.noise_multiplier for price in prices.values()]
    low, high = f"{min(multipliers):.3g}", f"{max(multipliers):.3g}"
    noise = low if low == high else f"{low} to {high}"
    rounds = count_of(config.federation.rounds, "round")
    ratios = "; ".join(
        f"{name} {short_number(p.noise_over_clip)} ({p.clients:,} client{'s' * (p.clients != 1)})"
        for name, p in prices.items()
    )
    drawn = {
        "poisson": f"Poisson cohorts of about {config.cohort_size:,} of {config.partition.clients:,} clients",
        "fixed": f"{config.cohort_size:,} of {config.partition.clients:,} clients in each",
    }[config.federation.sampling]
    unsampled = ""
    if config.federation.sampling == "fixed" and config.cohort_size < config.partition.clients:
        unsampled = " Cohorts of a fixed size hide nobody: federation.sampling poisson needs less noise."
    return (
        f"Privacy: epsilon {asked.epsilon:g} at delta {asked.delta:.2g} for whole clients, over {rounds} with {drawn}, "
        f"takes a noise multiplier of {noise}.{unsampled} Norm of a round's noise over the clip, and in brackets how "
        f"many clients a round, of a population as much larger, would take for it to be 1: {ratios}.{left_out}"
    )
