"""The audit of a run's privacy: how well its canaries can be told from those that were not in it.

The score of a canary is the sum over the rounds of the cosine of what it uploads, or would have, and the change of the
global model. Under Gaussian noise scores are normal, and the distance of the two groups' means in standard deviations
is that of a Gaussian mechanism, whose epsilon is the estimate (Andrew et al., 2024). Besides, a threshold chosen on
half of the canaries gives rates on the other half, and these a lower bound that needs no normal distribution.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from lwfedssl_jax.config import Config
from lwfedssl_jax.costs.accountant import epsilon_of_noise
from lwfedssl_jax.method.canaries import COSINES, inside, signs
from lwfedssl_jax.method.stages import Stage

CONFIDENCE = 0.95


class Audit(TypedDict):
    """What the canaries say; ``privacy.audit`` in ``summary.json``.

    Attributes:
      canaries: their number, half of which were in the population.
      estimate: of epsilon, by how far apart the scores of the two halves are.
      estimate_from, estimate_to: its interval at 95 % confidence.
      at_least: a lower bound of epsilon at 95 % confidence, by the rates of a threshold.
      broken: whether the interval or the bound is above the accounted epsilon.
      says: the above in words.
    """

    canaries: int
    estimate: float
    estimate_from: float
    estimate_to: float
    at_least: float
    broken: bool
    says: str


def scores(config: Config, stages: Sequence[Stage], lines: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Return the score of each canary, M numbers, from the lines of a run's rounds."""
    total = np.zeros(config.privacy.canaries)
    by_round = {line["round"]: np.asarray(line[COSINES]) for line in lines if COSINES in line}
    for stage in stages:
        of_stage = signs(config, stage)
        for i in range(stage.rounds):
            if (number := stage.first_round + 1 + i) in by_round:
                total += of_stage[:, i] * by_round[number]
    return total


def audit(
    config: Config, stages: Sequence[Stage], lines: Sequence[Mapping[str, Any]], epsilon: float | None, delta: float
) -> Audit:
    """Compare the canaries that were in the population with those that were not.

    Args:
      config: resolved, with canaries.
      stages: of the run.
      lines: of its rounds.
      epsilon, delta: as accounted; None for infinite.
    """
    found, chosen = scores(config, stages, lines), inside(config)
    ins, outs = found[chosen], found[~chosen]
    deviation = math.sqrt((ins.var(ddof=1) + outs.var(ddof=1)) / 2)
    distance = float(ins.mean() - outs.mean()) / max(deviation, 1e-30)
    # Of a standardised difference of means (Hedges and Olkin, 1985).
    error = 1.96 * math.sqrt(1 / len(ins) + 1 / len(outs) + distance**2 / (2 * len(found)))
    low, middle, high = (
        epsilon_of_noise(1 / max(x, 1e-9), delta) for x in (distance - error, distance, distance + error)
    )
    least = lower_bound(ins, outs, delta)
    broken = epsilon is not None and max(low, least) > epsilon
    accounted = "infinite" if epsilon is None else f"{epsilon:.3g}"
    verdict = (
        "That is more than was accounted: the mechanism does not do what is promised."
        if broken
        else "That does not prove the promise: another attack may do better."
    )
    return {
        "canaries": len(found),
        "estimate": middle,
        "estimate_from": low,
        "estimate_to": high,
        "at_least": least,
        "broken": broken,
        "says": f"{len(found)} canaries give an estimate of epsilon of {middle:.3g} ({low:.3g} to {high:.3g} with "
        f"95 % confidence, if their scores are normal), and a lower bound without that assumption of {least:.3g}; "
        f"{accounted} was accounted. {verdict}",
    }


def lower_bound(ins: np.ndarray, outs: np.ndarray, delta: float) -> float:
    """Return a lower bound of epsilon: of a threshold that the first half of the scores chooses, by the second's rates.

    The rates have Clopper-Pearson bounds that hold together at 95 % confidence.
    """
    from scipy.stats import beta

    half_in, half_out = len(ins) // 2, len(outs) // 2

    def bound(threshold: float, a: np.ndarray, b: np.ndarray, level: float) -> float:
        hits, false = int((a >= threshold).sum()), int((b >= threshold).sum())
        least = beta.ppf(level, hits, len(a) - hits + 1) if hits else 0.0
        most = beta.ppf(1 - level, false + 1, len(b) - false) if false < len(b) else 1.0
        return math.log(max(least - delta, 1e-300) / most)

    level = (1 - CONFIDENCE) / 2
    candidates = np.concatenate([ins[:half_in], outs[:half_out]])
    threshold = max(candidates, key=lambda t: bound(t, ins[:half_in], outs[:half_out], level))
    return max(0.0, bound(threshold, ins[half_in:], outs[half_out:], level))
