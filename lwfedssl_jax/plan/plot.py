"""The figure of a plan."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lwfedssl_jax.analysis.style import STYLES, panels, save
from lwfedssl_jax.analysis.wording import protocol_words
from lwfedssl_jax.config.device_classes import DeviceClass


def plot_plan(devices: Sequence[DeviceClass], options: Sequence[Any], protocol: str, path: Path) -> None:
    """What options ask of a fleet: memory and the share that can take part, stage by stage; what they reached.

    Args:
      devices: the fleet's classes.
      options: of ``plan.Plan``; of each strategy the one with fewest layers a stage is drawn over the stages.
      protocol: by which accuracies were measured; empty where none is known.
      path: of the picture.
    """
    size, unit = (1e9, "GB") if max(option.ledger["total_bytes"] for option in options) >= 5e8 else (1e6, "MB")
    figure, axes = panels(2 if protocol else 1, 2, size=(9, 8 if protocol else 4.4))
    memory, share, *reached = axes.flat
    styles = dict(zip(dict.fromkeys(option.strategy for option in options), itertools.cycle(STYLES), strict=False))
    drawn = {(option.strategy, option.remat): option for option in reversed(options)}
    for number, ((strategy, remat), option) in enumerate(reversed(drawn.items())):
        rows = option.ledger["per_stage"]
        depth = [0, *(row["depth"] for row in rows)]
        style = styles[strategy] | ({"linestyle": "--", "markerfacecolor": "none"} if remat else {})
        for panel, values in (
            (memory, [row["peak_memory_bytes"] / 1e9 for row in rows]),
            (share, [100 * x for x in option.shares[:-1]]),
        ):
            label = f"{strategy}{', remat' if remat else ''}"
            x, y = np.repeat(depth, 2)[1:-1], np.repeat(values, 2)
            panel.plot(x, y, **style, label=label, markevery=(number % max(1, len(x) // 2), max(1, len(x) // 4)))
    for device in devices:
        memory.axhline(device.memory_gb, color="0.3", linewidth=1, linestyle=":")
        memory.annotate(
            f"{device.name} {device.memory_gb:g} GB",
            (1, device.memory_gb), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", fontsize=8, bbox={"facecolor": "white", "alpha": 0.7, "pad": 0.5, "linewidth": 0},
        )  # fmt: skip
    memory.set(yscale="log", ylabel="peak memory of a step (GB)")
    share.set(ylabel="devices that can take part (%)", ylim=(-4, 104))
    for panel in (memory, share):
        panel.set(xlabel="layers of the encoder so far, by stage")
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel, label, of in zip(
        reached,
        ("devices that can take part throughout (%)", f"traffic of a device ({unit})"),
        (lambda o: 100 * o.everywhere, lambda o: o.ledger["total_bytes"] / size),
        strict=False,
    ):
        for option in options:
            if option.measured:
                style = styles[option.strategy] | {"linestyle": "none"}
                style |= {"markerfacecolor": "none"} if option.remat else {}
                point = of(option), 100 * option.measured.accuracy
                std = None if np.isnan(option.measured.std) else 100 * option.measured.std
                panel.errorbar(*point, std, capsize=3, **style)
                panel.annotate(str(option.layers_per_stage), point, (5, 3), textcoords="offset points", fontsize=8)
        panel.set(xlabel=label, ylabel=f"accuracy by {protocol_words(protocol)} (%)")
        panel.set_xlim(0, 1.08 * panel.dataLim.x1 or 1)
    for panel in (memory, share, *reached):
        panel.grid(alpha=0.3)
    title = "numbers: layers a stage" if protocol else None
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=3, title=title)
    save(figure, path)
