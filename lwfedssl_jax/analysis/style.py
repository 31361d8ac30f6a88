"""The style of all figures, and helpers to draw them."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lwfedssl_jax.analysis.wording import MIB

TRAFFIC_LABEL = "mean traffic per drawn client, summed over rounds (MiB)"

# Okabe and Ito's colours, which colour-blind readers can distinguish; markers also survive a grey print.
STYLES = [
    {"color": color, "marker": marker, "markersize": 5}
    for color, marker in zip(
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), "osD^v<>", strict=True
    )
]


def traffic_by_round(lines: list[dict[str, Any]]) -> dict[int, float]:
    """The traffic in MiB, both directions, of a drawn client per round, summed up to each round of ``metrics.jsonl``.

    Where all clients are drawn and report in every round, it is what each client has exchanged.
    """
    traffic, total = {0: 0.0}, 0.0
    for line in lines:
        if "event" not in line:
            drawn = line["clients"] + line["dropped"]
            total += (line["download_bytes"] + line["upload_bytes"]) / max(drawn, 1) / MIB
            traffic[line["round"]] = total
    return traffic


def stage_ends(rounds: Sequence[dict[str, Any]]) -> list[float]:
    """The positions, between two rounds (their lines of ``metrics.jsonl``), at which a new stage begins."""
    pairs = itertools.pairwise(rounds)
    return [before["round"] + 0.5 for before, after in pairs if before["stage"] != after["stage"]]


def mark_stages(axes: Any, rounds: list[dict[str, Any]]) -> None:
    """Draw a dotted line at the end of each stage."""
    for end in stage_ends(rounds):
        axes.axvline(end, color="0.7", linestyle=":")
    axes.set(xlabel="round (dotted: a new stage)")


def new_figure(title: str) -> tuple[Any, Any]:
    """Make a figure with one panel and a title."""
    figure, axes = panels(1, 1, size=(6, 4))
    axes[0, 0].set_title(title)
    return figure, axes[0, 0]


def panels(rows: int, columns: int, size: tuple[float, float], **layout: Any) -> tuple[Any, Any]:
    """Make a figure of a size in inches, and its axes as an array of rows and columns."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **layout)


def use_whole_numbers(*axes: Any) -> None:
    """Label each axis (x or y of a panel) at whole numbers only."""
    for axis in axes:
        axis.get_major_locator().set_params(integer=True)


def save_figure(figure: Any, path: Path) -> None:
    """Write the figure as a PNG, and create its folder if needed."""
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def save_with_svg(figure: Any, folder: Path, name: str) -> bytes:
    """Write ``NAME.png`` and ``NAME.svg``, and return the bytes of the latter, which equal figures share.

    What a file's name cannot have, such as the ``/`` of a data set, becomes ``-``.
    """
    import matplotlib

    name = re.sub(r"[^\w.@=-]+", "-", name)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=150)
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return (folder / f"{name}.svg").read_bytes()
