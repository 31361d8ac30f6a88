"""The figures of a plan."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lwfedssl_jax.analysis import style
from lwfedssl_jax.analysis.style import STYLES, panels, use_whole_numbers
from lwfedssl_jax.analysis.wording import byte_unit, protocol_words, time_unit
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.plan.frontier import accuracy_of, comparable
from lwfedssl_jax.plan.make import Plan
from lwfedssl_jax.plan.options import Option

Styles = Mapping[str, dict[str, Any]]  # by strategy
HOLLOW = {"markerfacecolor": "white"}  # options with remat


def plot_plan(plan: Plan, path: Path) -> None:
    """Draw what options cost against their accuracies, and what their stages require of the fleet.

    By stage, only the option with the fewest layers per stage of each strategy is drawn.
    """
    figure, axes = panels(2, 2, size=(9.5, 8.6))
    styles = styles_of(plan.options)
    draw_costs(axes[0, 0], plan, styles)
    draw_peaks(axes[0, 1], plan, styles)
    by_strategy = {(option.strategy, option.remat): option for option in reversed(plan.options)}
    shown = list(reversed(by_strategy.values()))
    plot_memory(axes[1, 0], plan.devices, shown, styles)
    plot_shares(axes[1, 1], shown, styles)
    handles = axes[1, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, title="numbers: layers per stage; ring: recommended")
    style.save_figure(figure, path)


def choice_figures(plan: Plan) -> list[Any]:
    """Make the figures of the page: the accuracies of options against what they cost, and against peak memory."""
    styles, figures = styles_of(plan.options), []
    for draw in (draw_costs, draw_peaks):
        figure, axes = panels(1, 1, size=(5.4, 4.9))
        draw(axes[0, 0], plan, styles)
        plot = axes[0, 0].plot
        handles = [
            *(plot([], [], **look | {"linestyle": "none"}, label=name)[0] for name, look in styles.items()),
            plot([], [], "o", color="0.3", **HOLLOW, label="hollow: with remat")[0],
            plot([], [], "o", color="0.3", alpha=PALE, label="pale: leaves clients out")[0],
            plot([], [], **RING | {"markersize": 11}, label="ring: recommended")[0],
        ]
        figure.legend(
            handles=handles, loc="outside lower center", ncols=2, title="numbers: layers per stage", fontsize=9
        )
        figures.append(figure)
    return figures


PALE = 0.45  # opacity of options that leave clients out
RING: dict[str, Any] = {
    "marker": "o", "markersize": 19, "markerfacecolor": "none", "color": "black", "linestyle": "none"
}  # fmt: skip


def styles_of(options: Sequence[Option]) -> Styles:
    """Give each strategy its look."""
    return dict(zip(dict.fromkeys(option.strategy for option in options), itertools.cycle(STYLES), strict=False))


def draw_costs(axes: Any, plan: Plan, styles: Styles) -> None:
    """Draw the accuracies of options that a client can take part in throughout against a run's time, or traffic."""
    options = [option for option in comparable(plan.options) if option.everywhere]
    if any(option.seconds for option in options):
        divisor, unit = time_unit([option.seconds for option in options])
        plot_accuracy(axes, plan, options, [option.seconds / divisor for option in options], styles)
        axes.set(xlabel=f"time of the whole run ({unit})")
    else:
        divisor, unit = byte_unit(max((option.traffic_bytes for option in options), default=0))
        plot_accuracy(axes, plan, options, [option.traffic_bytes / divisor for option in options], styles)
        axes.set(xlabel=f"traffic per device ({unit})")
    if options:
        axes.set_xlim(0, 1.08 * axes.dataLim.x1)


def draw_peaks(axes: Any, plan: Plan, styles: Styles) -> None:
    """Draw the accuracies of options against their peak memory, and the memory of each class as a dotted line."""
    from matplotlib.ticker import LogLocator, NullLocator

    options = comparable(plan.options)
    peaks = [option.ledger["peak_memory_bytes"] for option in options]
    divisor, unit = byte_unit(max(peaks, default=0))
    plot_accuracy(axes, plan, options, [peak / divisor for peak in peaks], styles)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel=f"peak memory of a training step ({unit}); dotted: devices")
    for device in able(plan.devices):
        memory = 1e9 * device.step_gb / divisor
        axes.axvline(memory, color="0.3", linewidth=1, linestyle=":")
        axes.annotate(
            device.name, (memory, 1), (-3, -4), xycoords=("data", "axes fraction"),
            textcoords="offset points", rotation=90, ha="right", va="top", fontsize=8, color="0.3",
        )  # fmt: skip


