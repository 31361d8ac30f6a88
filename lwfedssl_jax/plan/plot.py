"""The figure of a plan."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lwfedssl_jax.analysis import style
from lwfedssl_jax.analysis.style import STYLES, panels, use_whole_numbers
from lwfedssl_jax.analysis.wording import byte_unit, protocol_words
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.plan.options import Option

Styles = Mapping[str, dict[str, Any]]  # by strategy
HOLLOW = {"markerfacecolor": "none"}  # options with remat


def plot_plan(devices: Sequence[DeviceClass], options: Sequence[Option], protocol: str, path: Path) -> None:
    """Draw what options require of a fleet (memory, and the share that can take part, by stage) and their accuracies.

    Args:
      devices: the fleet's classes.
      options: of a plan; by stage, only that with the fewest layers per stage of each strategy is drawn.
      protocol: of the measured accuracies; empty if there are none.
      path: of the picture.
    """
    figure, axes = panels(2 if protocol else 1, 2, size=(9, 8 if protocol else 4.4))
    memory, share, *rest = axes.flat
    styles = dict(zip(dict.fromkeys(option.strategy for option in options), itertools.cycle(STYLES), strict=False))
    by_strategy = {(option.strategy, option.remat): option for option in reversed(options)}
    shown = list(reversed(by_strategy.values()))
    plot_memory(memory, devices, shown, styles)
    plot_shares(share, shown, styles)
    if protocol:
        divisor, unit = byte_unit(max(option.ledger["total_bytes"] for option in options))
        by_share, by_traffic = rest
        plot_accuracy(by_share, options, [100 * o.everywhere for o in options], styles)
        by_share.set(xlabel="devices that can take part throughout (%)")
        plot_accuracy(by_traffic, options, [o.ledger["total_bytes"] / divisor for o in options], styles)
        by_traffic.set(xlabel=f"traffic per device ({unit})")
        for panel in rest:
            panel.set(ylabel=f"accuracy by {protocol_words(protocol)} (%)")
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    title = "numbers: layers per stage" if protocol else None
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=3, title=title)
    style.save_figure(figure, path)


def plot_memory(axes: Any, devices: Sequence[DeviceClass], options: Sequence[Option], styles: Styles) -> None:
    """Draw the peak memory of options by stage, and the memory of each device class as a dotted line."""
    peaks = [[row["peak_memory_bytes"] / 1e9 for row in option.ledger["per_stage"]] for option in options]
    plot_by_stage(axes, options, peaks, styles)
    for device in devices:
        axes.axhline(device.memory_gb, color="0.3", linewidth=1, linestyle=":")
        axes.annotate(
            f"{device.name} {device.memory_gb:g} GB",
            (1, device.memory_gb), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", fontsize=8, bbox={"facecolor": "white", "alpha": 0.7, "pad": 0.5, "linewidth": 0},
        )  # fmt: skip
    axes.set(yscale="log", ylabel="peak memory of a step (GB)")


def plot_shares(axes: Any, options: Sequence[Option], styles: Styles) -> None:
    """Draw the share of the devices that can take part in each stage of options."""
    plot_by_stage(axes, options, [[100 * share for share in option.shares[:-1]] for option in options], styles)
    axes.set(ylabel="devices that can take part (%)", ylim=(-4, 104))


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


def plot_accuracy(axes: Any, options: Sequence[Option], x: Sequence[float], styles: Styles) -> None:
    """Draw the accuracy of measured options at their ``x``, each with its layers per stage as a number."""
    for option, at in zip(options, x, strict=True):
        if option.measured:
            look = styles[option.strategy] | {"linestyle": "none"} | (HOLLOW if option.remat else {})
            point = at, 100 * option.measured.accuracy
            std = None if np.isnan(option.measured.std) else 100 * option.measured.std
            axes.errorbar(*point, std, capsize=3, **look)
            axes.annotate(str(option.layers_per_stage), point, (5, 3), textcoords="offset points", fontsize=8)
    axes.set_xlim(0, 1.08 * axes.dataLim.x1 or 1)
