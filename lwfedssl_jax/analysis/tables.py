"""Tables of settings, costs, differences and runs: as text for a page or paper, and as numbers for programs."""

from collections.abc import Mapping, Sequence
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lwfedssl_jax.analysis.results import END_TO_END, SEED, ledger_costs
from lwfedssl_jax.analysis.settings import Setting, protocols
from lwfedssl_jax.analysis.statistics import Difference, over_seeds
from lwfedssl_jax.analysis.wording import (
    EXECUTED,
    MEMORY,
    RULE,
    TITLES,
    TRAFFIC,
    UNKNOWN,
    cost_unit,
    cost_words,
    count_of,
    mean_words,
    number_or_unknown,
    protocol_words,
    short_number,
)
from lwfedssl_jax.config.protocols import LABEL_FREE, NOISE_ONLY
from lwfedssl_jax.costs import fleet

LABEL_FREE_TITLES = {
    "effective_rank": "effective rank",
    "alignment": "alignment",
    "uniformity": "uniformity",
    "feature_std": "feature std",
}
# By the prefix of their columns.
BASELINES = {"untrained": "untrained", "scratch": "from scratch", NOISE_ONLY: "noise only, nothing learnt"}


class Table(NamedTuple):
    """A table in two forms: ``words`` as text for readers, ``numbers`` in full precision and base units."""

    name: str
    words: pd.DataFrame
    numbers: pd.DataFrame


class Baseline(NamedTuple):
    """Accuracies, by protocol, of an encoder that the method did not train: mean, sample std and count over seeds."""

    label: str
    seeds: int
    accuracy: dict[str, tuple[float, float, float]]


def settings_table(runs: pd.DataFrame, settings: Sequence[Setting]) -> Table:
    """Make the table of every setting's accuracies by each protocol and its costs, with the baselines below.

    Args:
      runs, settings: as ``settings.group_by_setting`` returns them.
    """
    summary = over_seeds(runs)
    rows = [
        {
            "setting": s.label,
            "seeds": int((runs["setting"] == s.label).sum()),
            **{p: tuple(summary.loc[s.label, f"accuracy.{p}"]) for p in protocols(runs)},
            **_mean_costs(summary.loc[s.label], (TRAFFIC, EXECUTED, MEMORY)),
            "seconds": summary.loc[s.label, ("seconds", "mean")],
        }
        for s in settings
    ]
    rows += [{"setting": b.label, "seeds": b.seeds, **b.accuracy} for b in baselines(runs, settings)]
    references = [s.label for s in settings if s.strategy == END_TO_END]
    words = _settings_words(rows, protocols(runs), references)
    return Table("settings", words, _settings_numbers(rows, protocols(runs)))


def _mean_costs(row: pd.Series, costs: Sequence[str]) -> dict[str, float]:
    """Mean costs of a row of ``over_seeds``, and as ``COST.ratio`` their ratios to those of end_to_end."""
    return {c: float(row[c, "mean"]) for c in costs} | {f"{c}.ratio": ratio(row, c) for c in costs}


def ratio(row: pd.Series, cost: str) -> float:
    """The cost of a setting (its row of ``over_seeds``) divided by that of end_to_end with the same config, or NaN."""
    reference = float(row.get((f"{END_TO_END}.{cost}", "mean"), "nan"))
    return float(row[cost, "mean"]) / reference if reference else nan


def _settings_words(rows: list[dict[str, Any]], names: Sequence[str], references: Sequence[str]) -> pd.DataFrame:
    """Rows as text; those of ``references`` without the ratio to themselves."""
    units = {c: cost_unit(c, max((r[c] for r in rows if c in r), default=0)) for c in (TRAFFIC, EXECUTED, MEMORY)}
    shown = []
    for row in rows:
        words = {"setting": row["setting"], "seeds": str(row["seeds"])}
        for p in names:
            words[f"{protocol_words(p)} (%)"] = mean_words(row[p], row["seeds"]) if p in row else UNKNOWN
        for cost, (divisor, unit) in units.items():
            against = nan if row["setting"] in references else row.get(f"{cost}.ratio", nan)
            words[f"{TITLES[cost]} ({unit})"] = cost_words(row.get(cost, nan), against, divisor)
        words["training (s)"] = f"{row['seconds']:.0f}" if "seconds" in row else UNKNOWN
        shown.append(words)
    return pd.DataFrame(shown)


def _settings_numbers(rows: list[dict[str, Any]], names: Sequence[str]) -> pd.DataFrame:

    shown = []
    for row in rows:
        numbers = {k: v for k, v in row.items() if k not in names}
        for p in names:
            mean, std, _ = row.get(p, (nan,) * 3)
            numbers |= {f"{p} %": 100 * mean, f"{p} % std": 100 * std}
        shown.append(numbers)
    return pd.DataFrame(shown)


