"""Writes the first sentences of the report."""

from collections.abc import Iterator, Mapping, Sequence
from math import isnan
from typing import Any

import pandas as pd

from lwfedssl_jax.analysis import tables, wording
from lwfedssl_jax.analysis.effects import World, worlds
from lwfedssl_jax.analysis.results import END_TO_END, SEED
from lwfedssl_jax.analysis.settings import Setting
from lwfedssl_jax.analysis.statistics import CHANCE, Difference, baseline_of, common_seeds, over_seeds, paired
from lwfedssl_jax.analysis.wording import count_of, percent, protocol_words
from lwfedssl_jax.config.protocols import NOISE_ONLY

COST_WORDS = {wording.TRAFFIC: "traffic", wording.EXECUTED: "operations", wording.MEMORY: "peak memory"}
MAX_WORLDS = 4  # largest number of worlds that have sentences of their own
MAX_UNRANKED = 3  # largest number of settings to name that lack seeds


def headline(
    runs: pd.DataFrame,
    settings: Sequence[Setting],
    protocols: Sequence[str],
    compared: Mapping[str, Sequence[Difference]],
) -> Iterator[str]:
    """Sentences on each world: whether anything beats the untrained encoder, and what has the highest accuracy.

    Settings are ranked by the first protocol, over the seeds that they share (``statistics.common_seeds``); the other
    protocols are named where they disagree. The rival of the first setting
    is the nearest end_to_end setting or, if the first is one itself, the most accurate of the others.

    Args:
      runs, settings: as ``settings.group_by_setting`` returns them.
      protocols: as ``settings.protocols`` returns them.
      compared: what ``comparisons.compare_all`` returns; only its adjusted p-values decide what is said about chance.
    """
    found = worlds(settings)
    for world in found[:MAX_WORLDS] if protocols else ():
        yield from _on_world(runs, world, protocols, compared)
    if len(found) > MAX_WORLDS:
        yield f"{len(found) - MAX_WORLDS} more kinds of data, partition or fleet are in the tables below."


def _on_world(
    runs: pd.DataFrame, world: World, protocols: Sequence[str], compared: Mapping[str, Sequence[Difference]]
) -> Iterator[str]:
    protocol = protocols[0]
    beats = _any_beats_untrained(runs, world.settings, protocol)
    runs, members, doubt = _over_common_seeds(runs, world, protocol)
    if not members:
        return
    summary = over_seeds(runs)
    accuracy = summary[(f"accuracy.{protocol}", "mean")]
    best = max(members, key=lambda s: float(accuracy[s.label]))
    where = f"{world.name}: " if world.name else ""
    found = _result(runs, summary, best, protocol)
    costs = _costs(summary, best)
    if beats is False:
        which = "the most accurate setting, " if len(members) > 1 else ""
        yield f"{where}Nothing beats the untrained encoder: {which}{best.label}, reached {found}."
    else:
        name = f"{best.label} has the highest accuracy:" if len(members) > 1 else f"{best.label} reached"
        yield f"{where}{name} {found}{costs and f', for {costs}'}."
    yield from _on_noise(runs, best, members, protocol)
    if beats and _any_beats_untrained(runs, [best], protocol) is False:
        yield f"{best.label} does not beat its own untrained encoder, which others do."
    if disagreement := _disagreement(runs, members, best, protocols, beats):
        yield disagreement
    if beats is not False and (rival := _rival(best, members, accuracy)):
        pair = {best.label, rival.label}
        seeds = runs.loc[runs["setting"] == best.label, SEED].nunique()  # a pair may share more than it is ranked over
        known = (d for d in compared.get(protocol, ()) if {d.setting, d.against} == pair and not d.factor)
        tested = (d for d in known if d.seeds == seeds)
        difference = next(tested, None) or paired(runs, best.label, rival.label, protocol)
        costs = _costs_against(summary, rival, best)
        yield f"{difference}{costs and f'; it takes {costs}'}.{_doubt(difference)}"
        second = max((s for s in members if s != best), key=lambda s: float(accuracy[s.label]))
        if second != rival:
            reached = wording.mean_words(summary.loc[second.label, f"accuracy.{protocol}"])
            yield f"Second is {second.label} with {reached} %."
    if doubt:
        yield doubt


