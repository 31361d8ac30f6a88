"""Tables of settings, costs, differences and runs: as words for a page or paper, as numbers for programs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
    accuracy_words,
    cost_words,
    protocol_words,
    unit,
)
from lwfedssl_jax.costs import fleet

if TYPE_CHECKING:
    import pandas as pd


class Table(NamedTuple):
    """A table twice: ``words`` as it is shown, ``numbers`` in full precision and plain units."""

    name: str
    words: "pd.DataFrame"
    numbers: "pd.DataFrame"


def settings_table(runs: "pd.DataFrame", settings: Sequence[Setting]) -> Table:
    """Accuracies by every protocol and costs of every setting, and the baselines below.

    Args:
      runs, settings: as ``comparison.settle`` gives them.
    """
    summary = over_seeds(runs)
    rows = [
        {
            "setting": s.label,
            "seeds": int((runs["setting"] == s.label).sum()),
            **{p: tuple(summary.loc[s.label, f"accuracy.{p}"]) for p in protocols(runs)},
            **_costs(summary.loc[s.label], (TRAFFIC, EXECUTED, MEMORY)),
            "seconds": summary.loc[s.label, ("seconds", "mean")],
        }
        for s in settings
    ]
    rows += [{"setting": b.label, "seeds": b.seeds, **b.accuracy} for b in baselines(runs, settings)]
    whole = [s.label for s in settings if s.strategy == END_TO_END]
    words = _settings_words(rows, protocols(runs), whole)
    return Table("settings", words, _settings_numbers(rows, protocols(runs)))


def _costs(row: "pd.Series", costs: Sequence[str]) -> dict[str, float]:
    """Of a row of ``over_seeds``, and beside each its ratio to what end_to_end spends with the same config."""
    return {c: float(row[c, "mean"]) for c in costs} | {f"{c}.ratio": ratio(row, c) for c in costs}


def ratio(row: "pd.Series", cost: str) -> float:
    """A setting's cost (its row of ``over_seeds``) against that of end_to_end with the same config; NaN if unknown."""
    whole = float(row.get((f"{END_TO_END}.{cost}", "mean"), "nan"))
    return float(row[cost, "mean"]) / whole if whole else float("nan")


def _settings_words(rows: list[dict[str, Any]], names: Sequence[str], whole: Sequence[str]) -> "pd.DataFrame":
    import pandas as pd

    units = {c: unit(c, max((r[c] for r in rows if c in r), default=0)) for c in (TRAFFIC, EXECUTED, MEMORY)}
    shown = []
    for row in rows:
        words = {"setting": row["setting"], "seeds": str(row["seeds"])}
        for p in names:
            words[f"{protocol_words(p)} (%)"] = accuracy_words(row[p], row["seeds"]) if p in row else UNKNOWN
        for cost, (scale, name) in units.items():
            against = float("nan") if row["setting"] in whole else row.get(f"{cost}.ratio", float("nan"))
            words[f"{TITLES[cost]} ({name})"] = cost_words(row.get(cost, float("nan")), against, scale)
        words["training (s)"] = f"{row['seconds']:.0f}" if "seconds" in row else UNKNOWN
        shown.append(words)
    return pd.DataFrame(shown)


def _settings_numbers(rows: list[dict[str, Any]], names: Sequence[str]) -> "pd.DataFrame":
    import pandas as pd

    flat = []
    for row in rows:
        numbers = {k: v for k, v in row.items() if k not in names}
        for p in names:
            mean, std, _ = row.get(p, (float("nan"),) * 3)
            numbers |= {f"{p} %": 100 * mean, f"{p} % std": 100 * std}
        flat.append(numbers)
    return pd.DataFrame(flat)


class Baseline(NamedTuple):
    """Accuracies of an encoder that was not trained with the method: mean, sample std and count over seeds."""

    label: str
    seeds: int
    accuracy: dict[str, tuple[float, float, float]]


def baselines(runs: "pd.DataFrame", settings: Sequence[Setting]) -> list[Baseline]:
    """The untrained encoder and training from scratch, once for all settings that have the same ones."""
    found = []
    for kind, words in (("untrained", "untrained"), ("scratch", "from scratch")):
        columns = [c for p in protocols(runs) if (c := f"{kind}.{p}") in runs]
        groups: dict[tuple[float, ...], list[Setting]] = {}
        for s in settings:
            means = runs.loc[runs["setting"] == s.label, columns].mean().dropna()
            if len(means):
                groups.setdefault(tuple(means.round(9)), []).append(s)
        for members in groups.values():
            of = runs[runs["setting"].isin([s.label for s in members])].drop_duplicates(SEED)
            numbers = {c.partition(".")[2]: (of[c].mean(), of[c].std(), of[c].count()) for c in columns}
            kept = {p: n for p, n in numbers.items() if n[2]}
            found.append(Baseline(words + (_whose(members) if len(groups) > 1 else ""), len(of), kept))
    return found


