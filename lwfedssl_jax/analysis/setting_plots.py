"""Figures over runs: accuracy against what it costs, and learning curves."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lwfedssl_jax.analysis.settings import Setting
from lwfedssl_jax.analysis.statistics import over_seeds
from lwfedssl_jax.analysis.style import STYLES, panels, use_whole_numbers
from lwfedssl_jax.analysis.tables import Baseline
from lwfedssl_jax.analysis.wording import EXECUTED, MEMORY, TRAFFIC, cost_unit, protocol_words

ACROSS = 4  # most panels side by side
SPACING = 11  # points between settings that cost the same
WIDE_RANGE = 30  # largest cost over the smallest from which its axis is logarithmic
AXES = {
    TRAFFIC: "traffic per client, both directions",
    EXECUTED: "multiply-adds per sample, executed",
    MEMORY: "peak memory of a training step",
}


class Look(NamedTuple):
    """How a setting is drawn.

    Attributes:
      panel: title of its panel of learning curves, or an empty string.
      name: its label in the legend of learning curves.
      style: of its points in a panel of all settings.
      line: of its learning curve.
    """

    panel: str
    name: str
    style: dict[str, Any]
    line: dict[str, Any]


class Curve(NamedTuple):
    """A learning curve of a setting: each seed's values by round, and where its stages end."""

    label: str
    panel: str
    style: dict[str, Any]
    seeds: list[dict[int, float]]
    ends: tuple[float, ...] = ()


def choose_looks(settings: Sequence[Setting]) -> dict[str, Look]:
    """Choose how each setting is drawn, by its label.

    Up to seven settings share a panel, each with a colour and a marker. Of more, strategies determine the colours and
    dashes, and what else differs determines markers and panels; if strategies do not differ, seven settings share a
    panel. A setting looks alike in all figures.
    """
    if len(settings) <= len(STYLES):
        styles = [style | _dashes(i) for i, style in enumerate(STYLES)]
        return {s.label: Look("", s.label, style, style) for s, style in zip(settings, styles, strict=False)}
    strategies, rests = (
        list(dict.fromkeys(values)) for values in zip(*((s.strategy, s.rest) for s in settings), strict=False)
    )
    looks = {}
    for i, s in enumerate(settings):
        color, other = strategies.index(s.strategy), rests.index(s.rest)
        if not 1 < len(strategies) <= len(STYLES):
            color, other = i % len(STYLES), i // len(STYLES) + i % len(STYLES)
        marker = STYLES[other % len(STYLES)]["marker"]
        hollow = {"markerfacecolor": "white"} if other // len(STYLES) % 2 else {}
        style = STYLES[color] | _dashes(color) | {"marker": marker} | hollow
        if len(strategies) > 1:
            looks[s.label] = Look(s.rest or "default", s.strategy, style, style)
        else:
            first = i // len(STYLES) * len(STYLES) + 1
            last = min(first + len(STYLES) - 1, len(settings))
            looks[s.label] = Look(f"settings {first} to {last}", s.label, style, style)
    return looks


def _dashes(i: int) -> dict[str, str]:
    return {"linestyle": ("-", "--", "-.")[i % 3]}  # dotted lines are stages