def baselines(runs: pd.DataFrame, settings: Sequence[Setting]) -> list[Baseline]:
    """Find the baselines: the untrained encoder and training from scratch, once for all settings that share them.

    Settings share one if its accuracies are the same for each seed that they share.
    """
    found = []
    for kind, words in BASELINES.items():
        columns = [c for p in protocols(runs) if (c := f"{kind}.{p}") in runs]
        accuracies = {}
        for s in settings:
            of_setting = runs[runs["setting"] == s.label].set_index(SEED)
            accuracies[s.label] = {
                (seed, c): round(x, 9) for c in columns for seed, x in of_setting[c].dropna().items()
            }
        groups: list[list[Setting]] = []
        known: list[dict[Any, float]] = []  # of each group, by seed and column
        for s in sorted(settings, key=lambda s: -len(accuracies[s.label])):  # those with few seeds join one with many
            own = accuracies[s.label]
            alike = (i for i, of_group in enumerate(known) if _agree(own, of_group))
            if own and (group := next(alike, None)) is not None:
                groups[group].append(s)
                known[group] |= own
            elif own:
                groups.append([s])
                known.append(own)
        for members, of_group in zip(groups, known, strict=True):
            summary = pd.Series(of_group).groupby(level=1, sort=False).agg(["mean", "std", "count"])
            accuracy = {str(c).partition(".")[2]: (mean, std, count) for c, mean, std, count in summary.itertuples()}
            seeds = len({seed for seed, _ in of_group})
            found.append(Baseline(words + (_owners(members) if len(groups) > 1 else ""), seeds, accuracy))
    return found


def _agree(first: Mapping[Any, float], second: Mapping[Any, float]) -> bool:
    """Return whether there are keys that both have, with the same values."""
    common = first.keys() & second.keys()
    return bool(common) and all(first[key] == second[key] for key in common)


def _owners(settings: Sequence[Setting]) -> str:
    """Name the settings that share a baseline, for the end of its label."""
    data = {str(s.values.get("data.name", "")) for s in settings}
    if len(data) == 1 and data != {""}:
        return f", {data.pop()}"
    more = f" and {count_of(len(settings) - 1, 'more setting')}" if len(settings) > 1 else ""
    return f" (of {settings[0].label}{more})"


def resources_table(
    runs: pd.DataFrame, settings: Sequence[Setting], strategies: Mapping[str, dict[str, Any]] | None = None
) -> Table:
    """Make the table of memory, multiply-adds and communication with ratios to end_to_end, in the paper's form.

    Args:
      runs, settings: as ``settings.group_by_setting`` returns them.
      strategies: ledgers to show instead, by strategy, of one config whose strategies were not all run.
    """
    order = (MEMORY, RULE, EXECUTED, TRAFFIC)
    if strategies is None:
        label, references = "setting", [s.label for s in settings if s.strategy == END_TO_END]
        summary = over_seeds(runs)
        rows = {s.label: _mean_costs(summary.loc[s.label], order) for s in settings}
    else:
        label, references = "strategy", [END_TO_END]
        costs = {name: ledger_costs(ledger) for name, ledger in strategies.items()}
        base = costs.get(END_TO_END, dict.fromkeys(order, nan))
        rows = {k: v | {f"{c}.ratio": v[c] / base[c] if base[c] else nan for c in v} for k, v in costs.items()}
    units = {c: cost_unit(c, max(row[c] for row in rows.values())) for c in order}
    titles = TITLES | {TRAFFIC: "communication"}
    words = []
    for name, row in rows.items():
        ratios = {c: nan if name in references else row[f"{c}.ratio"] for c in order}
        cells = {f"{titles[c]} ({u})": cost_words(row[c], ratios[c], divisor) for c, (divisor, u) in units.items()}
        words.append({label: name} | cells)
    return Table("resources", pd.DataFrame(words), pd.DataFrame([{label: k} | v for k, v in rows.items()]))


def label_free_table(runs: pd.DataFrame, settings: Sequence[Setting]) -> Table | None:
    """Make the table of metrics that need no labels, of the trained and of the untrained encoder; None without any.

    Args:
      runs, settings: as ``settings.group_by_setting`` returns them.
    """
    if not any(f"{LABEL_FREE}.{name}" in runs for name in LABEL_FREE_TITLES):
        return None
    words, numbers = [], []
    for s in settings:
        members = runs[runs["setting"] == s.label]
        encoders = {"trained": "", "untrained": "untrained."}
        if members.get(f"{NOISE_ONLY}.{LABEL_FREE}.effective_rank", pd.Series([nan])).notna().any():
            encoders[BASELINES[NOISE_ONLY]] = f"{NOISE_ONLY}."
        for encoder, prefix in encoders.items():
            row = {"setting": s.label, "encoder": encoder}
            columns = {
                name: members.get(f"{prefix}{LABEL_FREE}.{name}", pd.Series([nan])) for name in LABEL_FREE_TITLES
            }
            text = {LABEL_FREE_TITLES[name]: _mean_and_spread(values) for name, values in columns.items()}
            words.append(row | text)
            means = {name: values.mean() for name, values in columns.items()}
            numbers.append(row | means | {f"{name} std": values.std() for name, values in columns.items()})
    return Table(LABEL_FREE, pd.DataFrame(words), pd.DataFrame(numbers))