def _over_common_seeds(runs: pd.DataFrame, world: World, protocol: str) -> tuple[pd.DataFrame, list[Setting], str]:
    """Return a world's runs with the seeds that it is ranked over, its settings that have all of them, and a sentence.

    The sentence names the settings that lack seeds, or says that no two settings share one; otherwise it is empty.
    """
    known = runs[runs[f"accuracy.{protocol}"].notna()]
    own = {s.label: frozenset(known.loc[known["setting"] == s.label, SEED]) for s in world.settings}
    settings = [s for s in world.settings if own[s.label]]
    seeds = common_seeds([own[s.label] for s in settings])
    members = [s for s in settings if seeds <= own[s.label]]
    counted = known[known["setting"].isin([s.label for s in members]) & (known[SEED].isin(seeds) | (not seeds))]
    if len(members) > 1 and not seeds:
        return counted, members, "These settings share no seed: their differences may be those of the seeds."
    if not (rest := [s.label for s in settings if s not in members]):
        return counted, members, ""
    summary = over_seeds(known)[f"accuracy.{protocol}"]
    named = "; ".join(
        f"{label} ({wording.mean_words(summary.loc[label])} %, {count_of(len(own[label]), 'seed')})"
        for label in rest[:MAX_UNRANKED]
    )
    more = f"; and {len(rest) - MAX_UNRANKED} more" if len(rest) > MAX_UNRANKED else ""
    return counted, members, f"Not ranked, for lack of runs with seeds that others have: {named}{more}."


def _any_beats_untrained(runs: pd.DataFrame, settings: Sequence[Setting], protocol: str) -> bool | None:
    """Whether a setting is more accurate than its untrained encoder in the mean over seeds; None if that is unknown."""
    gains = [_gains(runs, setting, protocol).mean() for setting in settings]
    if any(gain > 0 for gain in gains):
        return True
    return False if gains and not any(map(isnan, gains)) else None


def _on_noise(runs: pd.DataFrame, best: Setting, members: Sequence[Setting], protocol: str) -> Iterator[str]:
    """Sentences on a private setting: what training adds to its noise, and what a comparison of strategies needs."""
    gains = _gains(runs, best, protocol, NOISE_ONLY)
    if gains.empty:
        return
    alone = runs.loc[gains.index, f"{NOISE_ONLY}.{protocol}"].mean()
    above = f"above it in {int((gains > 0).sum())} of {count_of(len(gains), 'seed')}"
    adds = "training adds" if gains.mean() > 0 else "training adds nothing:"
    yield f"The noise of {best.label} alone gives {percent(alone)}; {adds} {100 * gains.mean():+.1f} points ({above})."
    if len({s.strategy for s in members}) > 1:
        yield "Under noise, strategies can be compared only if privacy.clip was tuned for each of them, on other seeds."


def _gains(runs: pd.DataFrame, setting: Setting, protocol: str, baseline: str = "untrained") -> pd.Series:
    """The accuracy minus that of the untrained encoder, or of another, of each run in which both are known."""
    members = runs[runs["setting"] == setting.label]
    columns = [f"accuracy.{protocol}", f"{baseline}.{protocol}"]
    if not all(column in members for column in columns):
        return pd.Series(dtype=float)
    return (members[columns[0]] - members[columns[1]]).dropna()


def _result(runs: pd.DataFrame, summary: pd.DataFrame, setting: Setting, protocol: str) -> str:
    """The accuracy of a setting, and that of the encoder untrained or trained from scratch."""
    mean_std_count = summary.loc[setting.label, f"accuracy.{protocol}"]
    details = [protocol_words(protocol)]
    if mean_std_count.iloc[2] > 1:
        details.append(f"mean of {mean_std_count.iloc[2]:.0f} seeds")
    elif spread := _over_draws(runs, setting, protocol):
        details.append(f"1 seed, ± {spread} over draws of labels")
    else:
        details.append("1 seed")
    for kind, words in tables.BASELINES.items():
        mean = summary.loc[setting.label].get((f"{kind}.{protocol}", "mean"), float("nan"))
        if not isnan(mean):
            doubt = _doubt_of_gain(runs, setting, protocol) if kind == "untrained" else ""
            details.append(f"{words}: {percent(mean)}{doubt}")
            break
    return f"{wording.mean_words(mean_std_count)} % ({'; '.join(details)})"


