"""Writes the first sentences of the report."""

from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from typing import Any

import pandas as pd

from lwfedssl_jax.analysis import tables, wording
from lwfedssl_jax.analysis.results import END_TO_END
from lwfedssl_jax.analysis.settings import Setting
from lwfedssl_jax.analysis.statistics import CHANCE, Difference, baseline_of, over_seeds, paired
from lwfedssl_jax.analysis.wording import percent, protocol_words

COST_WORDS = {wording.TRAFFIC: "traffic", wording.EXECUTED: "operations", wording.MEMORY: "peak memory"}


def headline(
    runs: pd.DataFrame,
    settings: Sequence[Setting],
    protocols: Sequence[str],
    compared: Mapping[str, Sequence[Difference]],
) -> Iterator[str]:
    """Sentences on the best setting on each data set: its accuracy, its costs, and its lead over a rival.

    Settings are ranked by the first protocol. The rival is end_to_end or, if that is the best, the next one.

    Args:
      runs, settings: as ``settings.group_by_setting`` returns them.
      protocols: as ``settings.protocols`` returns them.
      compared: what ``statistics.differences`` returns, by protocol. A missing comparison is computed, without
        adjustment.
    """
    if not settings or not protocols:
        return
    protocol = protocols[0]
    summary = over_seeds(runs)
    accuracy = summary[(f"accuracy.{protocol}", "mean")]
    for data in dict.fromkeys(s.values.get("data.name") for s in settings):
        members = [s for s in settings if s.values.get("data.name") == data and not isnan(accuracy[s.label])]
        if not members:
            continue
        best = max(members, key=lambda s: float(accuracy[s.label]))
        where = f"On {data}, " if data else ""
        costs = _costs(summary, best)
        yield f"{where}{_result(summary, best, protocol, only=len(members) == 1)}{costs and f', for {costs}'}."
        if rival := _rival(best, members, accuracy):
            pair = {best.label, rival.label}
            known = (d for d in compared.get(protocol, ()) if {d.setting, d.against} == pair)
            difference = next(known, None) or paired(runs, best.label, rival.label, protocol)
            costs = _costs(summary, rival)
            yield f"{difference}{costs and f'; {rival.label} takes {costs}'}.{_doubt(difference)}"


def _result(summary: pd.DataFrame, setting: Setting, protocol: str, *, only: bool) -> str:
    """The accuracy of the best setting, and that of the encoder untrained or trained from scratch."""
    mean_std_count = summary.loc[setting.label, f"accuracy.{protocol}"]
    details = [protocol_words(protocol)]
    if mean_std_count.iloc[2] > 1:
        details.append(f"mean of {mean_std_count.iloc[2]:.0f} seeds")
    for kind, words in tables.BASELINES.items():
        mean = summary.loc[setting.label].get((f"{kind}.{protocol}", "mean"), float("nan"))
        if not isnan(mean):
            details.append(f"{words}: {percent(mean)}")
            break
    best = "" if only else "is best: it "
    return f"{setting.label} {best}reached {wording.mean_words(mean_std_count)} % ({'; '.join(details)})"


def _costs(summary: pd.DataFrame, setting: Setting) -> str:
    """Costs as ratios to those of end_to_end with the same config, or an empty string for end_to_end."""
    if setting.strategy == END_TO_END:
        return ""
    ratios = {words: tables.ratio(summary.loc[setting.label], cost) for cost, words in COST_WORDS.items()}
    known = [f"{ratio:.2f}x the {words}" for words, ratio in ratios.items() if not isnan(ratio)]
    return f"{', '.join(known[:-1])} and {known[-1]} of end_to_end" if len(known) > 1 else ""


def _doubt(difference: Difference) -> str:
    kind, p = ("p", difference.p) if isnan(difference.p_holm) else ("adjusted p", difference.p_holm)
    return f" This may be chance: the {kind} is not below {CHANCE}." if p >= CHANCE else ""


def _rival(best: Setting, members: Sequence[Setting], accuracy: Any) -> Setting | None:
    """The end_to_end setting nearest to the best; if the best is end_to_end itself, the most accurate other one."""
    others = [s for s in members if s != best and (best.strategy != END_TO_END or s.strategy != END_TO_END)]
    others = others or [s for s in members if s != best]
    baselines = [s for s in others if s.strategy == END_TO_END]
    if baselines and best.strategy != END_TO_END:
        return baseline_of(best, baselines)
    return max(others, key=lambda s: float(accuracy[s.label])) if others else None
