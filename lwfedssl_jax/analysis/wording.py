"""Numbers, units and names of protocols as people read them."""

import math
from collections.abc import Sequence
from typing import Any

from lwfedssl_jax.analysis.results import COSTS

MIB = 2**20


def protocol_words(protocol: str) -> str:
    """A protocol's name for a reader."""
    if protocol == "fine_tune":
        return "fine-tuning"
    kind, _, labels = protocol.rpartition("_")
    return f"linear probe, {labels} labels{'' if labels == 'all' else ' a class'}" if kind else "kNN"


def settings_words(result: dict[str, Any]) -> str:
    """The settings of an evaluation, such as "k = 20, kNN"."""
    if "epochs" in result:
        return f"{result['epochs']} epochs of AdamW at {result['learning_rate']}, {result['views']}"
    if "neighbours" in result:
        return f"k = {result['neighbours']}, {result['classifier']}"
    draws = f"mean of {result['draws']} draws, " if result["draws"] > 1 else ""
    return f"{draws}{result['classifier']}"


def percent_text(result: dict[str, Any]) -> str:
    """An accuracy in percent, with its spread over draws if there are several."""
    spread = f" ± {100 * result['std']:.1f}" if result.get("draws", 1) > 1 else ""
    return f"{100 * result['accuracy']:.1f}{spread}"


GIGA = 10**9
TRAFFIC, RULE, EXECUTED, MEMORY = COSTS
# Units by the largest value they are for, from the paper's: operations in 10⁹, traffic in 1000 MiB.
UNITS: dict[str, list[tuple[float, float, str]]] = {
    TRAFFIC: [(MIB, 1024, "KiB"), (1000 * MIB, MIB, "MiB"), (float("inf"), 1000 * MIB, "1000 MiB")],
    MEMORY: [(MIB, 1024, "KiB"), (1024 * MIB, MIB, "MiB"), (float("inf"), 1024 * MIB, "GiB")],
    RULE: [(1e8, 1e6, "M"), (1e13, GIGA, "G"), (float("inf"), 1e12, "T")],
}
UNITS[EXECUTED] = UNITS[RULE]
TITLES = {TRAFFIC: "traffic", RULE: "FLOPs, paper's rule", EXECUTED: "FLOPs executed", MEMORY: "peak memory"}
UNKNOWN = "-"


def unit(cost: str, largest: float) -> tuple[float, str]:
    """What to divide a cost by to show it, and that unit's name."""
    return next((scale, name) for upto, scale, name in UNITS[cost] if not largest >= upto)


def accuracy_words(over_seeds: Sequence[float], of: float = 0) -> str:
    """Mean, std and count in %: with the spread where there are several seeds, and their number where not ``of``."""
    mean, std, count = over_seeds
    if not count:
        return UNKNOWN
    spread = f" ± {100 * std:.1f}" if count > 1 else ""
    return f"{100 * mean:.1f}{spread}" + (f" (n = {count:.0f})" if of and count != of else "")


def cost_words(value: float, against: float, scale: float) -> str:
    """``1.66 (0.20x)``: a cost, and its ratio to end_to_end's; either may be NaN."""
    if math.isnan(value):
        return UNKNOWN
    return f"{value / scale:.2f}" + ("" if math.isnan(against) else f" ({against:.2f}x)")


def time_text(seconds: float) -> str:
    """Seconds in the largest unit of which there are at least two."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{short_number(seconds / size)} {unit}"
    return f"{short_number(seconds)} s"


def short_number(x: float) -> str:
    """Two digits, or all before the point."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def unit_text(nbytes: float) -> tuple[float, str]:
    """The unit, in bytes and by name, in which a number of bytes reads best."""
    return (1e9, "GB") if nbytes >= 5e8 else (1e6, "MB")


def percent_range(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.3g} %"