def _doubt_of_gain(runs: pd.DataFrame, setting: Setting, protocol: str) -> str:
    """In how many seeds a setting is above the untrained encoder, if not in all, or that one is within its spread."""
    gains, spread = _gains(runs, setting, protocol), _over_draws(runs, setting, protocol)
    above = int((gains > 0).sum())
    if 0 < above < len(gains):
        return f", above it in {above} of {count_of(len(gains), 'seed')}"
    return ", within that spread" if spread and 0 < 100 * gains.abs().max() < float(spread) else ""


def _over_draws(runs: pd.DataFrame, setting: Setting, protocol: str) -> str:
    """The standard deviation of a single run over draws of labelled images, in %; empty without any."""
    column = f"std.{protocol}"
    values = runs.loc[runs["setting"] == setting.label, column].dropna() if column in runs else pd.Series(dtype=float)
    return f"{100 * values.iloc[0]:.1f}" if len(values) == 1 and values.iloc[0] else ""


def _disagreement(
    runs: pd.DataFrame, members: Sequence[Setting], best: Setting, protocols: Sequence[str], beats: bool | None
) -> str:
    """Name the protocols by which another setting is best, or that differ on the untrained encoder."""
    summary, parts = over_seeds(runs), []
    for protocol in protocols[1:]:
        accuracy = summary[(f"accuracy.{protocol}", "mean")]
        known = [s for s in members if not isnan(accuracy[s.label])]
        if not known:
            continue
        other = max(known, key=lambda s: float(accuracy[s.label]))
        above = _any_beats_untrained(runs, known, protocol)
        if beats is not None and above is not None and above != beats:
            what = f"something does ({other.label}, {percent(accuracy[other.label])})"
            what = what if above else "nothing beats the untrained encoder"
            parts.append(f"by {protocol_words(protocol)}, {what}")
        elif other is not best and accuracy[other.label] > accuracy.get(best.label, float("nan")):
            parts.append(
                f"by {protocol_words(protocol)}, {other.label} has the highest ({percent(accuracy[other.label])})"
            )
    return f"Protocols disagree: {'; '.join(parts)}." if parts else ""


def _costs(summary: pd.DataFrame, setting: Setting) -> str:
    """Costs as ratios to those of end_to_end with the same config, or an empty string for end_to_end."""
    if setting.strategy == END_TO_END:
        return ""
    ratios = {words: tables.ratio(summary.loc[setting.label], cost) for cost, words in COST_WORDS.items()}
    return _ratio_words(ratios, "end_to_end")


def _costs_against(summary: pd.DataFrame, rival: Setting, best: Setting) -> str:
    """Costs of the best setting as ratios to its rival's, unless they are those to end_to_end that are said before."""
    if rival.strategy == END_TO_END and best.strategy != END_TO_END:
        return ""
    means = {words: summary[(cost, "mean")] for cost, words in COST_WORDS.items()}
    return _ratio_words(
        {words: float(mean[best.label] / mean[rival.label]) for words, mean in means.items()}, rival.label
    )


def _ratio_words(ratios: Mapping[str, float], of: str) -> str:
    known = [f"{ratio:.2f}x the {words}" for words, ratio in ratios.items() if not isnan(ratio)]
    return f"{', '.join(known[:-1])} and {known[-1]} of {of}" if len(known) > 1 else ""


def _doubt(difference: Difference) -> str:
    chance = not isnan(difference.p_holm) and difference.p_holm >= CHANCE
    return f" This may be chance: the adjusted p is not below {CHANCE}." if chance else ""


def _rival(best: Setting, members: Sequence[Setting], accuracy: Any) -> Setting | None:
    """The end_to_end setting nearest to the best; if the best is end_to_end itself, the most accurate other one."""
    others = [s for s in members if s != best and (best.strategy != END_TO_END or s.strategy != END_TO_END)]
    others = others or [s for s in members if s != best]
    baselines = [s for s in others if s.strategy == END_TO_END]
    if baselines and best.strategy != END_TO_END:
        return baseline_of(best, baselines)
    return max(others, key=lambda s: float(accuracy[s.label])) if others else None
