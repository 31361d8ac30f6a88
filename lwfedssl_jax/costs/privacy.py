"""The privacy accountant: the epsilon of a run, the noise for an epsilon, and what a run promises.

The unit is a client with all of its images; neighbours differ by one client that is added or removed. Nothing is
counted while a run trains: epsilon is a function of the config, of how many clients can take part in each stage, and of
the number of rounds. Privacy losses are composed by dp-accounting's distributions (PLD; Koskela et al., 2020, arXiv
1906.03049, and Doroshenko et al., 2022, arXiv 2207.04380), which round upwards.
"""

import collections
import functools
import importlib.metadata
import importlib.util
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np

from lwfedssl_jax.config import Config, ConfigError, override
from lwfedssl_jax.costs.fleet import Fleet
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.task import Mechanism

LEAST_NOISE, MOST_NOISE = 0.1, 2.0**20  # multipliers that are tried
TOLERANCE = 1e-3  # of a multiplier that is found
LARGE_DELTA = 1e-3

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


class Releases(NamedTuple):
    """Rounds whose results a client's data may be in, all in the same way.

    Attributes:
      probability: with which the client is in a round; 1 without sampling.
      sensitivity: how far a client moves the sum of the updates, in the norm to which they are clipped.
      rounds: their number.
    """

    probability: float
    sensitivity: float
    rounds: int


Exposure = tuple[Releases, ...]  # of a client over a run


def exposures(
    config: Config, stages: Sequence[Stage], fleet: Fleet | None = None, rounds: int | None = None
) -> dict[str, Exposure]:
    """Return what the clients of each class of devices are exposed to; without a fleet, under the name "".

    A Poisson cohort has each of n clients with probability K / n. A fixed cohort of K out of more clients is not a
    sample that hides anything here: who joins takes the place of another, so that the sum moves by two clips.

    Args:
      config: resolved.
      stages: of the run.
      fleet: which clients can take part in which stage.
      rounds: count only the first of them; None: all.
    """
    known = {"": np.ones(config.partition.clients, bool)}
    if fleet:
        known = {d.name: fleet.classes == i for i, d in enumerate(fleet.devices) if (fleet.classes == i).any()}
    found: dict[str, Exposure] = {}
    for name, members in known.items():
        taken: list[tuple[int, int]] = []
        for stage in stages:
            last = stage.last_round if rounds is None else min(stage.last_round, rounds)
            can = fleet.can[stage.number] if fleet else members
            if last > stage.first_round and (can & members).any():
                taken.append((last - stage.first_round, int(can.sum())))
        found[name] = exposure(taken, config)
    return found


def exposure(taken: Sequence[tuple[int, int]], config: Config) -> Exposure:
    """Return the exposure of a client that can take part in stages: rounds, and for how many clients each is."""
    counted: collections.Counter[tuple[float, float]] = collections.Counter()
    for rounds, eligible in taken:
        counted[release(config, eligible)] += rounds
    return tuple(Releases(*kind, count) for kind, count in sorted(counted.items()))


def release(config: Config, eligible: int) -> tuple[float, float]:
    """Return probability and sensitivity of a round for which so many clients are eligible."""
    cohort = config.cohort_size
    if config.federation.sampling == "poisson":
        return min(1.0, cohort / eligible), 1.0
    # With as many as are drawn, one more would take the place of another, unless all clients always take part.
    return 1.0, 1.0 if cohort == config.partition.clients or eligible < cohort else 2.0


def expected_reports(config: Config, eligible: int) -> float:
    """Return how many clients report on average in a round for which so many are eligible."""
    return min(config.cohort_size, eligible) * (1 - config.federation.dropout)


