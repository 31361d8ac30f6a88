"""What differs between settings: the world that they are trained in, and the effect of each choice."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from lwfedssl_jax.analysis.results import END_TO_END, EVALUATION_FINGERPRINT, SEED
from lwfedssl_jax.analysis.settings import Setting, value_words
from lwfedssl_jax.analysis.statistics import Difference, compare

# Sections and fields that say what a run is trained on, and under which conditions: no choice of who trains.
WORLD_SECTIONS = ("data", "partition", "fleet")
LABELS_FIELDS = (EVALUATION_FINGERPRINT, "evaluation.labelled_split")
PRIVACY_FIELDS = (  # what is promised; the clip is a choice
    "federation.sampling", "privacy.epsilon", "privacy.noise_multiplier", "privacy.delta", "privacy.noise_cohort"
)  # fmt: skip
WORLD_FIELDS = (*LABELS_FIELDS, *PRIVACY_FIELDS)
DATA_FIELDS = ("data.name", "data.fingerprint", *LABELS_FIELDS)  # across these, accuracies are never compared


class World(NamedTuple):
    """Settings that are trained on the same data, dealt out alike, on the same devices; one of them may be best."""

    name: str
    settings: list[Setting]


class Factor(NamedTuple):
    """Fields that change together from setting to setting.

    Attributes:
      name: in words, such as "strategy".
      levels: the words of each of its values, in the order of the settings.
      of: the level of each setting, by label.
    """

    name: str
    levels: list[str]
    of: dict[str, int]


def in_world(field: str) -> bool:
    """Return whether a config field is of the world, not a choice."""
    return field.partition(".")[0] in WORLD_SECTIONS or field in WORLD_FIELDS


def worlds(settings: Sequence[Setting]) -> list[World]:
    """Group settings by the values of the fields of their world; each is named by those that differ."""
    groups: dict[tuple[Any, ...], list[Setting]] = {}
    for setting in settings:
        key = tuple(value for field, value in setting.values.items() if in_world(field))
        groups.setdefault(key, []).append(setting)
    return [World(_world_name(members[0]) if len(groups) > 1 else "", members) for members in groups.values()]


def by_data(settings: Sequence[Setting]) -> list[list[Setting]]:
    """Group settings by the data that they are trained and evaluated on."""
    groups: dict[tuple[Any, ...], list[Setting]] = {}
    for setting in settings:
        groups.setdefault(tuple(setting.values.get(field) for field in DATA_FIELDS), []).append(setting)
    return list(groups.values())


def _world_name(setting: Setting) -> str:
    shown = {f: v for f, v in setting.values.items() if in_world(f)}
    readable = {f: v for f, v in shown.items() if "fingerprint" not in f} or shown
    return ", ".join(value_words(field, value) for field, value in readable.items())


def factors(settings: Sequence[Setting]) -> list[Factor]:
    """Return the factors in which settings differ; fields that change together are one."""
    by_pattern: dict[tuple[int, ...], list[str]] = {}
    for field in settings[0].values if settings else ():
        values = [setting.values[field] for setting in settings]
        order = list(dict.fromkeys(values))
        pattern = tuple(order.index(value) for value in values)
        if len(order) > 1:
            by_pattern.setdefault(pattern, []).append(field)
    found = []
    for pattern, fields in by_pattern.items():
        named = [f for f in fields if "fingerprint" not in f] or fields
        levels = {}
        for level, setting in zip(pattern, settings, strict=True):
            levels[level] = ", ".join(value_words(field, setting.values[field]) for field in named)
        name = " and ".join(field.removesuffix(".name").rpartition(".")[2].replace("_", " ") for field in named)
        of = {setting.label: level for level, setting in zip(pattern, settings, strict=True)}
        found.append(Factor(name, list(levels.values()), of))
    return sorted(found, key=lambda factor: factor.name != "strategy")


def main_effects(runs: pd.DataFrame, settings: Sequence[Setting], protocol: str) -> list[Difference]:
    """Compare each level of each factor with a reference, paired over seeds and over all other factors.

    Each pair of settings that differ in one factor alone gives a difference for each common seed; these are averaged
    within a seed, and the test is over seeds. The reference is end_to_end, or otherwise the first level.

    Args:
      runs, settings: as ``settings.group_by_setting`` returns them; the settings are trained on the same data.
      protocol: such as ``knn``.

    Returns:
      Differences with unadjusted p, of levels that have at least one such pair.
    """
    accuracy = {
        label: members.set_index(SEED)[f"accuracy.{protocol}"].dropna().to_dict()
        for label, members in runs.groupby("setting", sort=False)
    }
    known, found, none = factors(settings), [], dict[int, float]()
    for factor in known:
        others = [other for other in known if other is not factor]
        reference = factor.levels.index(END_TO_END) if END_TO_END in factor.levels else 0
        for level, words in enumerate(factor.levels):
            matched = matched_pairs(settings, factor, others, (level, reference))
            pairs = [(a, b) for a, b in matched if accuracy.get(a, none).keys() & accuracy.get(b, none).keys()]
            if level != reference and pairs:
                first, second = (mean_by_seed([accuracy[pair[i]] for pair in pairs]) for i in (0, 1))
                difference = compare(protocol, words, factor.levels[reference], first, second)
                found.append(difference._replace(factor=factor.name, pairs=len(pairs)))
    return found


def matched_pairs(
    settings: Sequence[Setting], factor: Factor, others: Sequence[Factor], levels: tuple[int, int]
) -> list[tuple[str, str]]:
    """Return the labels of settings of two levels of a factor that are alike in all others."""
    rest = {s.label: tuple(other.of[s.label] for other in others) for s in settings}
    first, second = ([s.label for s in settings if factor.of[s.label] == level] for level in levels)
    return [(a, b) for a, b in itertools.product(first, second) if rest[a] == rest[b]]


def mean_by_seed(values: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Return the mean over settings of each seed that all of them have."""
    seeds = [seed for seed in values[0] if all(seed in others for others in values)]
    return {seed: sum(others[seed] for others in values) / len(values) for seed in seeds}


def grid_of(settings: Sequence[Setting]) -> tuple[Factor, Factor] | None:
    """Return the factors of settings that are a whole grid of two, the one with more levels first; otherwise None."""
    known = factors(settings)
    if len(known) != 2 or len(settings) != len(known[0].levels) * len(known[1].levels):
        return None
    first, second = sorted(known, key=lambda factor: -len(factor.levels))
    return first, second
