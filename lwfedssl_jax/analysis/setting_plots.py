"""Figures over runs: accuracy against what it costs, and learning curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lwfedssl_jax.analysis.settings import Setting
from lwfedssl_jax.analysis.statistics import over_seeds
from lwfedssl_jax.analysis.style import STYLES, panels
from lwfedssl_jax.analysis.tables import Baseline
from lwfedssl_jax.analysis.wording import EXECUTED, MEMORY, TRAFFIC, protocol_words, unit

if TYPE_CHECKING:
    import pandas as pd


ACROSS = 4  # panels beside each other
WIDE_RANGE = 30  # largest cost over the smallest from which its axis is logarithmic
AXES = {
    TRAFFIC: "a client's traffic, both directions",
    EXECUTED: "multiply-adds a sample, executed",
    MEMORY: "peak memory of a training step",
}


class Look(NamedTuple):
    """How a setting is drawn: ``style`` where all settings are, ``line`` as ``name`` in its panel of curves."""

    panel: str
    name: str
    style: dict[str, Any]
    line: dict[str, Any]


class Curve(NamedTuple):
    """A setting's curves in a panel: each seed's values by round, and where its stages end."""

    label: str
    panel: str
    style: dict[str, Any]
    seeds: list[dict[int, float]]
    ends: tuple[float, ...] = ()


def look(settings: Sequence[Setting]) -> dict[str, Look]:
    """How each setting is drawn, by its label.

    Up to seven settings share a panel and have a colour and a marker each. Of more, strategies have the colours and
    what else differs the markers and panels; where strategies do not differ, seven settings share a panel.
    """
    if len(settings) <= len(STYLES):
        styles = [style | _line(i) for i, style in enumerate(STYLES)]
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
        style = STYLES[color] | _line(color) | {"marker": marker} | hollow
        if len(strategies) > 1:
            looks[s.label] = Look(s.rest or "as usual", s.strategy, style, STYLES[color] | _line(color))
        else:
            looks[s.label] = Look(
                f"settings {i // 7 * 7 + 1} to {min(i // 7 * 7 + 7, len(settings))}", s.label, style, style
            )
    return looks


def _line(i: int) -> dict[str, str]:
    return {"linestyle": ("-", "--", "-.")[i % 3]}  # dotted lines are stages


def plot_costs(
    runs: "pd.DataFrame", settings: Sequence[Setting], protocol: str, baselines: Sequence[Baseline] = ()
) -> Any:
    """Accuracy by one protocol against traffic, operations and peak memory: every run, and means with their spread.

    Args:
      runs, settings: as ``comparison.settle`` gives them.
      protocol: such as ``knn``.
      baselines: drawn as lines across.
    """
    looks, summary = look(settings), over_seeds(runs)
    costs = [cost for cost in AXES if runs[cost].notna().any()]
    known = [b for b in baselines if protocol in b.accuracy]
    legend_columns = max(1, 3 - max(len(label) for label in looks) // 30)
    lines = -(-(len(settings) + len(known)) // legend_columns)
    figure, (axes,) = panels(1, len(costs), size=(3.2 * len(costs) + 0.6, 3.2 + 0.2 * lines), sharey=True)
    for panel, cost in zip(axes, costs, strict=True):
        scale, name = unit(cost, runs[cost].max())
        placed: list[tuple[float, float]] = []
        for label, (_, _, style, _) in looks.items():
            own, x = runs[runs["setting"] == label], summary.loc[label, (cost, "mean")] / scale
            mean, std, count = summary.loc[label, f"accuracy.{protocol}"]
            near = 0.03 * runs[cost].max() / scale
            beside = sum(abs(x - other) < near and abs(mean - y) < 0.1 for other, y in placed) % 4
            placed.append((x, mean))
            at = {"linestyle": "none", "zorder": 3 - 0.1 * beside}  # never moved: costs may differ by little
            panel.errorbar(
                [x], [100 * mean], 100 * std if count > 1 else None, capsize=3, label=label,
                **style | at | {"markersize": 7 + 4 * beside, "markeredgecolor": style["color"]},
            )  # fmt: skip
            at = {"linestyle": "none", "transform": _moved(panel, 6), "alpha": 0.6, "zorder": 2}
            values = 100 * own[f"accuracy.{protocol}"]
            spread = [100 * (mean + side * np.nan_to_num(std)) for side in (-1, 1)]
            panel.update_datalim([(x, y) for y in (*spread, *values.dropna())])  # what is moved does not count
            panel.plot(own[cost] / scale, values, **style | at | {"markersize": 3, "markeredgewidth": 0.5})
        for i, baseline in enumerate(known):
            mean = 100 * baseline.accuracy[protocol][0]
            line = (":", "-.", (0, (1, 4)))[i % 3]
            panel.axhline(mean, color="0.35", linestyle=line, label=baseline.label)
        panel.autoscale_view()
        panel.set(xlabel=f"{AXES[cost]}\n({name})")
        panel.grid(alpha=0.3)
        if runs[cost].max() > WIDE_RANGE * runs[cost].min() > 0:
            panel.set_xscale("log")
        else:
            panel.set_xlim(0, 1.12 * runs[cost].max() / scale or 1)
    axes[0].set(ylabel=f"{protocol_words(protocol)}\naccuracy (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda i: labels[i] not in looks)
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="outside lower center", ncols=legend_columns
    )
    return figure


def _moved(panel: Any, points: float) -> Any:
    """The panel's coordinates, so many points to the right."""
    from matplotlib.transforms import ScaledTranslation

    return panel.transData + ScaledTranslation(points / 72, 0, panel.figure.dpi_scale_trans)


