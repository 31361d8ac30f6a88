"""The figure of what a pilot measured, over what was predicted."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from lwfedssl_jax.analysis.device_tables import RATIOS, by_stage, ratios
from lwfedssl_jax.analysis.style import STYLES, panels, use_whole_numbers

MOST_TICKS = 12
PANELS = {"download": RATIOS[0:2], "upload": RATIOS[2:4], "training time": RATIOS[4:5], "memory": RATIOS[5:6]}


def plot_ratios(lines: Sequence[dict[str, Any]]) -> Any:
    """Draw measured over predicted by stage: the median over devices and rounds, and its range.

    Args:
      lines: as ``device_tables.measured_lines`` returns them.

    Returns:
      The matplotlib figure.
    """
    figure, axes = panels(1, len(PANELS), size=(11, 3.2))
    stages = by_stage(lines)
    for panel, (title, shown) in zip(axes.flat, PANELS.items(), strict=True):
        for number, ratio in enumerate(shown):
            known = {stage: values for stage, of in stages.items() if (values := ratios(of, ratio))}
            middle = np.array([median(values) for values in known.values()])
            spread = np.array([(m - min(x), max(x) - m) for m, x in zip(middle, known.values(), strict=True)])
            at = np.array(list(known)) + 0.12 * (number - (len(shown) - 1) / 2)
            label = ratio.words.rpartition(", ")[2] if len(shown) > 1 else None
            style = STYLES[number] | {"linestyle": "none"}
            panel.errorbar(at, middle, spread.T if len(at) else None, capsize=3, label=label, **style)
        panel.axhline(1, color="0.35", linewidth=1, linestyle=":")
        panel.set(title=title, xlabel="stage", xlim=(min(stages) - 0.5, max(stages) + 0.5))
        panel.set_ylim(bottom=min(0.9, panel.get_ylim()[0]), top=max(1.1, panel.get_ylim()[1]))
        panel.grid(alpha=0.3)
        if len(stages) <= MOST_TICKS:
            panel.set_xticks(list(stages))
        else:
            use_whole_numbers(panel.xaxis)
        if len(shown) > 1:
            panel.legend(fontsize=8)
    axes[0, 0].set_ylabel("measured / predicted")
    return figure