def plot_costs(
    runs: pd.DataFrame, settings: Sequence[Setting], protocol: str, baselines: Sequence[Baseline] = ()
) -> Any:
    """Draw accuracy by one protocol against traffic, operations and peak memory: every run, and means with their std.

    Args:
      runs, settings: as ``settings.group_by_setting`` returns them.
      protocol: such as ``knn``.
      baselines: drawn as horizontal lines.

    Returns:
      The matplotlib figure.
    """
    looks = choose_looks(settings)
    costs = [cost for cost in AXES if runs[cost].notna().any()]
    known = [b for b in baselines if protocol in b.accuracy]
    legend_columns = max(1, 3 - max(len(label) for label in looks) // 30)
    legend_rows = -(-(len(settings) + len(known)) // legend_columns)
    figure, (axes,) = panels(1, len(costs), size=(3.2 * len(costs) + 0.6, 3.2 + 0.2 * legend_rows), sharey=True)
    for panel, cost in zip(axes, costs, strict=True):
        plot_cost(panel, runs, looks, protocol, cost)
        for i, baseline in enumerate(known):
            mean = 100 * baseline.accuracy[protocol][0]
            panel.axhline(mean, color="0.35", linestyle=(":", "-.", (0, (1, 4)))[i % 3], label=baseline.label)
        panel.autoscale_view()
    axes[0].set(ylabel=f"{protocol_words(protocol)}\naccuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] not in looks)
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="outside lower center", ncols=legend_columns
    )
    return figure


def plot_cost(panel: Any, runs: pd.DataFrame, looks: Mapping[str, Look], protocol: str, cost: str) -> None:
    """Draw accuracy against one cost: large the mean of each setting with its std, small and to its right every run.

    Settings that cost the same stand side by side.
    """
    summary, largest = over_seeds(runs), runs[cost].max()
    divisor, unit = cost_unit(cost, largest)
    at = {label: summary.loc[label, (cost, "mean")] / divisor for label in looks}
    shifts = side_by_side(at, 0.03 * largest / divisor)
    for label, look in looks.items():
        mean, std, count = summary.loc[label, f"accuracy.{protocol}"]
        form = {"linestyle": "none", "zorder": 3, "markersize": 7, "transform": _shifted(panel, shifts[label])}
        panel.errorbar(
            [at[label]], [100 * mean], 100 * std if count > 1 else None, capsize=3, label=label,
            **look.style | form | {"markeredgecolor": look.style["color"]},
        )  # fmt: skip
        seeds = runs[runs["setting"] == label]
        values = 100 * seeds[f"accuracy.{protocol}"]
        spread = [100 * (mean + side * np.nan_to_num(std)) for side in (-1, 1)]
        panel.update_datalim([(at[label], y) for y in (*spread, *values.dropna())])  # shifted points do not count
        form = {"linestyle": "none", "transform": _shifted(panel, shifts[label] + 6), "alpha": 0.6, "zorder": 2}
        panel.plot(seeds[cost] / divisor, values, **look.style | form | {"markersize": 3, "markeredgewidth": 0.5})
    panel.set(xlabel=f"{AXES[cost]}\n({unit})")
    panel.grid(alpha=0.3)
    if largest > WIDE_RANGE * runs[cost].min() > 0:
        panel.set_xscale("log")
    else:
        panel.set_xlim(0, 1.2 * largest / divisor or 1)


def side_by_side(at: Mapping[str, float], near: float) -> dict[str, float]:
    """Return by how many points to shift each setting so that those that are near each other do not overlap."""
    groups: list[list[str]] = []
    for label in sorted(at, key=lambda label: at[label]):
        if groups and at[label] - at[groups[-1][-1]] < near:
            groups[-1].append(label)
        else:
            groups.append([label])
    return {
        label: SPACING * (i - (len(g) - 1) / 2) for g in groups for i, label in enumerate(sorted(g, key=[*at].index))
    }


def _shifted(panel: Any, points: float) -> Any:
    """The panel's coordinates, that number of points to the right."""
    from matplotlib.transforms import ScaledTranslation

    return panel.transData + ScaledTranslation(points / 72, 0, panel.figure.dpi_scale_trans)


def plot_curves(curves: Sequence[Curve], ylabel: str, *, share_y: bool) -> Any:
    """Draw means over seeds by round, in a band of one standard deviation; stages end at the dotted lines.

    Returns:
      The matplotlib figure.
    """
    titles = list(dict.fromkeys(curve.panel for curve in curves))
    across = min(ACROSS, len(titles))
    down = -(-len(titles) // across)
    labels = {curve.label: None for curve in curves}
    legend_columns = max(1, (3 if across > 1 else 2) - max(map(len, labels)) // 30)
    height = (2.4 if down > 1 else 3.2) * down + 0.22 * (1 - -len(labels) // legend_columns)
    size = (max(6.4, 3 * across), height)
    figure, axes = panels(down, across, size=size, sharex=True, sharey=share_y)
    handles: dict[str, Any] = {}
    for i, (title, panel) in enumerate(zip(titles, axes.flat, strict=False)):
        panel.set_title(title, fontsize="medium")
        plot_panel(panel, [curve for curve in curves if curve.panel == title])
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
        if i % across == 0:
            panel.set(ylabel=ylabel)
        if i + across >= len(titles):  # nothing below
            panel.set(xlabel="round (dotted: a new stage)")
            panel.tick_params(labelbottom=True)
    for panel in axes.flat[len(titles) :]:
        panel.remove()
    if len(titles) > 1:  # a panel has a marker of its own, a line the colour of its strategy
        handles = {label: _without_marker(handle) for label, handle in handles.items()}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=legend_columns)
    return figure


def _without_marker(line: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=line.get_color(), linestyle=line.get_linestyle())


def plot_grid(accuracies: pd.DataFrame, names: tuple[str, str], title: str) -> Any:
    """Draw a heat map of mean accuracies.

    Args:
      accuracies: in %, a row and a column per level.
      names: of the factors of rows and columns.
      title: of the colours.

    Returns:
      The matplotlib figure.
    """
    rows, columns = accuracies.shape
    figure, ((axes,),) = panels(1, 1, size=(2.6 + 1.0 * columns, 1.3 + 0.45 * rows))
    image = axes.imshow(accuracies, aspect="auto", cmap="cividis")
    low, high = float(np.nanmin(accuracies)), float(np.nanmax(accuracies))
    for (i, j), value in np.ndenumerate(accuracies.to_numpy()):
        dark = value < (low + high) / 2
        axes.text(j, i, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
    axes.set_xticks(range(columns), accuracies.columns, rotation=20 if max(map(len, accuracies.columns)) > 10 else 0)
    axes.set_yticks(range(rows), accuracies.index)
    axes.set(xlabel=names[1], ylabel=names[0])
    figure.colorbar(image, label=title)
    return figure


def plot_panel(panel: Any, curves: Sequence[Curve]) -> None:
    """Draw the curves of one panel.

    The dotted lines at the ends of stages are grey if all curves that have stages share them, otherwise coloured.
    """
    shared = len({curve.ends for curve in curves if curve.ends}) < 2
    for curve in curves:
        plot_curve(panel, curve)
        for end in curve.ends:
            color = "0.6" if shared else curve.style["color"]
            panel.axvline(end, color=color, linestyle=":", linewidth=1, zorder=1)
    panel.grid(alpha=0.3)
    use_whole_numbers(panel.xaxis)


def plot_curve(panel: Any, curve: Curve) -> None:
    """Draw the mean over seeds of the rounds that all of them have, and its band."""
    rounds = sorted(set.intersection(*map(set, curve.seeds)))
    values_SxR = np.array([[seed[r] for r in rounds] for seed in curve.seeds])
    mean = values_SxR.mean(0)
    every = {"markevery": max(1, len(rounds) // 10)}
    panel.plot(rounds, mean, label=curve.label, zorder=3, **curve.style | {"markersize": 4} | every)
    if len(curve.seeds) > 1:
        std = values_SxR.std(0, ddof=1)
        panel.fill_between(rounds, mean - std, mean + std, color=curve.style["color"], alpha=0.2, linewidth=0, zorder=2)