def _mean_and_spread(values: pd.Series) -> str:
    spread = f" ± {values.std():.2f}" if values.count() > 1 else ""
    return f"{values.mean():.2f}{spread}" if values.count() else UNKNOWN


def differences_table(differences: Sequence[Difference]) -> Table:
    """Make the table of differences between settings."""
    words = []
    for d in differences:
        words.append(
            {
                "factor": d.factor,
                "setting": d.setting,
                "against": d.against,
                "protocol": protocol_words(d.protocol),
                "pairs": str(d.pairs),
                "seeds": str(d.seeds),
                "difference (points)": number_or_unknown(100 * d.mean, "+.1f"),
                "95 % CI": d.why_not or f"{100 * d.low:+.1f} to {100 * d.high:+.1f}",
                "p": number_or_unknown(d.p, ".2g"),
                "adjusted p": number_or_unknown(d.p_holm, ".2g"),
            }
        )
    return Table("significance", pd.DataFrame(words), pd.DataFrame(differences, columns=Difference._fields))


def fleet_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """Make the table of which device classes take part in which stages; None if no run has a fleet.

    Args:
      summaries: ``summary.json`` of each setting's first run, by label.
    """
    rows = [
        {"setting": label} | row for label, summary in summaries.items() for row in fleet.participation_rows(summary)
    ]
    if not rows:
        return None
    words = [
        {
            "setting": row["setting"],
            "device class": row["class"],
            "clients": str(row["clients"]),
            "takes part": row["takes_part"],
            "rounds it can take part in (%)": number_or_unknown(100 * row["share_of_rounds"], ".0f"),
            "slowest round (s)": number_or_unknown(row["slowest_round_seconds"], ",.3g"),
        }
        for row in rows
    ]
    return Table("fleet", pd.DataFrame(words), pd.DataFrame(rows))


def privacy_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """Make the table of what each setting promises and what it costs; None if no run clips updates.

    Args:
      summaries: ``summary.json`` of each setting's first run, by label.
    """
    rows, words = [], []
    for label, summary in summaries.items():
        if not (promise := summary.get("privacy")):
            continue
        stages = promise["per_stage"]
        ratio = max(stage["noise_over_clip"] for stage in stages)
        epsilon, poisson = promise["epsilon"], promise["epsilon_if_poisson"]
        stands_for = promise["cohort"] != promise["simulated_cohort"]
        clients = f"{promise['cohort']:,} of {promise['clients']:,}"
        rows.append({"setting": label, **{k: v for k, v in promise.items() if not isinstance(v, list | dict)}})
        words.append(
            {
                "setting": label,
                "epsilon": "none" if epsilon is None else f"{epsilon:.2f}{' †' * stands_for}",
                "delta": f"{promise['delta']:.1e}",
                "if Poisson": UNKNOWN if poisson is None else f"{poisson:.2f}",
                "noise multiplier": f"{promise['noise_multiplier']:.3g}",
                "clients per round": f"{clients}, {promise['sampling']}",
                "clip": f"{promise['clip']:g}{', adapted' * bool(promise['quantile'])}",
                "noise over clip, a round": short_number(ratio),
            }
        )
    return Table("privacy", pd.DataFrame(words), pd.DataFrame(rows)) if rows else None


def membership_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """Make the table of membership inference; None if no run has any.

    Args:
      summaries: ``summary.json`` of each setting's first run, by label.
    """
    rows = [
        {"setting": label, "encoder": encoder, **found}
        for label, summary in summaries.items()
        for encoder, found in summary.get("membership", {}).items()
    ]
    words = [
        {
            "setting": row["setting"],
            "encoder": row["encoder"],
            "images of each kind": f"{row['images']:,}",
            "AUC": f"{row['auc']:.3f} ± {row['auc_error']:.3f}",
            "found at 1 % false alarms (%)": f"{100 * row['tpr_at_1_percent_fpr']:.1f}",
        }
        for row in rows
    ]
    return Table("membership", pd.DataFrame(words), pd.DataFrame(rows)) if rows else None


def write(table: Table, folder: Path) -> None:
    """Write ``NAME.csv`` of the numbers, and ``NAME.md`` and ``NAME.tex`` (a tabular for booktabs) of the words."""
    folder.mkdir(parents=True, exist_ok=True)
    table.numbers.to_csv(folder / f"{table.name}.csv", index=False, errors="replace")
    cells = table.words.map(lambda cell: str(cell).replace("|", "\\|"))
    (folder / f"{table.name}.md").write_text(
        cells.to_markdown(index=False, disable_numparse=True) + "\n", encoding="utf-8", errors="replace"
    )
    (folder / f"{table.name}.tex").write_text(latex(table.words), encoding="utf-8", errors="replace")


def latex(words: pd.DataFrame) -> str:
    """The table as a tabular with every special character escaped; LaTeX needs only the package booktabs for it."""
    text = words.to_latex(index=False, escape=True, column_format="l" + "r" * (len(words.columns) - 1))
    return str(text).replace("±", r"$\pm$")
