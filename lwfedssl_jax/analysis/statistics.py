"""Means over seeds, paired t-tests and Holm's correction."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from lwfedssl_jax.analysis.results import END_TO_END, SEED
from lwfedssl_jax.analysis.settings import Setting
from lwfedssl_jax.analysis.wording import COSTS

ALL_PAIRS = 4  # largest number of settings of which every pair is compared
CHANCE = 0.05  # p from which a difference is reported as possibly due to chance
SAME = 1e-9  # spread of differences between accuracies up to which it is attributed to rounding


def over_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """Summarise every numeric column of the runs by setting, over seeds.

    Args:
      runs: as ``settings.group_by_setting`` returns them.

    Returns:
      A frame with one row per setting, by label. Columns are pairs such as ``("accuracy.knn", "mean")``, also with
      ``std`` (sample standard deviation, NaN for one seed) and ``count``.
    """
    kinds = ("accuracy", "untrained", "scratch", END_TO_END)
    numbers = [c for c in runs.columns if c.split(".")[0] in kinds]
    numbers += [*COSTS, "measured_bytes_per_client", "rounds", "seconds"]
    return runs.groupby("setting", sort=False)[numbers].agg(["mean", "std", "count"])


def common_seeds(each: Sequence[Collection[int]]) -> frozenset[int]:
    """Return the seeds over which settings are ranked: of those that any two of them share, with which most runs count.

    A setting that lacks one of them is not ranked, so that no mean over few seeds wins by a lucky one. The runs that
    count are those of the other settings with these seeds. With equally many, more seeds go first, then the smallest.

    Args:
      each: the seeds of each setting.

    Returns:
      The seeds; none if no two settings share one.
    """
    pairs = {frozenset(a) & frozenset(b) for a, b in itertools.combinations(each, 2)}

    def rank(seeds: frozenset[int]) -> tuple[int, int, list[int]]:
        having = sum(seeds <= frozenset(own) for own in each)
        return -len(seeds) * having, -len(seeds), sorted(seeds)

    return min(pairs, key=rank, default=frozenset())


class Difference(NamedTuple):
    """The accuracy of one setting minus that of another, over the seeds that both have.

    Attributes:
      protocol: the evaluation protocol.
      setting, against: labels of the two.
      seeds: number of common seeds.
      mean: of the differences, in [-1, 1]; NaN without a common seed.
      low, high: 95 % confidence interval of the mean by Student's t; NaN if not computed.
      p: of the paired t-test; NaN if not computed.
      p_holm: p adjusted for all comparisons of the page (Holm, 1979).
      why_not: why there is no test, or an empty string.
      factor: what differs, if these are levels of a factor and not settings (``effects.main_effects``).
      pairs: of settings that the mean of each seed is over.
    """

    protocol: str
    setting: str
    against: str
    seeds: int
    mean: float
    low: float = float("nan")
    high: float = float("nan")
    p: float = float("nan")
    p_holm: float = float("nan")
    why_not: str = ""
    factor: str = ""
    pairs: int = 1

    def __str__(self) -> str:
        if not self.seeds:
            return f"{self.setting} and {self.against} share no seed"
        side = "above" if self.mean >= 0 else "below"
        over = f", on average over {self.pairs} pairs of settings" if self.pairs > 1 else ""
        sentence = f"{self.setting} is {100 * abs(self.mean):.1f} points {side} {self.against}{over}"
        if self.why_not:
            return f"{sentence} ({self.why_not})"
        low, high = (self.low, self.high) if self.mean >= 0 else (-self.high, -self.low)
        interval = f"95 % CI {100 * low:.1f} to {100 * high:.1f}"
        tested = "not tested: chosen after the fact" if np.isnan(self.p_holm) else f"adjusted p = {self.p_holm:.2g}"
        return f"{sentence} ({interval}, {tested}, {self.seeds} seeds)"


def adjust(compared: Sequence[Difference]) -> list[Difference]:
    """Adjust the p-values of differences for all of them by Holm's method."""
    return [d._replace(p_holm=p) for d, p in zip(compared, holm([d.p for d in compared]), strict=True)]


def pairs_of(settings: Sequence[Setting]) -> list[tuple[Setting, Setting]]:
    """Return the pairs of settings to compare: all of up to four, otherwise each with the nearest end_to_end setting.

    If all or none are end_to_end, the first setting takes its place.
    """
    if len(settings) <= ALL_PAIRS:
        return [(after, before) for before, after in itertools.combinations(settings, 2)]
    baselines = [s for s in settings if s.strategy == END_TO_END]
    if len(baselines) in (0, len(settings)):
        baselines = [settings[0]]
    return [(s, baseline_of(s, baselines)) for s in settings if s not in baselines]


def baseline_of(setting: Setting, baselines: Sequence[Setting]) -> Setting:
    """The baseline that differs from the setting in the fewest fields, on the same data if there is one."""

    def distance(other: Setting) -> tuple[bool, int]:
        differ = [field for field, value in setting.values.items() if other.values[field] != value]
        return "data.name" in differ, len(differ)

    return min(baselines, key=distance)


def paired(runs: pd.DataFrame, setting: str, against: str, protocol: str) -> Difference:
    """Compare two settings, given by label, over the seeds that they share; p is not adjusted."""
    by_seed = runs.set_index(SEED)
    first, second = (
        by_seed.loc[by_seed["setting"] == label, f"accuracy.{protocol}"].dropna().to_dict()
        for label in (setting, against)
    )
    return compare(protocol, setting, against, first, second)


def compare(
    protocol: str, setting: str, against: str, first: Mapping[int, float], second: Mapping[int, float]
) -> Difference:
    """Compare the accuracies by seed of two settings: ``first`` of ``setting``, ``second`` of ``against``.

    p is not adjusted.
    """
    difference = np.array([value - second[seed] for seed, value in first.items() if seed in second])
    mean = float(difference.mean()) if len(difference) else float("nan")
    untested = Difference(protocol, setting, against, len(difference), mean)
    if len(difference) < 2:
        return untested._replace(why_not=f"{len(difference) or 'no'} common seed: no test")
    if np.ptp(difference) < SAME:  # no variance: t would be infinite
        return untested._replace(why_not=f"the same in all {len(difference)} seeds: no test")
    from scipy.stats import ttest_1samp

    test = ttest_1samp(difference, 0.0)
    low, high = test.confidence_interval(0.95)
    return untested._replace(low=float(low), high=float(high), p=float(test.pvalue))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values; NaN stays NaN and does not count."""
    values = np.asarray(p, float)
    order = np.argsort(values)[: np.count_nonzero(~np.isnan(values))]
    factors = np.arange(len(order), 0, -1)
    adjusted = np.full(len(values), np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * values[order]), 1)
    return [float(x) for x in adjusted]