@functools.cache
def epsilon_of(exposure: Exposure, noise_multiplier: float, delta: float) -> float:
    """Return the epsilon of a client's exposure at a delta; infinite without noise, 0 without any round.

    Args:
      exposure: hashable, so that equal ones are computed once.
      noise_multiplier: standard deviation of the noise on a sum of updates, in the norm to which these are clipped.
      delta: above 0.
    """
    if not exposure:
        return 0.0
    if not noise_multiplier:
        return math.inf
    import dp_accounting
    from dp_accounting import pld

    # Gaussian mechanisms without sampling are one, whose epsilon is known exactly.
    unsampled = sum(r.rounds * r.sensitivity**2 for r in exposure if r.probability == 1)
    sampled = [releases for releases in exposure if releases.probability < 1]
    alone = noise_multiplier / math.sqrt(unsampled) if unsampled else math.inf
    if not sampled:
        return epsilon_of_noise(alone, delta)
    accountant = pld.PLDAccountant()
    if unsampled:
        accountant.compose(dp_accounting.GaussianDpEvent(alone))
    for releases in sampled:
        event = dp_accounting.GaussianDpEvent(noise_multiplier / releases.sensitivity)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(releases.probability, event), releases.rounds)
    return float(accountant.get_epsilon(delta))


def epsilon_of_noise(noise_multiplier: float, delta: float) -> float:
    """Return the epsilon of one Gaussian mechanism, exactly (Balle and Wang, 2018, arXiv 1805.06530)."""
    import dp_accounting

    with np.errstate(divide="ignore", over="ignore"):
        return float(dp_accounting.get_epsilon_gaussian(noise_multiplier, delta))


@functools.cache
def noise_for(exposures: tuple[Exposure, ...], epsilon: float, delta: float) -> float:
    """Return the smallest noise multiplier, up to a thousandth, that keeps every exposure within epsilon and delta.

    Raises:
      ConfigError: there is none.
    """

    def within(noise: float) -> bool:
        return all(epsilon_of(exposure, noise, delta) <= epsilon for exposure in exposures)

    low = high = 1.0  # distributions of little noise are long: smaller multipliers are tried only if they may do
    while within(low):
        low, high = low / 2, low
        if low < LEAST_NOISE:
            return high
    while not within(high):
        low, high = high, 2 * high
        if high > MOST_NOISE:
            raise ConfigError(
                f"privacy.epsilon: {epsilon} needs noise of more than {MOST_NOISE:,.0f} clips; "
                "accepted: a larger epsilon"
            )
    while high - low > TOLERANCE * high:
        middle = (low + high) / 2
        low, high = (low, middle) if within(middle) else (middle, high)
    return high


def population(config: Config) -> float:
    """Return the number of clients whose privacy is stated: with ``noise_cohort``, those that the run stands for."""
    return config.partition.clients * noise_cohort(config) / config.cohort_size


def noise_cohort(config: Config) -> int:
    """Return the number of clients per round whose noise is added."""
    return config.privacy.noise_cohort or config.cohort_size


def delta_of(config: Config) -> float:
    """Return the delta of a (resolved) config."""
    return config.privacy.delta or float(population(config) ** -1.1)


def epsilon_after(
    config: Config, multiplier: float, stages: Sequence[Stage], fleet: Fleet | None, rounds: int
) -> float:
    """Return the epsilon of the clients that are exposed most, after the first rounds of a run.

    Args:
      config: resolved.
      multiplier: of the noise.
      stages, fleet: of the run.
      rounds: how many are finished.
    """
    exposed = exposures(config, stages, fleet, rounds).values()
    return max(epsilon_of(exposure, multiplier, delta_of(config)) for exposure in exposed)


def count_noise(config: Config) -> float:
    """Return the standard deviation of the noise on the count of updates within the clip, in clients."""
    reports = noise_cohort(config) * (1 - config.federation.dropout)
    return config.privacy.count_noise or reports / 20


def noise_multiplier(config: Config, stages: Sequence[Stage], fleet: Fleet | None = None) -> float:
    """Return the noise multiplier of a run: the config's, or the one for its epsilon; 0 without noise.

    Raises:
      ConfigError: there is none for its epsilon.
    """
    privacy = config.privacy
    if not privacy.epsilon:
        return privacy.noise_multiplier
    return noise_for(tuple(set(exposures(config, stages, fleet).values())), privacy.epsilon, delta_of(config))


