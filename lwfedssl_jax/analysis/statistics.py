"""Means over seeds, paired tests, Holm's correction."""

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lwfedssl_jax.analysis.results import COSTS, END_TO_END, SEED
from lwfedssl_jax.analysis.settings import Setting

if TYPE_CHECKING:
    import pandas as pd


ALL_PAIRS = 4  # settings up to which every pair is compared
CHANCE = 0.05  # from which p on a difference is said to be perhaps chance
SAME = 1e-9  # differences of accuracies that are nearer than this are equal but for rounding


def over_seeds(runs: "pd.DataFrame") -> "pd.DataFrame":
    """For each setting and number of a run its mean, sample standard deviation and count over seeds.

    Args:
      runs: as ``settle`` gives them.

    Returns:
      Rows are settings; columns are pairs such as ``("accuracy.knn", "mean")``, with ``std`` (NaN for one seed) and
      ``count``.
    """
    kinds = ("accuracy", "untrained", "scratch", END_TO_END)
    numbers = [c for c in runs.columns if c.split(".")[0] in kinds]
    numbers += [*COSTS, "measured_bytes_per_client", "rounds", "seconds"]
    return runs.groupby("setting", sort=False)[numbers].agg(["mean", "std", "count"])


class Difference(NamedTuple):
    """Accuracy of a setting less that of another, over the seeds that both have.

    Attributes:
      mean: of the differences, in [-1, 1]; NaN where there is no common seed.
      low, high: 95 % confidence interval of the mean by Student's t; NaN where it was not computed.
      p: of the paired t-test; NaN where it was not computed.
      p_holm: adjusted for all comparisons by this protocol (Holm, 1979).
      why_not: why there is no test; empty where there is.
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

    def __str__(self) -> str:
        if not self.seeds:
            return f"{self.setting} and {self.against} share no seed"
        side = "above" if self.mean >= 0 else "below"
        said = f"{self.setting} {side} {self.against} by {100 * abs(self.mean):.1f} points"
        if self.why_not:
            return f"{said} ({self.why_not})"
        adjusted = "not adjusted" if np.isnan(self.p_holm) else f"adjusted {self.p_holm:.2g}"
        low, high = (self.low, self.high) if self.mean >= 0 else (-self.high, -self.low)
        interval = f"95 % CI {100 * low:.1f} to {100 * high:.1f}"
        return f"{said} ({interval}, p = {self.p:.2g}, {adjusted}, {self.seeds} seeds)"


def differences(runs: "pd.DataFrame", settings: Sequence[Setting], protocol: str) -> list[Difference]:
    """Compare settings by paired t-tests over their common seeds.

    Up to four settings: every pair. More: each against the end_to_end setting that differs from it in the fewest
    fields, or against the first setting where no other strategy stands beside end_to_end, or none is end_to_end.
    Settings on different data are never compared. p is adjusted (Holm) over what is returned.

    Args:
      runs, settings: as ``settle`` gives them.
      protocol: such as ``knn``.
    """
    found = [
        paired(runs, setting.label, against.label, protocol)
        for setting, against in _pairs(settings)
        if setting.values.get("data.name") == against.values.get("data.name")
    ]
    adjusted = holm([d.p for d in found])
    return [d._replace(p_holm=p) for d, p in zip(found, adjusted, strict=True)]


def _pairs(settings: Sequence[Setting]) -> list[tuple[Setting, Setting]]:
    if len(settings) <= ALL_PAIRS:
        return [(after, before) for before, after in itertools.combinations(settings, 2)]
    baselines = [s for s in settings if s.strategy == END_TO_END]
    if len(baselines) in (0, len(settings)):
        baselines = [settings[0]]

    return [(s, baseline_of(s, baselines)) for s in settings if s not in baselines]


def baseline_of(setting: Setting, baselines: Sequence[Setting]) -> Setting:
    """The one on the same data, if there is one, that differs from the setting in the fewest fields."""

    def distance(other: Setting) -> tuple[bool, int]:
        differ = [field for field, value in setting.values.items() if other.values[field] != value]
        return "data.name" in differ, len(differ)

    return min(baselines, key=distance)


def paired(runs: "pd.DataFrame", setting: str, against: str, protocol: str) -> Difference:
    """``setting`` less ``against`` over the seeds they share; not adjusted."""
    by_seed = runs.set_index(SEED)
    of = lambda label: by_seed.loc[by_seed["setting"] == label, f"accuracy.{protocol}"].dropna().to_dict()  # noqa: E731
    return compare(protocol, setting, against, of(setting), of(against))


def compare(
    protocol: str, setting: str, against: str, first: Mapping[int, float], second: Mapping[int, float]
) -> Difference:
    """The accuracies of two settings by seed, ``first`` those of ``setting``; not adjusted."""
    difference = np.array([value - second[seed] for seed, value in first.items() if seed in second])
    mean = float(difference.mean()) if len(difference) else float("nan")
    found = Difference(protocol, setting, against, len(difference), mean)
    if len(difference) < 2:
        return found._replace(why_not=f"{len(difference) or 'no'} common seed: no test")
    if np.ptp(difference) < SAME:  # no variance: t would be infinite
        return found._replace(why_not=f"the same in all {len(difference)} seeds: no test")
    from scipy.stats import ttest_1samp

    test = ttest_1samp(difference, 0.0)
    low, high = test.confidence_interval(0.95)
    return found._replace(low=float(low), high=float(high), p=float(test.pvalue))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment of p-values: those that are NaN stay so and do not count."""
    values = np.asarray(p, float)
    order = np.argsort(values)[: np.count_nonzero(~np.isnan(values))]
    factors = np.arange(len(order), 0, -1)
    adjusted = np.full(len(values), np.nan)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * values[order]), 1)
    return [float(x) for x in adjusted]
