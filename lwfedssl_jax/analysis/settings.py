"""Settings: runs that differ only in their seed are runs of one setting."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lwfedssl_jax.analysis.results import EVALUATION_FINGERPRINT, FINGERPRINT, SEED, STRATEGY
from lwfedssl_jax.config import Config

# Fields that a label gives first, and only by their value.
BY_VALUE = (STRATEGY, "objective.name", "data.name", "model.name", "partition.kind", "federation.aggregator")

SECTIONS = tuple(f.name for f in dataclasses.fields(Config))


class Setting(NamedTuple):
    """What runs share that differ only in their seed.

    Attributes:
      label: its name in the only sweep among the runs, otherwise what distinguishes it from other settings.
      strategy: its strategy.
      rest: what else distinguishes it from other settings, or an empty string.
      values: its values of the fields in which settings differ.
    """

    label: str
    strategy: str
    rest: str
    values: dict[str, Any]


def group_by_setting(results: pd.DataFrame) -> tuple[pd.DataFrame, list[Setting]]:
    """Group the finished runs by the fingerprint of their data and all config fields except for ``runtime.seed``.

    Labels hold only what differs between settings: the fields, in order, that distinguish further settings, and no
    value that more than two thirds of the settings have.

    Args:
      results: as ``load_results`` returns it.

    Returns:
      The finished runs with the label of their setting as ``setting``, only the first of several with one setting and
      seed; and the settings in the order of their first runs.
    """
    finished = results[results["finished"]].reset_index(drop=True)
    fields = [c for c in finished.columns if c.split(".")[0] in SECTIONS and c != SEED] + ["config_file"]
    keys = [tuple(None if pd.isna(v) else v for v in row) for row in finished[fields].itertuples(index=False)]
    unique = list(dict.fromkeys(keys))
    everything = {field: column for field, column in zip(fields, zip(*unique, strict=True), strict=False)}
    values = everything
    of_data = (FINGERPRINT, EVALUATION_FINGERPRINT)
    by_config = zip(*(column for field, column in values.items() if field not in of_data), strict=True)
    if len(set(by_config)) == len(unique):  # the config alone tells the settings apart
        values = {field: column for field, column in values.items() if field not in of_data}
    settings = _make_settings(values, len(unique))
    hidden = {f: column for f, column in everything.items() if f not in values and len(set(column)) > 1}
    settings = [s._replace(values=s.values | {f: c[i] for f, c in hidden.items()}) for i, s in enumerate(settings)]
    given = [finished["label"][keys.index(key)] or s.label for key, s in zip(unique, settings, strict=True)]
    sweeps = {Path(path).parent for path, label in zip(finished["path"], finished["label"], strict=True) if label}
    if len(sweeps) == 1 and len(set(given)) == len(given):  # labels of several sweeps need not be distinct
        settings = [s._replace(label=label) for s, label in zip(settings, given, strict=True)]
    numbers = [unique.index(key) for key in keys]
    seeds = finished[SEED] if SEED in finished else [None] * len(keys)
    repeated = pd.Series(list(zip(numbers, seeds, strict=True)), dtype=object).duplicated()
    return finished.assign(setting=[settings[i].label for i in numbers])[~repeated], settings


def _make_settings(values: Mapping[str, Sequence[Any]], number: int) -> list[Setting]:
    """Make a number of settings from each field's values, one value per setting."""
    differing = {field: column for field, column in values.items() if len(set(column)) > 1}
    ordered = sorted(differing, key=lambda f: BY_VALUE.index(f) if f in BY_VALUE else len(BY_VALUE))
    chosen = distinguishing_fields([(field, differing[field]) for field in ordered])
    settings = []
    for i in range(number):
        words = {f: value_words(f, values[f][i]) for f in chosen if not is_common(f, values[f], i)}
        strategy = str(values[STRATEGY][i]) if STRATEGY in values else ""
        rest = ", ".join(word for field, word in words.items() if field != STRATEGY)
        label = ", ".join(words.values()) or strategy or "default"
        settings.append(Setting(label, strategy, rest, {f: column[i] for f, column in differing.items()}))
    return settings


def distinguishing_fields(fields: Sequence[tuple[str, Sequence[Any]]]) -> list[str]:
    """The fields (given with one value per setting) that split the settings further than those before them."""
    chosen: list[tuple[str, Sequence[Any]]] = []
    groups = 1
    for field, values in fields:
        split = len(set(zip(*(v for _, v in chosen), values, strict=True)))
        if split > groups:
            chosen.append((field, values))
            groups = split
    return [field for field, _ in chosen]


def is_common(field: str, values: Sequence[Any], i: int) -> bool:
    """Whether more than two thirds of the settings share the value of setting ``i``, so that labels omit it."""
    return field not in BY_VALUE and 3 * values.count(values[i]) > 2 * len(values)


def value_words(field: str, value: Any) -> str:
    """Return a field's value for a label, such as "batch size 8", or the value alone of the fields ``BY_VALUE``."""
    shown = f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)
    if field == "config_file":
        return f"config file {shown[:8] or 'by name'}"
    if field in BY_VALUE:
        return shown
    if field in ("privacy.epsilon", "privacy.noise_multiplier", "privacy.clip") and not value:
        shown = "none"  # 0 would be the strongest promise
    return f"{field.partition('.')[2].replace('_', ' ')} {'unknown' if value is None else shown or 'none'}"


def protocols(results: pd.DataFrame) -> list[str]:
    """Protocols that evaluated finished runs: by the number of these runs, then in the order of evaluation."""
    finished = results[results["finished"]]
    columns = [c for c in finished.columns if c.startswith("accuracy.") and finished[c].notna().any()]
    columns.sort(key=lambda c: -int(finished[c].notna().sum()))
    return [c.removeprefix("accuracy.") for c in columns]
