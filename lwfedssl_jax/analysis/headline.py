"""The first sentences of the report."""

from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from typing import TYPE_CHECKING, Any

from lwfedssl_jax.analysis import tables, wording
from lwfedssl_jax.analysis.results import END_TO_END
from lwfedssl_jax.analysis.settings import Setting
from lwfedssl_jax.analysis.statistics import CHANCE, Difference, baseline_of, over_seeds, paired
from lwfedssl_jax.analysis.wording import protocol_words

if TYPE_CHECKING:
    import pandas as pd


def headline(
    runs: "pd.DataFrame",
    settings: Sequence[Setting],
    names: Sequence[str],
    found: Mapping[str, Sequence[Difference]],
) -> Iterator[str]:
    """By the first protocol the best setting on each data set, against end_to_end or the next one, and what it spends.

    Args:
      runs, settings: as ``comparison.settle`` gives them.
      names: as ``comparison.protocols`` gives them.
      found: by protocol what ``comparison.differences`` gives; a comparison that is not there is made, not adjusted.
    """
    if not settings or not names:
        return
    summary = over_seeds(runs)
    accuracy = summary[(f"accuracy.{names[0]}", "mean")]
    for data in dict.fromkeys(s.values.get("data.name") for s in settings):
        members = [s for s in settings if s.values.get("data.name") == data and accuracy[s.label] == accuracy[s.label]]
        if not members:
            continue
        best = max(members, key=lambda s: float(accuracy[s.label]))
        reached = wording.accuracy_words(summary.loc[best.label, f"accuracy.{names[0]}"])
        seeds = int(summary.loc[best.label, (f"accuracy.{names[0]}", "count")])
        over = f" over {seeds} seeds" if seeds > 1 else ""
        yield (
            f"{f'On {data}, ' if data else ''}{best.label} {'is best: it ' * (len(members) > 1)}reached {reached} % by "
            f"{protocol_words(names[0])}{over}{_untrained(summary, best, names[0])}{_spent(summary, best)}."
        )
        if rival := _rival(best, members, accuracy):
            known = (d for d in found.get(names[0], ()) if {d.setting, d.against} == {best.label, rival.label})
            difference = next(known, None) or paired(runs, best.label, rival.label, names[0])
            kind, p = ("p", difference.p) if isnan(difference.p_holm) else ("adjusted p", difference.p_holm)
            chance = f" This may be chance: the {kind} is not below {CHANCE}." if p >= CHANCE else ""
            spent = _spent(summary, rival).replace(", for ", f"; {rival.label} takes ", 1)
            yield f"{difference}{spent}.{chance}"


def _untrained(summary: "pd.DataFrame", setting: Setting, protocol: str) -> str:
    for kind, words in (("untrained", "untrained"), ("scratch", "from scratch")):
        mean = summary.loc[setting.label].get((f"{kind}.{protocol}", "mean"), float("nan"))
        if mean == mean:
            return f" ({words}: {100 * mean:.1f} %)"
    return ""


def _spent(summary: "pd.DataFrame", setting: Setting) -> str:
    """Costs as ratios to end_to_end with the same config; nothing for end_to_end."""
    if setting.strategy == END_TO_END:
        return ""
    row = summary.loc[setting.label]
    words = {wording.TRAFFIC: "traffic", wording.EXECUTED: "operations", wording.MEMORY: "peak memory"}
    ratios = {w: tables.ratio(row, cost) for cost, w in words.items()}
    said = [f"{ratio:.2f}x the {word}" for word, ratio in ratios.items() if ratio == ratio]
    return f", for {' and '.join([', '.join(said[:-1]), said[-1]])} of end_to_end" if len(said) > 1 else ""


def _rival(best: Setting, members: Sequence[Setting], accuracy: Any) -> Setting | None:
    """The end_to_end setting that the best stands against; where it is end_to_end itself, the best of the others."""
    others = [s for s in members if s != best and (best.strategy != END_TO_END or s.strategy != END_TO_END)]
    others = others or [s for s in members if s != best]
    whole = [s for s in others if s.strategy == END_TO_END]
    if whole and best.strategy != END_TO_END:
        return baseline_of(best, whole)
    return max(others, key=lambda s: float(accuracy[s.label])) if others else None
