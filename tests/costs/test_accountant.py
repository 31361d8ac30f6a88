"""The privacy accountant: against the exact Gaussian mechanism and a composition by FFT, and what it counts."""

import importlib.util
import math
from typing import Any

import numpy as np
import pytest
from conftest import small_config
from scipy.stats import norm

from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.costs import accountant, privacy
from lwfedssl_jax.costs.accountant import Exposure, Releases
from lwfedssl_jax.costs.fleet import Fleet
from lwfedssl_jax.experiment.checks import check
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.simulation import setup

# q, z, rounds, delta, epsilon: Gaussian noise as others published it, with looser bounds; the last column is today's.
SETTINGS = [
    (0.1, 1.2, 36, 1e-3, 1.9890),
    (0.01, 1.0, 1000, 1e-5, 1.8282),
    (0.01, 4.0, 10_000, 1e-5, 0.9470),
    (256 / 60_000, 1.3, 3515, 1e-5, 0.8645),
    (0.1, 0.755, 36, 1e-5, 7.972),
]


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of the Gaussian mechanism of sensitivity over noise ``mu`` (Balle and Wang, 2018, theorem 8)."""

    def delta_at(epsilon: float) -> float:
        tail = norm.logcdf(-mu / 2 - epsilon / mu) + epsilon
        return float(norm.cdf(mu / 2 - epsilon / mu) - np.exp(tail))

    return bisect(delta_at, delta)


def bisect(delta_at: Any, delta: float) -> float:
    low, high = 0.0, 500.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if delta_at(middle) > delta else (low, middle)
    return high


def fft_epsilon(q: float, z: float, rounds: int, delta: float) -> float:
    """Epsilon of Poisson-sampled Gaussian rounds: losses on a grid, composed by FFT; the larger of both directions."""
    return max(fft_of_losses(q, z, rounds, delta, adds) for adds in (True, False))


def fft_of_losses(q: float, z: float, rounds: int, delta: float, adds: bool) -> float:
    width, count = 64.0, 2**20
    grid = np.linspace(-width, width, count, endpoint=False)
    step = grid[1] - grid[0]
    edges = np.append(grid - step / 2, grid[-1] + step / 2)

    def outcome_at(loss: np.ndarray) -> np.ndarray:  # of log((1 - q) + q exp((2x - 1) / 2z^2)), which rises with x
        odds = np.exp(np.minimum(loss, 700)) - (1 - q)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(odds > 0, z**2 * np.log(odds / q) + 0.5, -np.inf)

    if adds:
        below = (1 - q) * norm.cdf(outcome_at(edges) / z) + q * norm.cdf((outcome_at(edges) - 1) / z)
    else:
        below = 1 - norm.cdf(outcome_at(-edges) / z)
    mass = np.diff(below)
    composed = np.fft.irfft(np.fft.rfft(np.fft.ifftshift(mass)) ** rounds, count)
    losses = np.fft.fftshift(composed)

    def delta_at(epsilon: float) -> float:
        beyond = grid > epsilon
        return float((losses[beyond] * -np.expm1(epsilon - grid[beyond])).sum())

    return bisect(delta_at, delta)


@pytest.mark.parametrize(("q", "z", "rounds", "delta", "epsilon"), SETTINGS)
def test_sampled_rounds_equal_a_composition_by_fft(
    q: float, z: float, rounds: int, delta: float, epsilon: float
) -> None:
    found = accountant.epsilon_of((Releases(q, 1.0, rounds),), z, delta)
    assert found == pytest.approx(fft_epsilon(q, z, rounds, delta), rel=1e-3)
    assert found == pytest.approx(epsilon, abs=1e-3)


@pytest.mark.parametrize(("z", "rounds", "delta"), [(10.0, 180, 1e-5), (1.0, 1, 1e-6), (30.0, 36, 1e-3)])
def test_rounds_of_all_clients_are_one_gaussian_mechanism(z: float, rounds: int, delta: float) -> None:
    exact = gaussian_epsilon(math.sqrt(rounds) / z, delta)
    assert accountant.epsilon_of((Releases(1.0, 1.0, rounds),), z, delta) == pytest.approx(exact, rel=1e-3)
    # Two clips further, as in a fixed cohort in which somebody else takes the place, is half the noise.
    exact = gaussian_epsilon(2 * math.sqrt(rounds) / z, delta)
    assert accountant.epsilon_of((Releases(1.0, 2.0, rounds),), z, delta) == pytest.approx(exact, rel=1e-3)


def test_epsilon_rises_with_rounds_and_sampling_and_falls_with_noise() -> None:
    def of(q: float, z: float, rounds: int) -> float:
        return accountant.epsilon_of((Releases(q, 1.0, rounds),), z, 1e-4)

    assert of(0.1, 1, 10) < of(0.1, 1, 20) < of(0.2, 1, 20) < of(1, 1, 20) < of(1, 0.8, 20)
    assert accountant.epsilon_of((), 1, 1e-4) == 0
    assert of(0.1, 0, 1) == math.inf


@pytest.mark.parametrize(
    "exposure",
    [(Releases(0.1, 1.0, 36),), (Releases(1.0, 2.0, 60),), (Releases(0.5, 1.0, 4), Releases(1.0, 1.0, 5))],
)
def test_the_noise_for_an_epsilon_is_the_smallest(exposure: Exposure) -> None:
    z = accountant.noise_for((exposure,), 4.0, 1e-4)
    assert accountant.epsilon_of(exposure, z, 1e-4) <= 4.0 < accountant.epsilon_of(exposure, z * 0.997, 1e-4)
    assert accountant.noise_for((exposure, ()), 4.0, 1e-4) == z


def stages(config: Config) -> list[Stage]:
    return setup.prepare(config).stages


SHARED = {"partition__kind": "shared", "partition__clients": 20, "partition__examples_per_client": 8}


def test_what_a_client_is_exposed_to() -> None:
    poisson = SHARED | {"federation__sampling": "poisson", "federation__clients_per_round": 5}
    for strategy in ("layerwise", "progressive", "end_to_end"):
        config = small_config(**poisson, strategy__name=strategy)
        assert accountant.exposures(config, stages(config)) == {"": (Releases(0.25, 1.0, 3),)}
    assert accountant.exposures(config, stages(config), rounds=2) == {"": (Releases(0.25, 1.0, 2),)}
    fixed = small_config(**SHARED, federation__clients_per_round=5)
    assert accountant.exposures(fixed, stages(fixed)) == {"": (Releases(1.0, 2.0, 3),)}
    assert accountant.exposure([(3, 5)], fixed) == (Releases(1.0, 2.0, 3),)  # one more would take somebody's place
    assert accountant.exposure([(3, 4)], fixed) == (Releases(1.0, 1.0, 3),)
    everyone = small_config(**SHARED)
    assert accountant.exposures(everyone, stages(everyone)) == {"": (Releases(1.0, 1.0, 3),)}


def test_device_classes_have_their_own_epsilon_and_the_largest_is_promised() -> None:
    config = small_config(
        **SHARED, federation__sampling="poisson", federation__clients_per_round=5, federation__rounds=12,
        privacy__clip=0.01, privacy__noise_multiplier=1.0, privacy__delta=1e-3,
    )  # fmt: skip
    laptops, of_run = np.arange(20) < 4, stages(config)
    can = {1: np.ones(20, bool), 2: laptops, 3: laptops}
    devices: Any = [type("Device", (), {"name": name}) for name in ("laptop", "phone", "none")]
    fleet = Fleet(devices, np.where(laptops, 0, 1), [], can)
    found = accountant.exposures(config, of_run, fleet)
    assert found == {"laptop": (Releases(0.25, 1.0, 4), Releases(1.0, 1.0, 8)), "phone": (Releases(0.25, 1.0, 4),)}
    costs = [{"stage": i, "trainable_parameters": 100 * i} for i in (1, 2, 3)]
    promise = privacy.promise(config, of_run, costs, fleet)
    by_class = promise["by_class"]
    assert by_class["phone"] == accountant.epsilon_of((Releases(0.25, 1.0, 4),), 1.0, 1e-3)
    assert by_class["phone"] < by_class["laptop"] == promise["epsilon"]
    assert accountant.epsilon_after(config, 1.0, of_run, fleet, 4) == by_class["phone"]
    assert accountant.epsilon_after(config, 1.0, of_run, fleet, 12) == promise["epsilon"]
    stage = promise["per_stage"][2]  # in which four clients can take part
    assert stage["clip_norm"] == pytest.approx(0.01 * math.sqrt(300))
    assert stage["noise_norm"] == pytest.approx(promise["noise_multiplier"] * 0.01 * 300 / 4)
    assert "Epsilon by class of devices: laptop" in promise["says"]
    assert stage["noise_over_clip"] == pytest.approx(promise["noise_multiplier"] * math.sqrt(300) / 4)
    assert promise["epsilon_if_poisson"] is None


def test_a_promise_says_whose_it_is() -> None:
    fields = {"privacy__clip": 0.01, "privacy__noise_multiplier": 2.0, "federation__clients_per_round": 5}

    def promise(**more: Any) -> privacy.Promise:
        config = small_config(**SHARED | fields | more)
        return privacy.promise(config, stages(config), [{"stage": 1, "trainable_parameters": 100}])

    fixed, poisson = promise(), promise(federation__sampling="poisson")
    assert fixed["epsilon"] == pytest.approx(gaussian_epsilon(math.sqrt(3), 20**-1.1), rel=1e-3)
    assert fixed["epsilon_if_poisson"] == poisson["epsilon"] < fixed["epsilon"]
    assert poisson["epsilon_if_poisson"] is None
    assert poisson["delta"] == 20**-1.1
    assert "Poisson sampling" in poisson["says"]
    larger = promise(federation__sampling="poisson", privacy__noise_cohort=50, federation__dropout=0.5)
    assert (larger["clients"], larger["cohort"], larger["simulated_clients"]) == (200, 50, 20)
    assert larger["delta"] == 200**-1.1
    assert "federation of 200 clients, 50 per round" in larger["says"]
    ratio = larger["per_stage"][0]["noise_over_clip"] / poisson["per_stage"][0]["noise_over_clip"]
    assert ratio == pytest.approx(0.1 / 0.5)  # a tenth of the noise, half of the reports
    assert "A delta of 0.037 is large" in poisson["says"]
    assert "drawn uniformly" in fixed["says"]
    assert f"which they are not, epsilon would be {poisson['epsilon']:.3g}" in fixed["says"]
    assert "protects hardly anyone" in promise(privacy__noise_multiplier=0.3)["says"]
    assert "all clients that can take part do so" in promise(federation__clients_per_round=0)["says"]
    clipped = promise(privacy__noise_multiplier=0.0)
    assert (clipped["epsilon"], clipped["noise_multiplier"], clipped["accountant"]) == (None, 0, "none")
    assert "nothing is promised" in clipped["says"]


def test_count_and_sum_together_are_one_release() -> None:
    config = small_config(**SHARED, privacy__clip=0.01, privacy__quantile=0.5, privacy__noise_multiplier=0.5)
    found = accountant.mechanism(config, 0.5)
    assert found.count_noise == 1.0  # a twentieth of 20
    assert float(found.noise) ** -2 + (2 * float(found.count_noise)) ** -2 == pytest.approx(0.5**-2)
    with pytest.raises(
        ConfigError, match=r"^privacy.count_noise: 1 clients is too little .* 2; accepted: more than 1, or"
    ):
        accountant.mechanism(config, 2.0)


def test_without_the_library_noise_is_refused_and_clipping_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "dp_accounting" else found(name))
    check(small_config(privacy__clip=0.01))
    for field, value in (("epsilon", 2.0), ("noise_multiplier", 1.0)):
        accepted = r'accepted: 0.0, or pip install "lwfedssl_jax\[privacy\]"'
        with pytest.raises(ConfigError, match=rf"^privacy.{field}: needs dp-accounting; {accepted}$"):
            check(small_config(privacy__clip=0.01, **{f"privacy__{field}": value}))
    with pytest.raises(ConfigError, match=r"^privacy.epsilon: 1e-08 needs noise of more than 1,048,576 clips"):
        accountant.noise_for(((Releases(1.0, 1.0, 100),),), 1e-8, 1e-9)
