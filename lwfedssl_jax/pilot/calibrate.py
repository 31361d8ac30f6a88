"""From a pilot's measurements to the classes of devices that ``plan`` takes."""

import csv
import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.config.device_classes import COLUMNS, DeviceClass, describe, load_classes
from lwfedssl_jax.system.files import write_whole
from lwfedssl_jax.workdir.metrics import read_pilot

CLASSES = "devices.csv"
DIGITS = 3
ACCELERATED = " with "  # in the platform of a device whose memory_gb is its accelerator's


class Calibration(NamedTuple):
    """What was measured.

    Attributes:
      classes: of devices.
      members: names of the devices of each class.
      speeds: floating-point operations per second of each device in each stage, by name and stage.
      memory: bytes of each device's process before any model, and at most beyond its programs, by name.
    """

    classes: list[DeviceClass]
    members: list[list[str]]
    speeds: dict[str, dict[int, float]]
    memory: dict[str, tuple[int, int]]


def calibrate(directory: Path) -> Calibration:
    """Make a class of the devices with the same system, number of cores and memory.

    A class has the median of its devices' speeds, and of their links if all of these were measured; the least of the
    memory that their processes could have, and the most that one of them needed beyond its compiled program.

    Raises:
      ConfigError: no device was measured there.
    """
    about, lines = dict[str, Mapping[str, Any]](), dict[str, list[Mapping[str, Any]]]()
    try:
        for line in read_pilot(directory):
            if "device" in line:
                about[line["name"]] = line["device"]
            elif "measured" in line:
                lines.setdefault(line["name"], []).append(line)
        groups = dict[str, list[str]]()
        for name in sorted(lines):
            groups.setdefault(class_name(about[name]), []).append(name)
        classes = [
            device_class(name, [about[member] for member in members], [lines[member] for member in members])
            for name, members in groups.items()
        ]
        load_classes(list(map(describe, classes)))  # as ``plan`` will
        speeds = {name: speed_by_stage(measured) for name, measured in lines.items()}
        memory = {name: (about[name]["baseline_bytes"], baseline_bytes(measured)) for name, measured in lines.items()}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"DIR: {directory} cannot be read ({type(error).__name__}: {error}); "
            "accepted: the work directory of a pilot"
        ) from error
    if not classes:
        raise ConfigError(
            f"DIR: {directory} has no measurement of a device; "
            "accepted: the work directory of a pilot with at least one finished round"
        )
    return Calibration(classes, list(groups.values()), speeds, memory)


def write_classes(classes: Sequence[DeviceClass], path: Path) -> None:
    """Write classes of devices as ``read_csv`` reads them; what is not known is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(device) for device in classes)
    write_whole(path, text.getvalue().encode())


def operations_per_second(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the speed of a device: the median over its rounds; None without any.

    Rounds in which it also compiled count only if there are no others: the first one of a stage is slower, too.
    """
    lines = [x for x in lines if x["predicted"].get("operations") and x["measured"]["train_seconds"] > 0]
    alone = [x for x in lines if not (x["measured"]["overlap_seconds"] or x["measured"]["compile_seconds"])]
    speeds = [line["predicted"]["operations"] / line["measured"]["train_seconds"] for line in alone or lines]
    return median(speeds) if speeds else None


def speed_by_stage(lines: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return the speed of a device in each stage."""
    speeds = {}
    for stage in sorted({line["stage"] for line in lines}):
        speeds[stage] = operations_per_second([line for line in lines if line["stage"] == stage]) or 0.0
    return speeds


def class_name(about: Mapping[str, Any]) -> str:
    """Name the class of a device: its system, cores and memory."""
    return f"{about['platform']}, {about['cores']} cores, {about['memory_bytes'] / 1e9:.0f} GB"


def device_class(
    name: str, about: Sequence[Mapping[str, Any]], lines: Sequence[Sequence[Mapping[str, Any]]]
) -> DeviceClass:
    """Make the class of some devices.

    Args:
      name: of the class.
      about: what each device has said of itself.
      lines: what was measured of each.
    """
    last = [of_one[-1]["measured"] for of_one in lines]

    def link(field: str) -> float | None:
        found = [value for line in last if (value := line.get(field))]
        return significant(median(found)) if len(found) == len(last) else None

    return DeviceClass(
        name=name,
        count=len(about),
        memory_gb=significant(min(device["available_bytes"] for device in about) / 1e9),
        gflops=significant(median(operations_per_second(of_one) or 0.0 for of_one in lines) / 1e9),
        uplink_mbps=link("uplink_mbps"),
        downlink_mbps=link("downlink_mbps"),
        baseline_gb=None if ACCELERATED in name else significant(max(map(baseline_bytes, lines)) / 1e9),
    )


def baseline_bytes(lines: Sequence[Mapping[str, Any]]) -> int:
    """Return what a device's process needed at most, beyond the largest of its programs."""
    peak, program = (max(line["measured"][name] for line in lines) for name in ("peak_rss", "program_bytes"))
    return int(peak - program)


def significant(value: float) -> float:
    """Round to a few significant digits."""
    return float(f"{value:.{DIGITS}g}")
