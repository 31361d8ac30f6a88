"""Accuracy at equal cost, read off the evaluations of finished runs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lwfedssl_jax.analysis.effects import worlds
from lwfedssl_jax.analysis.results import RunRecord, all_results
from lwfedssl_jax.analysis.settings import Setting
from lwfedssl_jax.analysis.style import traffic_by_round
from lwfedssl_jax.analysis.tables import Table
from lwfedssl_jax.analysis.wording import MIB, UNKNOWN, mean_words

FARTHEST = 0.3
SAME = 1.01  # largest cost over the smallest up to which runs are said to cost the same

Lines = Sequence[Mapping[str, Any]]  # of ``metrics.jsonl``
Summary = Mapping[str, Any]


class CostKind(NamedTuple):
    """A cost that runs are compared at.

    Attributes:
      words: its name in a sentence.
      unit: of the values.
      divisor: that turns bytes, multiply-adds or seconds into the unit.
    """

    words: str
    unit: str
    divisor: float


KINDS = {
    "traffic": CostKind("traffic", "MiB", MIB),
    "operations": CostKind("multiply-adds per sample", "G", 1e9),
    "device_seconds": CostKind("device time", "min", 60.0),
}


def cumulative_cost(kind: str, lines: Lines, summary: Summary) -> dict[int, float]:
    """Return what a drawn client has spent up to each round, from 0 on; empty if that is unknown.

    Args:
      kind: of ``KINDS``: traffic as measured, executed multiply-adds by the ledger, or, for a run with a fleet of known
        speed, seconds of rounds that are as long as the slowest class needs that takes part.
      lines: of the run's ``metrics.jsonl``.
      summary: of the run.
    """
    if kind == "traffic":
        return {number: MIB * total for number, total in traffic_by_round([dict(line) for line in lines]).items()}
    per_stage = summary["resources"].get("per_stage", ())
    if kind == "operations":
        by_stage = {s["stage"]: s["flops_executed"] / s["rounds"] for s in per_stage if "flops_executed" in s}
    else:
        by_stage = seconds_by_stage(summary)
    spent, total = {0: 0.0}, 0.0
    for line in lines:
        if "event" not in line:
            if line["stage"] not in by_stage:
                return {}
            total += by_stage[line["stage"]]
            spent[line["round"]] = total
    return spent


def seconds_by_stage(summary: Summary) -> dict[int, float]:
    """Return the seconds of a round of each stage on the slowest class that takes part, where all speeds are known."""
    classes = [c for c in summary.get("fleet", ()) if c["clients"]]
    found = {}
    for index, stage in enumerate(summary["resources"].get("per_stage", ())):
        seconds = [c["round_seconds_by_stage"][index] for c in classes if c["clients_by_stage"][index]]
        if seconds and None not in seconds:
            found[stage.get("stage", index + 1)] = max(seconds)
    return found


def cost_curve(kind: str, protocol: str, lines: Lines, summary: Summary) -> tuple[np.ndarray, np.ndarray]:
    """Return the costs at which a run was evaluated by a protocol, in order, and its accuracies in [0, 1]."""
    spent = cumulative_cost(kind, lines, summary)
    points = {
        spent[line["round"]]: line["accuracy"]
        for line in lines
        if line.get("protocol") == protocol and "baseline" not in line and "accuracy" in line and line["round"] in spent
    }
    return np.array([*points]), np.array([*points.values()])


def accuracy_at(cost: float, curve: tuple[np.ndarray, np.ndarray]) -> float:
    """Return the accuracy at a cost, linear between evaluations; NaN beyond the last one, or where they are far apart.

    They are if the two around the cost differ by more than ``FARTHEST`` of what the whole run costs.
    """
    costs, accuracies = curve
    if not len(costs) or cost > costs[-1] * (1 + 1e-9):
        return float("nan")
    after = min(int(np.searchsorted(costs, cost)), len(costs) - 1)
    if not np.isclose(costs[after], cost) and costs[after] - costs[after - 1] > FARTHEST * costs[-1]:
        return float("nan")
    return float(np.interp(cost, costs, accuracies))


def common_cost(curves: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Return the largest cost at which all runs can be compared; NaN if one has no costs or only one evaluation."""
    if not curves or any(len(costs) < 2 for costs, _ in curves):
        return float("nan")
    return float(min(costs[-1] for costs, _ in curves))


def equal_cost_table(
    members: Mapping[str, Sequence[RunRecord]], settings: Sequence[Setting], protocol: str
) -> Table | None:
    """Make the table of accuracies at equal rounds and at equal costs, by world; None where none can be compared.

    The cost of a world is the largest that all of its runs have reached, of those that were evaluated on the way.

    Args:
      members: the finished runs of each setting, by its label.
      settings: as ``settings.group_by_setting`` returns them.
      protocol: such as ``knn``.
    """
    words, numbers = [], []
    for world in worlds(settings):
        if len(world.settings) < 2:
            continue
        columns = {kind: _at_common_cost(kind, protocol, members, world.settings) for kind in KINDS}
        shown = {kind: column for kind, column in columns.items() if column}
        for setting in world.settings if shown else ():
            ends = [all_results(run.summary).get(protocol, {}).get("accuracy") for run in members[setting.label]]
            row = {"setting": setting.label} | ({"where": world.name} if world.name else {})
            cells = {"at the end (%)": _mean(pd.Series(ends, dtype=float))}
            values = {"end": pd.Series(ends, dtype=float).mean()}
            for kind, (cost, accuracies) in shown.items():
                about = KINDS[kind]
                at, found = f"{cost / about.divisor:.3g} {about.unit}", _mean(accuracies[setting.label])
                if world.name:  # each world has a cost of its own
                    cells[f"at equal {about.words} (%)"] = f"{found} (at {at})"
                else:
                    cells[f"at {at} of {about.words} (%)"] = found
                values |= {f"{kind} cost": cost, f"at equal {kind}": accuracies[setting.label].mean()}
            words.append(row | cells)
            numbers.append(row | values)
    if not words:
        return None
    frame = pd.DataFrame(words).fillna(UNKNOWN)
    return Table("equal_cost", frame, pd.DataFrame(numbers).assign(protocol=protocol))


def _at_common_cost(
    kind: str, protocol: str, members: Mapping[str, Sequence[RunRecord]], settings: Sequence[Setting]
) -> tuple[float, dict[str, pd.Series]] | None:
    """The largest cost that all settings can be compared at, and the accuracies of their runs there, by label."""
    curves = {
        s.label: [cost_curve(kind, protocol, run.lines, run.summary) for run in members[s.label]] for s in settings
    }
    known = [curve for of_setting in curves.values() for curve in of_setting]
    cost = common_cost(known)
    if np.isnan(cost) or max(costs[-1] for costs, _ in known) < SAME * cost:  # all cost the same
        return None
    return cost, {label: pd.Series([accuracy_at(cost, c) for c in found]) for label, found in curves.items()}


def _mean(values: pd.Series) -> str:
    return mean_words((values.mean(), values.std(), values.count()), len(values))
