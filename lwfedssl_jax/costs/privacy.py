"""What a private run promises to a client, on what conditions, and what that leaves open."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import numpy as np

from lwfedssl_jax.config import Config, override
from lwfedssl_jax.costs.accountant import (
    accountant_name,
    delta_of,
    epsilon_of,
    expected_reports,
    exposures,
    mechanism,
    noise_cohort,
    noise_multiplier,
    population,
)
from lwfedssl_jax.costs.fleet import Fleet
from lwfedssl_jax.method.stages import Stage

LARGE_EPSILON, LARGE_DELTA = 15.0, 1e-3

NEIGHBOURS = "add or remove one client, with all of its images"
NOT_COVERED = (
    "metrics.jsonl and summary.json: loss, distances, shares, signal norms, cohort sizes, traffic and times are "
    "measured without noise",
    "accuracies, and choices that were made by looking at them",
    "other runs of the same seed: they share their noise, which two published models let anyone subtract",
    "that a run ends if no client's update is finite",
    "an image that several clients own (partition.kind shared): the unit is a client",
    "how many clients there are, and in a fleet how many can take part in a stage: they are public",
    "a deployment: the seed, from which all noise follows, is in config.json, and floating-point numbers are no reals",
)


class StagePrivacy(TypedDict):
    """A stage's entry of ``Promise.per_stage``; norms are L2 norms over its trained parameters.

    ``clip_norm`` is of one client's update, ``noise_norm`` of a round's noise in the mean update, as in
    ``metrics.jsonl``; ``noise_over_clip`` is the norm of the noise over the largest that the mean update can have,
    z * sqrt(d) / K. With an adapted clip, the norms are those of the stage's first round.
    """

    stage: int
    parameters: int
    clip_norm: float
    noise_norm: float
    noise_over_clip: float


class Promise(TypedDict):
    """What a run promises; ``privacy`` in ``summary.json``.

    Attributes:
      epsilon: of the run, of the clients that are exposed most; None without noise.
      delta: of epsilon.
      unit, neighbours: whom the promise is about.
      by_class: epsilon by class of devices; empty without a fleet.
      epsilon_if_poisson: with fixed cohorts of a part of the clients, what epsilon would be if they were Poisson
        samples, which they are not; else None.
      sampling: how cohorts are drawn.
      clients, cohort: of the federation that epsilon is of.
      simulated_clients, simulated_cohort: of the one that was simulated.
      noise_multiplier: standard deviation of the noise on a sum of updates, in the norm to which these are clipped.
      clip: root mean square of an update's change, to which it is clipped.
      quantile: share of the updates that an adapted clip leaves as they are; 0 if it is fixed.
      per_stage: see ``StagePrivacy``.
      accountant: the library, its version and its method.
      says: the promise in words.
      not_covered: what it does not cover.
      audit: with canaries, what these say (``audit.Audit``).
    """

    epsilon: float | None
    delta: float
    unit: str
    neighbours: str
    by_class: dict[str, float | None]
    epsilon_if_poisson: float | None
    sampling: str
    clients: int
    cohort: int
    simulated_clients: int
    simulated_cohort: int
    noise_multiplier: float
    clip: float
    quantile: float
    per_stage: list[StagePrivacy]
    accountant: str
    says: str
    not_covered: list[str]
    audit: NotRequired[dict[str, Any]]


def promise(
    config: Config, stages: Sequence[Stage], per_stage: Sequence[Mapping[str, Any]], fleet: Fleet | None = None
) -> Promise:
    """Return what a run promises.

    Args:
      config: resolved, with a clip.
      stages: of the run.
      per_stage: of its ledger, for the numbers of trained parameters.
      fleet: which clients can take part in which stage.
    """
    z, delta = noise_multiplier(config, stages, fleet), delta_of(config)
    exposed = exposures(config, stages, fleet)
    by_class = {name: epsilon_of(exposure, z, delta) for name, exposure in exposed.items()}
    epsilon = max(by_class.values())
    poisson = exposures(override(config, {"federation.sampling": "poisson"}), stages, fleet)
    if_poisson = max(epsilon_of(exposure, z, delta) for exposure in poisson.values())
    return {
        "epsilon": finite(epsilon),
        "delta": delta,
        "unit": "client",
        "neighbours": NEIGHBOURS,
        "by_class": {name: finite(value) for name, value in by_class.items() if fleet},
        "epsilon_if_poisson": finite(if_poisson) if if_poisson != epsilon else None,
        "sampling": config.federation.sampling,
        "clients": round(population(config)),
        "cohort": noise_cohort(config),
        "simulated_clients": config.partition.clients,
        "simulated_cohort": config.cohort_size,
        "noise_multiplier": z,
        "clip": config.privacy.clip,
        "quantile": config.privacy.quantile,
        "per_stage": [stage_privacy(config, cost, z, eligible_in(config, cost, fleet)) for cost in per_stage],
        "accountant": accountant_name() if z else "none",
        "says": in_words(config, z, by_class, if_poisson),
        "not_covered": list(NOT_COVERED),
    }


def eligible_in(config: Config, cost: Mapping[str, Any], fleet: Fleet | None) -> int:
    """Return how many clients can take part in a stage, by its entry in a ledger."""
    return int(fleet.can[cost["stage"]].sum()) if fleet else config.partition.clients


def stage_privacy(config: Config, cost: Mapping[str, Any], multiplier: float, eligible: int) -> StagePrivacy:
    """Return the clip and the noise of a stage, by its ledger entry and the number of clients that can take part."""
    parameters = cost["trainable_parameters"]
    clip_norm = config.privacy.clip * math.sqrt(parameters)
    noise = float(np.asarray(mechanism(config, multiplier).noise))
    expected = max(expected_reports(config, eligible), 1e-9)
    return {
        "stage": cost["stage"],
        "parameters": parameters,
        "clip_norm": clip_norm,
        "noise_norm": noise * clip_norm * math.sqrt(parameters) / expected,
        "noise_over_clip": noise * math.sqrt(parameters) / expected,
    }


def finite(epsilon: float) -> float | None:
    """Return an epsilon, or None if it is infinite, which JSON has no number for."""
    return epsilon if math.isfinite(epsilon) else None


def in_words(config: Config, multiplier: float, by_class: Mapping[str, float], if_poisson: float) -> str:
    """Say what a run promises, and on what conditions.

    Args:
      config: resolved.
      multiplier: of the noise.
      by_class: epsilon by class of devices.
      if_poisson: the largest epsilon if cohorts were Poisson samples.
    """
    found, delta = max(by_class.values()), delta_of(config)
    epsilon = config.privacy.epsilon if found <= config.privacy.epsilon < 1.01 * found else found  # as it was asked for
    if not multiplier:
        return "Updates are clipped, and no noise is added: nothing is promised."
    stands_for = ""
    if noise_cohort(config) != config.cohort_size:
        stands_for = (
            f" That is of a federation of {population(config):,.0f} clients, {noise_cohort(config):,} per round, whose "
            f"noise was added; {config.partition.clients:,} clients were simulated in its place."
        )
    everybody = config.cohort_size == config.partition.clients
    drawn = {"poisson": "cohorts are drawn by Poisson sampling"}.get(
        config.federation.sampling,
        "all clients that can take part do so" if everybody else "cohorts are drawn uniformly, without replacement",
    )
    if len(by_class) > 1:
        classes = ", ".join(f"{name} {value:.3g}" for name, value in by_class.items())
        stands_for += f" Epsilon by class of devices: {classes}."
    if if_poisson < found:
        stands_for += f" If these were Poisson samples, which they are not, epsilon would be {if_poisson:.3g}."
    if epsilon > LARGE_EPSILON:
        stands_for += f" An epsilon of {epsilon:.3g} protects hardly anyone: more clients, or more noise, would."
    if delta > LARGE_DELTA:
        stands_for += f" A delta of {delta:.2g} is large: with that probability nothing is promised to a client."
    return (
        f"The encoder is ({epsilon:.3g}, {delta:.2g})-differentially private for whole clients: whether any one client "
        f"with all of its images is in the population changes the probability of any outcome by at most a factor "
        f"exp({epsilon:.3g}), plus {delta:.2g}. It holds if {drawn}, the server clips and adds the noise as "
        f"described and is trusted with the updates, and the seed stays secret.{stands_for}"
    )