def able(devices: Sequence[DeviceClass]) -> list[DeviceClass]:
    """Return the device classes that have memory for a training step."""
    return [device for device in devices if device.step_gb > 0]


def plot_accuracy(axes: Any, plan: Plan, options: Sequence[Option], x: Sequence[float], styles: Styles) -> None:
    """Draw the accuracies of options at their ``x``, each with its layers per stage as a number."""
    drawn = Counter[tuple[str, bool]]()
    for option, at in zip(options, x, strict=True):
        look = styles[option.strategy] | {"linestyle": "none"} | (HOLLOW if option.remat else {})
        point = at, 100 * accuracy_of(option)
        known = option.measured and not np.isnan(option.measured.std)
        std = 100 * option.measured.std if option.measured and known else None
        axes.errorbar(*point, std, capsize=3, alpha=1 if option.everywhere == 1 else PALE, **look)
        recommended = option is plan.recommendation.option
        drawn[option.strategy, option.remat] += 1  # neighbours have their numbers on different sides
        side = 1 if drawn[option.strategy, option.remat] % 2 else -1
        right, up = (11, 5) if recommended else (5, -9 if option.remat else 3)
        axes.annotate(
            str(option.layers_per_stage), point, (side * right, up), textcoords="offset points", fontsize=8,
            ha="left" if side > 0 else "right", fontweight="bold" if recommended else "normal",
        )  # fmt: skip
        if recommended:
            axes.plot(*point, **RING)
    what = protocol_words(plan.results.protocol) if plan.results.protocol else "as published, on other data"
    axes.set(ylabel=f"accuracy, {what} (%)")
    axes.grid(alpha=0.3)


def plot_memory(axes: Any, devices: Sequence[DeviceClass], options: Sequence[Option], styles: Styles) -> None:
    """Draw the peak memory of options by stage, and the memory of each device class as a dotted line."""
    peaks = [[row["peak_memory_bytes"] / 1e9 for row in option.ledger["per_stage"]] for option in options]
    plot_by_stage(axes, options, peaks, styles)
    for device in able(devices):
        axes.axhline(device.step_gb, color="0.3", linewidth=1, linestyle=":")
        axes.annotate(
            f"{device.name} {device.step_gb:.3g} GB",
            (1, device.step_gb), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", fontsize=8, bbox={"facecolor": "white", "alpha": 0.7, "pad": 0.5, "linewidth": 0},
        )  # fmt: skip
    axes.set(yscale="log", ylabel="peak memory of a step (GB)")
    axes.grid(alpha=0.3)


def plot_shares(axes: Any, options: Sequence[Option], styles: Styles) -> None:
    """Draw the share of the clients that can take part in each stage of options."""
    plot_by_stage(axes, options, [[100 * share for share in option.shares] for option in options], styles)
    axes.set(ylabel="clients that can take part (%)", ylim=(-4, 104))
    axes.grid(alpha=0.3)


def plot_by_stage(axes: Any, options: Sequence[Option], values: Sequence[Sequence[float]], styles: Styles) -> None:
    """Draw a value per stage of each option as steps over the layers of the encoder."""
    for number, (option, stage_values) in enumerate(zip(options, values, strict=True)):
        depth = [0, *(row["depth"] for row in option.ledger["per_stage"])]
        look = styles[option.strategy] | ({"linestyle": "--", **HOLLOW} if option.remat else {})
        label = f"{option.strategy}{', remat' if option.remat else ''}"
        x, y = np.repeat(depth, 2)[1:-1], np.repeat(stage_values, 2)
        markers = (number % max(1, len(x) // 2), max(1, len(x) // 4))  # lines may coincide: their markers take turns
        axes.plot(x, y, **look, label=label, markevery=markers)
    axes.set(xlabel="layers of the encoder so far, by stage")
    use_whole_numbers(axes.xaxis)
