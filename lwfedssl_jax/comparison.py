"""Settings (runs that differ in the seed alone), their means over seeds, and differences paired over seeds."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lwfedssl_jax.config import Config
from lwfedssl_jax.results import COSTS, END_TO_END, SEED, STRATEGY

if TYPE_CHECKING:
    import pandas as pd

# Fields that a label names first, by their value alone.
BY_VALUE = (STRATEGY, "objective.name", "data.name", "model.name", "partition.kind", "federation.aggregator")
ALL_PAIRS = 4  # settings up to which every pair is compared
CHANCE = 0.05  # from which p on a difference is said to be perhaps chance
SAME = 1e-9  # differences of accuracies that are nearer than this are equal but for rounding
SECTIONS = tuple(f.name for f in dataclasses.fields(Config))


class Setting(NamedTuple):
    """A row of ``settle``'s table of settings.

    Attributes:
      label: the name that the only sweep among the runs has for it, else what tells it from the others.
      strategy: its strategy.
      rest: what else tells it from the others; empty where nothing does.
      values: of the fields in which settings differ.
    """

    label: str
    strategy: str
    rest: str
    values: dict[str, Any]


def settle(results: "pd.DataFrame") -> tuple["pd.DataFrame", list[Setting]]:
    """Group the finished runs by what they share but for ``runtime.seed``.

    Labels hold only what differs between settings: of its fields, in order, those that tell further ones apart, and
    not the value that more than two thirds of the settings have.

    Args:
      results: as ``load_results`` gives it.

    Returns:
      The finished runs with their setting's label as ``setting``, of runs of one setting and seed the first; and the
      settings in the order of their first runs.
    """
    import pandas as pd

    finished = results[results["finished"]].reset_index(drop=True)
    fields = [c for c in finished.columns if c.split(".")[0] in SECTIONS and c != SEED] + ["config_file"]
    keys = [tuple(None if pd.isna(v) else v for v in row) for row in finished[fields].itertuples(index=False)]
    unique = list(dict.fromkeys(keys))
    table = {field: values for field, values in zip(fields, zip(*unique, strict=True), strict=False)}
    differing = {field: values for field, values in table.items() if len(set(values)) > 1}
    ordered = sorted(differing, key=lambda f: BY_VALUE.index(f) if f in BY_VALUE else len(BY_VALUE))
    chosen = _telling_apart([(field, differing[field]) for field in ordered])
    settings = []
    for i in range(len(unique)):
        words = {f: _word(f, table[f][i]) for f in chosen if not _is_usual(f, table[f], i)}
        strategy = str(table[STRATEGY][i]) if STRATEGY in table else ""
        rest = ", ".join(word for field, word in words.items() if field != STRATEGY)
        own = ", ".join(words.values()) or strategy or "as usual"
        settings.append(Setting(own, strategy, rest, {f: v[i] for f, v in differing.items()}))
    given = [finished["label"][keys.index(key)] or s.label for key, s in zip(unique, settings, strict=True)]
    places = {Path(path).parent for path, label in zip(finished["path"], finished["label"], strict=True) if label}
    if len(places) == 1 and len(set(given)) == len(given):  # of several sweeps the names say less than is needed
        settings = [s._replace(label=label) for s, label in zip(settings, given, strict=True)]
    numbers = [unique.index(key) for key in keys]
    seeds = finished[SEED] if SEED in finished else [None] * len(keys)
    again = pd.Series(list(zip(numbers, seeds, strict=True)), dtype=object).duplicated()
    return finished.assign(setting=[settings[i].label for i in numbers])[~again], settings


def _telling_apart(fields: Sequence[tuple[str, Sequence[Any]]]) -> list[str]:
    """Of fields with their values by setting, those that split the settings further than the ones before."""
    chosen: list[tuple[str, Sequence[Any]]] = []
    groups = 1
    for field, values in fields:
        split = len(set(zip(*(v for _, v in chosen), values, strict=True)))
        if split > groups:
            chosen.append((field, values))
            groups = split
    return [field for field, _ in chosen]


def _is_usual(field: str, values: Sequence[Any], i: int) -> bool:
    """Whether the value of setting ``i`` need not be said: more than two thirds of the settings have it."""
    return field not in BY_VALUE and 3 * values.count(values[i]) > 2 * len(values)


def _word(field: str, value: Any) -> str:
    shown = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    if field == "config_file":
        return f"config file {shown[:8] or 'by name'}"
    if field in BY_VALUE:
        return shown
    return f"{field.partition('.')[2].replace('_', ' ')} {'unknown' if value is None else shown or 'none'}"


def protocols(results: "pd.DataFrame") -> list[str]:
    """Protocols that judged finished runs: those that judged most of them first, else in the order of evaluation."""
    finished = results[results["finished"]]
    found = [c for c in finished.columns if c.startswith("accuracy.") and finished[c].notna().any()]
    found.sort(key=lambda c: -int(finished[c].notna().sum()))
    return [c.removeprefix("accuracy.") for c in found]


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
