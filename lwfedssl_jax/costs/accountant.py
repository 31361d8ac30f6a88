"""The privacy accountant: the epsilon of a run, and the noise for an epsilon.

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
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.costs.fleet import Fleet
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.task import Mechanism

LEAST_NOISE, MOST_NOISE = 0.1, 2.0**20  # multipliers that are tried
TOLERANCE = 1e-3  # of a multiplier that is found


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
    """Return probability and sensitivity of a round, by the number of clients that are eligible for it."""
    cohort = config.cohort_size
    if config.federation.sampling == "poisson":
        return min(1.0, cohort / eligible), 1.0
    # With as many as are drawn, one more would take the place of another, unless all clients always take part.
    return 1.0, 1.0 if cohort == config.partition.clients or eligible < cohort else 2.0


def expected_reports(config: Config, eligible: int) -> float:
    """Return how many clients report in a round on average, by the number that are eligible for it."""
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


def accountant_name() -> str:
    """Return the accountant's library, version and method."""
    return f"dp-accounting {importlib.metadata.version('dp-accounting')}, PLD"
