"""The style of all figures."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lwfedssl_jax.analysis.wording import MIB

TRAFFIC_LABEL = "a drawn client's mean traffic, summed over rounds (MiB)"

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers also survive a grey print.
STYLES = [
    {"color": color, "marker": marker, "markersize": 5}
    for color, marker in zip(
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), "osD^v<>", strict=True
    )
]


def traffic_by_round(lines: list[dict[str, Any]]) -> dict[int, float]:
    """After each round of ``metrics.jsonl``, what a drawn client exchanges a round, both directions, summed, in MiB.

    It is what each client has exchanged where all are drawn and report in every round.
    """
    traffic, total = {0: 0.0}, 0.0
    for line in lines:
        if "event" not in line:
            drawn = line["clients"] + line["dropped"]
            total += (line["download_bytes"] + line["upload_bytes"]) / max(drawn, 1) / MIB
            traffic[line["round"]] = total
    return traffic


def stage_ends(rounds: Sequence[dict[str, Any]]) -> list[float]:
    """Where between two rounds (their lines of ``metrics.jsonl``) a new stage begins."""
    return [a["round"] + 0.5 for a, b in itertools.pairwise(rounds) if a["stage"] != b["stage"]]


def mark_stages(axes: Any, rounds: list[dict[str, Any]]) -> None:
    """Draw a dotted line at the end of each stage."""
    for end in stage_ends(rounds):
        axes.axvline(end, color="0.7", linestyle=":")
    axes.set(xlabel="round (dotted: a new stage)")


def new_figure(title: str) -> tuple[Any, Any]:
    """A figure of one panel with a title."""
    figure, axes = panels(1, 1, size=(6, 4))
    axes[0, 0].set_title(title)
    return figure, axes[0, 0]


def panels(rows: int, columns: int, size: tuple[float, float], **layout: Any) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes as an array of rows and columns."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **layout)


def save(figure: Any, path: Path) -> None:
    """Write the figure as a PNG, making its folder."""
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