def plot_curves(curves: Sequence[Curve], ylabel: str, *, share_y: bool) -> Any:
    """Means over seeds by round, in a band of a standard deviation; stages end at the dotted lines.

    A panel's dotted lines are grey where all its curves that have stages share them, else of their colour.
    """
    titles = list(dict.fromkeys(curve.panel for curve in curves))
    across = min(ACROSS, len(titles))
    down = -(-len(titles) // across)
    labels = {curve.label: None for curve in curves}
    legend_columns = max(1, (3 if across > 1 else 2) - max(map(len, labels)) // 30)
    height = (2.4 if down > 1 else 3.2) * down + 0.22 * (1 - -len(labels) // legend_columns)
    size = (max(6.4, 3 * across), height)
    figure, axes = panels(down, across, size=size, sharex=True, sharey=share_y)
    for title, panel in zip(titles, axes.flat, strict=False):
        panel.set_title(title, fontsize="medium")
        members = [curve for curve in curves if curve.panel == title]
        shared = len({curve.ends for curve in members if curve.ends}) < 2
        for curve in members:
            _plot_curve(panel, curve)
            for end in curve.ends:
                color = "0.6" if shared else curve.style["color"]
                panel.axvline(end, color=color, linestyle=":", linewidth=1, zorder=1)
        panel.grid(alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=True)
    for i, panel in enumerate(axes.flat[: len(titles)]):
        if i % across == 0:
            panel.set(ylabel=ylabel)
        if i + across >= len(titles):  # nothing below
            panel.set(xlabel="round (dotted: a new stage)")
            panel.tick_params(labelbottom=True)
    for panel in axes.flat[len(titles) :]:
        panel.remove()
    handles: dict[str, Any] = {}
    for panel in axes.flat[: len(titles)]:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=legend_columns)
    return figure


def _plot_curve(panel: Any, curve: Curve) -> None:
    rounds = sorted(set.intersection(*map(set, curve.seeds)))
    values_SxR = np.array([[seed[r] for r in rounds] for seed in curve.seeds])
    mean = values_SxR.mean(0)
    every = {"markevery": max(1, len(rounds) // 10)}
    panel.plot(rounds, mean, label=curve.label, zorder=3, **curve.style | {"markersize": 4} | every)
    if len(curve.seeds) > 1:
        std = values_SxR.std(0, ddof=1)
        panel.fill_between(rounds, mean - std, mean + std, color=curve.style["color"], alpha=0.2, linewidth=0, zorder=2)


def save(figure: Any, folder: Path, name: str) -> bytes:
    """Write ``NAME.png`` and ``NAME.svg``, and return the latter; the same figure is always the same bytes."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=150)
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return (folder / f"{name}.svg").read_bytes()