def _whose(members: Sequence[Setting]) -> str:
    data = {str(s.values.get("data.name", "")) for s in members}
    if len(data) == 1 and data != {""}:
        return f", {data.pop()}"
    more = f" and {len(members) - 1} more" if len(members) > 1 else ""
    return f", {members[0].label}{more}"


def resources_table(
    runs: "pd.DataFrame", settings: Sequence[Setting], strategies: Mapping[str, dict[str, Any]] | None = None
) -> Table:
    """Memory, FLOPs and communication with ratios to end_to_end, in the paper's form.

    Args:
      runs, settings: as ``comparison.settle`` gives them.
      strategies: ledgers, to show these instead (of one config, whose strategies were not all run).
    """
    import pandas as pd

    order = (MEMORY, RULE, EXECUTED, TRAFFIC)
    if strategies is None:
        label, whole = "setting", [s.label for s in settings if s.strategy == END_TO_END]
        summary = over_seeds(runs)
        rows = {s.label: _costs(summary.loc[s.label], order) for s in settings}
    else:
        label, whole = "strategy", [END_TO_END]
        spent = {name: ledger_costs(ledger) for name, ledger in strategies.items()}
        base = spent.get(END_TO_END, dict.fromkeys(order, float("nan")))
        rows = {k: v | {f"{c}.ratio": v[c] / base[c] if base[c] else float("nan") for c in v} for k, v in spent.items()}
    units = {c: unit(c, max(row[c] for row in rows.values())) for c in order}
    titles = TITLES | {TRAFFIC: "communication"}
    words = []
    for name, row in rows.items():
        ratios = {c: float("nan") if name in whole else row[f"{c}.ratio"] for c in order}
        cells = {f"{titles[c]} ({u})": cost_words(row[c], ratios[c], scale) for c, (scale, u) in units.items()}
        words.append({label: name} | cells)
    return Table("resources", pd.DataFrame(words), pd.DataFrame([{label: k} | v for k, v in rows.items()]))


def differences_table(found: Sequence[Difference]) -> Table:
    """Differences between settings as ``comparison.differences`` gives them."""
    import pandas as pd

    words = []
    for d in found:
        tested = not d.why_not
        words.append(
            {
                "setting": d.setting,
                "against": d.against,
                "protocol": protocol_words(d.protocol),
                "seeds": str(d.seeds),
                "difference (points)": f"{100 * d.mean:+.1f}" if d.seeds else UNKNOWN,
                "95 % CI": f"{100 * d.low:+.1f} to {100 * d.high:+.1f}" if tested else d.why_not,
                "p": f"{d.p:.2g}" if tested else UNKNOWN,
                "p adjusted": f"{d.p_holm:.2g}" if tested else UNKNOWN,
            }
        )
    return Table("significance", pd.DataFrame(words), pd.DataFrame(found, columns=Difference._fields))


def fleet_table(summaries: Mapping[str, Mapping[str, Any]]) -> Table | None:
    """Who takes part in which stages: each device class of the settings' first runs, by label; None without fleets."""
    import pandas as pd

    rows = [
        {"setting": label} | row for label, summary in summaries.items() for row in fleet.participation_rows(summary)
    ]
    if not rows:
        return None
    shown = lambda x, form: UNKNOWN if math.isnan(x) else format(x, form)  # noqa: E731
    words = [
        {
            "setting": row["setting"],
            "class": row["class"],
            "clients": str(row["clients"]),
            "takes part": row["takes_part"],
            "can take part in (% of its rounds)": shown(100 * row["share_of_rounds"], ".0f"),
            "slowest round (s)": shown(row["slowest_round_seconds"], ",.3g"),
        }
        for row in rows
    ]
    return Table("fleet", pd.DataFrame(words), pd.DataFrame(rows))


def write(table: Table, folder: Path) -> None:
    """``NAME.csv`` of the numbers, ``NAME.md`` and ``NAME.tex`` (a tabular for booktabs) of the words."""
    folder.mkdir(parents=True, exist_ok=True)
    table.numbers.to_csv(folder / f"{table.name}.csv", index=False)
    cells = table.words.map(lambda cell: str(cell).replace("|", "\\|"))
    (folder / f"{table.name}.md").write_text(cells.to_markdown(index=False, disable_numparse=True) + "\n")
    (folder / f"{table.name}.tex").write_text(latex(table.words))


def latex(words: "pd.DataFrame") -> str:
    """A tabular that needs the package booktabs only, every character that LaTeX would read escaped."""
    text = words.to_latex(index=False, escape=True, column_format="l" + "r" * (len(words.columns) - 1))
    return str(text).replace("±", r"$\pm$")