def mechanism(config: Config, multiplier: float) -> Mechanism:
    """Return the numbers that the round's program needs for a noise multiplier.

    With an adapted clip, a round releases the sum and the count; the noise on the sum rises so that both together are
    one release of this multiplier (Andrew et al., 2021, theorem 1).

    Raises:
      ConfigError: the noise on the count is too small for that.
    """
    privacy, smaller = config.privacy, config.cohort_size / noise_cohort(config)
    on_sum, on_count = multiplier, 0.0
    if privacy.quantile and multiplier:
        on_count = count_noise(config)
        if multiplier >= 2 * on_count:
            raise ConfigError(
                f"privacy.count_noise: {on_count:.3g} clients is too little for a noise multiplier of "
                f"{multiplier:.3g}; accepted: more than {multiplier / 2:.3g}, or privacy.quantile 0"
            )
        on_sum = (multiplier**-2 - (2 * on_count) ** -2) ** -0.5
    return Mechanism(privacy.clip, on_sum * smaller, privacy.quantile, on_count * smaller)


def check_accountant(config: Config) -> None:
    """Refuse noise whose epsilon cannot be computed.

    Raises:
      ConfigError: dp-accounting is not installed; see ``mechanism``.
    """
    field = next((name for name in ("epsilon", "noise_multiplier") if getattr(config.privacy, name)), None)
    mechanism(config, config.privacy.noise_multiplier)
    if field and importlib.util.find_spec("dp_accounting") is None:
        raise ConfigError(
            f'privacy.{field}: needs dp-accounting; accepted: 0.0, or pip install "lwfedssl_jax[privacy]"'
        )


class StagePrivacy(TypedDict):
    """A stage's entry of ``Promise.per_stage``; norms are L2 norms over its trained parameters.

    ``clip_norm`` is of one client's update, ``noise_norm`` the expected one of a round's noise on the sum;
    ``noise_over_clip`` is the norm of the noise over the largest that the mean update can have, z * sqrt(d) / K. With
    an adapted clip, the norms are those of the stage's first round.
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
        "says": in_words(config, z, epsilon, delta),
        "not_covered": list(NOT_COVERED),
    }


def eligible_in(config: Config, cost: Mapping[str, Any], fleet: Fleet | None) -> int:
    """Return how many clients can take part in a stage, by its entry in a ledger."""
    return int(fleet.can[cost["stage"]].sum()) if fleet else config.partition.clients


def stage_privacy(config: Config, cost: Mapping[str, Any], multiplier: float, eligible: int) -> StagePrivacy:
    """Return the clip and the noise of a stage, by its entry in a ledger, in which so many clients can take part."""
    parameters = cost["trainable_parameters"]
    clip_norm = config.privacy.clip * math.sqrt(parameters)
    noise = float(np.asarray(mechanism(config, multiplier).noise))
    return {
        "stage": cost["stage"],
        "parameters": parameters,
        "clip_norm": clip_norm,
        "noise_norm": noise * clip_norm * math.sqrt(parameters),
        "noise_over_clip": noise * math.sqrt(parameters) / max(expected_reports(config, eligible), 1e-9),
    }


def finite(epsilon: float) -> float | None:
    """Return an epsilon, or None if it is infinite, which JSON has no number for."""
    return epsilon if math.isfinite(epsilon) else None


def accountant_name() -> str:
    """Return the accountant's library, version and method."""
    return f"dp-accounting {importlib.metadata.version('dp-accounting')}, PLD"


def in_words(config: Config, multiplier: float, epsilon: float, delta: float) -> str:
    """Say what a run promises, and on what conditions."""
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
    if delta > LARGE_DELTA:
        stands_for += f" A delta of {delta:.2g} is large: with that probability nothing is promised to a client."
    return (
        f"The encoder is ({epsilon:.3g}, {delta:.2g})-differentially private for whole clients: whether any one client "
        f"with all of its images is in the population changes the probability of any outcome by at most a factor "
        f"exp({epsilon:.3g}), and {delta:.2g}. It holds if {drawn}, the server clips and adds the noise as "
        f"described and is trusted with the updates, and the seed stays secret.{stands_for}"
    )
