"""Runs that differ in their seed alone, as one setting."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lwfedssl_jax.analysis.results import SEED, STRATEGY
from lwfedssl_jax.config import Config

if TYPE_CHECKING:
    import pandas as pd


# Fields that a label names first, by their value alone.
BY_VALUE = (STRATEGY, "objective.name", "data.name", "model.name", "partition.kind", "federation.aggregator")

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


def group_by_setting(results: "pd.DataFrame") -> tuple["pd.DataFrame", list[Setting]]:
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
    chosen = distinguishing_fields([(field, differing[field]) for field in ordered])
    settings = []
    for i in range(len(unique)):
        words = {f: _word(f, table[f][i]) for f in chosen if not is_common(f, table[f], i)}
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


def distinguishing_fields(fields: Sequence[tuple[str, Sequence[Any]]]) -> list[str]:
    """Of fields with their values by setting, those that split the settings further than the ones before."""
    chosen: list[tuple[str, Sequence[Any]]] = []
    groups = 1
    for field, values in fields:
        split = len(set(zip(*(v for _, v in chosen), values, strict=True)))
        if split > groups:
            chosen.append((field, values))
            groups = split
    return [field for field, _ in chosen]


def is_common(field: str, values: Sequence[Any], i: int) -> bool:
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
