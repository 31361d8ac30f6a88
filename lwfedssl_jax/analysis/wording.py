"""Numbers, units and names as people read them: in tables, figures, reports and on the terminal."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lwfedssl_jax.config.protocols import FINE_TUNE, split_protocol

MIB = 2**20
UNKNOWN = "-"
TIME_UNITS = {"d": 86400.0, "h": 3600.0, "min": 60.0}

# What a run costs a client: columns of a frame of results.
COSTS = TRAFFIC, RULE, EXECUTED, MEMORY = "traffic_bytes", "flops_paper_rule", "flops_executed", "peak_memory_bytes"
TITLES = {
    TRAFFIC: "traffic", RULE: "multiply-adds, paper's rule", EXECUTED: "multiply-adds executed", MEMORY: "peak memory"
}  # fmt: skip

# (largest value, divisor, name), after the paper's: operations in 10⁹, traffic in 1000 MiB.
OPERATION_UNITS = [(1e8, 1e6, "M"), (1e13, 1e9, "G"), (math.inf, 1e12, "T")]
UNITS: dict[str, list[tuple[float, float, str]]] = {
    TRAFFIC: [(MIB, 1024, "KiB"), (1000 * MIB, MIB, "MiB"), (math.inf, 1000 * MIB, "1000 MiB")],
    MEMORY: [(MIB, 1024, "KiB"), (1024 * MIB, MIB, "MiB"), (math.inf, 1024 * MIB, "GiB")],
    RULE: OPERATION_UNITS,
    EXECUTED: OPERATION_UNITS,
}


# What happened to a device of a pilot.
EVENTS = {
    "joined": "{name} joined",
    "returned": "{name} returned",
    "left": "{name} left",
    "late": "{name} was late",
    "missing": "{name} had lost layers",
    "refused": "{name} was left out",
    "failed": "{name} did not answer",
    "waiting": "waiting for devices",
}


def protocol_words(protocol: str) -> str:
    """The name of an evaluation protocol, such as "linear probe, 5 labels per class" for ``linear_probe_5``."""
    protocol, data = split_protocol(protocol)
    if data:
        return f"{protocol_words(protocol)}, on {data}"
    if protocol == FINE_TUNE:
        return "fine-tuning"
    kind, _, labels = protocol.rpartition("_")
    kinds = {FINE_TUNE: "fine-tuning", "linear_probe": "linear probe"}
    return f"{kinds[kind]}, {labels} labels{'' if labels == 'all' else ' per class'}" if kind in kinds else "kNN"


def settings_words(result: Mapping[str, Any]) -> str:
    """The settings of an evaluation, such as "k = 20, votes exp(cosine / 0.07)"."""
    if "epochs" in result:
        draws = f"mean of {result['draws']} draws, " if result.get("draws", 1) > 1 else ""
        return f"{draws}{result['epochs']} epochs of AdamW at {result['learning_rate']}, {result['views']}"
    if "neighbours" in result:
        return f"k = {result['neighbours']}, {result['classifier']}"
    draws = f"mean of {result['draws']} draws, " if result["draws"] > 1 else ""
    return f"{draws}{result['classifier']}"


def count_of(number: int, noun: str) -> str:
    """A number and its noun, such as "1 seed" or "3 seeds"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def percent(share: float) -> str:
    """A share in [0, 1] with one decimal place, such as "75.0 %"."""
    return f"{100 * share:.1f} %"


def round_percent(share: float) -> str:
    """A share in [0, 1] in whole percent, such as "75 %"; with more digits near 0 and 100 %, which it is not then."""
    whole = 0.01 <= share <= 0.99 or share in (0, 1)
    return f"{100 * share:.0f} %" if whole else f"{100 * share:.3g} %"


def accuracy_words(result: Mapping[str, Any]) -> str:
    """The accuracy of one run in percent, with its standard deviation over draws if there are several."""
    spread = f" ± {100 * result['std']:.1f}" if result.get("draws", 1) > 1 else ""
    return f"{100 * result['accuracy']:.1f}{spread}"


def mean_words(mean_std_count: Sequence[float], seeds: float = 0) -> str:
    """A mean accuracy over seeds in percent, with its standard deviation if there are several.

    Args:
      mean_std_count: of the accuracies, the first two in [0, 1].
      seeds: the number that is shown elsewhere; another count is added as "(n = 2)". 0: no count is added.
    """
    mean, std, known = mean_std_count
    if not known:
        return UNKNOWN
    spread = f" ± {100 * std:.1f}" if known > 1 else ""
    return f"{100 * mean:.1f}{spread}" + (f" (n = {known:.0f})" if seeds and known != seeds else "")


def cost_unit(cost: str, largest: float) -> tuple[float, str]:
    """The divisor and the name of the unit in which to show a cost (of ``COSTS``) of at most ``largest``."""
    return next((divisor, name) for limit, divisor, name in UNITS[cost] if not largest >= limit)  # NaN: the first


def cost_words(value: float, ratio: float, divisor: float) -> str:
    """A cost in a unit and its ratio to that of end_to_end, such as "1.66 (0.20x)"; both may be NaN."""
    if math.isnan(value):
        return UNKNOWN
    return f"{value / divisor:.2f}" + ("" if math.isnan(ratio) else f" ({ratio:.2f}x)")


def number_or_unknown(value: float, form: str) -> str:
    """A number in a format of Python's, or "-" for NaN."""
    return UNKNOWN if math.isnan(value) else format(value, form)


def byte_unit(size: float) -> tuple[float, str]:
    """The divisor and the name of the decimal unit in which a number of bytes reads best."""
    return (1e9, "GB") if size >= 5e8 else (1e6, "MB")


def bytes_words(size: float) -> str:
    """A number of bytes in a decimal unit, such as "1.7 GB"."""
    divisor, name = byte_unit(size)
    return f"{short_number(size / divisor)} {name}"


def time_unit(seconds: Sequence[float]) -> tuple[float, str]:
    """The divisor and the name of the largest unit of which the median of some times has at least two."""
    median = sorted(seconds)[len(seconds) // 2] if seconds else 0.0
    return next(((size, name) for name, size in TIME_UNITS.items() if median >= 2 * size), (1.0, "s"))


def time_words(seconds: float) -> str:
    """Seconds in the largest unit of which there are at least two, such as "36 h"."""
    size, name = time_unit([seconds])
    return f"{short_number(seconds / size)} {name}"


def clock(seconds: float) -> str:
    """``minutes:seconds``, or ``hours:minutes:seconds`` from one hour on."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours}:{minutes % 60:02d}:{int(seconds) % 60:02d}" if hours else f"{minutes}:{int(seconds) % 60:02d}"


def short_number(number: float) -> str:
    """A number of at least 10 without decimals, a smaller one with two digits."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def event_sentence(line: Mapping[str, Any]) -> str:
    """Describe an event of a pilot, by its line of ``pilot.jsonl``; empty for other lines."""
    form = EVENTS.get(line.get("event", ""))
    if not form:
        return ""
    what = form.format(name=line.get("name") or "a device that is not known")
    return what + (f": {line['why']}" if line.get("why") else "")
