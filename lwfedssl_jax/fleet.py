"""Device classes of a fleet, and what each can afford of a run: arithmetic on a ledger, nothing is compiled.

What is wrong with a description raises ``ValueError`` with one line; whoever knows the option or field that
it came from puts its name in front.
"""

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FLEET_STREAM = 4  # of the seed in NumPy's generators
LARGEST_COUNT = 2**31 - 1
LEAST, MOST = 1e-6, 1e12  # of any quantity of a device


@dataclass(frozen=True)
class DeviceClass:
    """Devices of one kind; a quantity that is not known is None.

    Attributes:
      name: of the class.
      count: how many there are.
      memory_gb: memory that a training step may take, in GB of 1e9 bytes.
      gflops: 1e9 floating-point operations a second, sustained; a multiply-add is two.
      uplink_mbps, downlink_mbps: from and to the device, in 1e6 bit/s.
      watts: drawn while it trains and exchanges.
    """

    name: str
    count: int
    memory_gb: float
    gflops: float | None = None
    uplink_mbps: float | None = None
    downlink_mbps: float | None = None
    watts: float | None = None

    @property
    def has_speed(self) -> bool:
        """Whether seconds can be told."""
        return None not in (self.gflops, self.uplink_mbps, self.downlink_mbps)


REQUIRED = ("count", "memory_gb")
QUANTITIES = ("memory_gb", "gflops", "uplink_mbps", "downlink_mbps", "watts")
COLUMNS = tuple(field.name for field in dataclasses.fields(DeviceClass))
FORM = (
    "NAME count=30 memory_gb=2 gflops=50 uplink_mbps=10 downlink_mbps=50 watts=3, all but count and memory_gb optional"
)


def load(devices: Sequence[str]) -> list[DeviceClass]:
    """The classes of ``fleet.devices``: a description each, or a single path ending in .csv.

    Raises:
      ValueError: a description or the file does not say what it must, or two classes have the same name.
    """
    if len(devices) == 1 and devices[0].lower().endswith(".csv"):
        return read_csv(Path(devices[0]))
    return _distinct([_parse(text) for text in devices])


def read_csv(path: Path) -> list[DeviceClass]:
    """The classes of a CSV file with the columns name, count, memory_gb, and of the others those that are known.

    Raises:
      ValueError: see ``load``.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read ({why}); accepted: a CSV file with {', '.join(COLUMNS)}") from None
    rows = [[cell.strip() for cell in row] for row in rows]
    lines = [(number, row) for number, row in enumerate(rows, 1) if any(row)]
    if len(lines) < 2:
        raise ValueError(f"{path} holds no device class; accepted: a line of {', '.join(COLUMNS)}, then a line a class")
    (_, head), *classes = lines
    if wrong := [name for name in head if name not in COLUMNS] or [name for name in head if head.count(name) > 1]:
        raise ValueError(f"{path} has an unknown or repeated column {wrong[0]!r}; accepted: {', '.join(COLUMNS)}")
    if missing := [name for name in ("name", *REQUIRED) if name not in head]:
        raise ValueError(f"{path} lacks the column {missing[0]}; accepted: {', '.join(COLUMNS)}")
    devices = []
    for number, row in classes:
        where = f"{path} line {number}"
        if len(row) != len(head):
            raise ValueError(f"{where} has {len(row)} cells; accepted: {len(head)}, one a column")
        devices.append(device_class(dict(zip(head, row, strict=True)), where))
    return _distinct(devices)


def device_class(values: Mapping[str, str], where: str) -> DeviceClass:
    """The class of such texts, by field; empty ones are not known.

    Raises:
      ValueError: naming the field, and ``where`` it stands.
    """
    given = {field: text for field, text in values.items() if text}
    name = given.pop("name", "")
    if not name or "=" in name or not name.isprintable():
        raise ValueError(f"name {name!r} of {where} is none; accepted: printable text without '='")
    if missing := [field for field in REQUIRED if field not in given]:
        raise ValueError(f"{where} does not say {missing[0]}; accepted: {FORM}")
    count = given.pop("count")
    if not (count.isascii() and count.isdigit() and len(count) < 11 and 1 <= int(count) <= LARGEST_COUNT):
        raise ValueError(f"count {count!r} of {where} is none; accepted: a whole number from 1 to {LARGEST_COUNT}")
    return DeviceClass(name, int(count), **{field: _quantity(field, text, where) for field, text in given.items()})


def describe(device: DeviceClass) -> str:
    """The text that ``load`` reads as this class."""
    known = {
        field: value for field, value in dataclasses.asdict(device).items() if field != "name" and value is not None
    }
    return " ".join([device.name, *(f"{field}={value!r}".removesuffix(".0") for field, value in known.items())])


def _parse(text: str) -> DeviceClass:
    where, words = repr(text), text.split()
    first = next((i for i, word in enumerate(words) if "=" in word), len(words))
    pairs = [word.partition("=")[::2] for word in words[first:]]
    for field, value in pairs:
        if field not in COLUMNS[1:] or not value or [name for name, _ in pairs].count(field) > 1:
            raise ValueError(f"{field!r} of {where} is unknown, repeated or without a value; accepted: {FORM}")
    return device_class({"name": " ".join(words[:first]), **dict(pairs)}, where)


def _quantity(field: str, text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not LEAST <= value <= MOST:
        raise ValueError(f"{field} {text!r} of {where} is out of range; accepted: a number from {LEAST:g} to {MOST:g}")
    return value


def _distinct(devices: list[DeviceClass]) -> list[DeviceClass]:
    names = [device.name for device in devices]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two classes are called {repeated[0]!r}; accepted: names that differ")
    return devices


class Part(NamedTuple):
    """What a device of a class does in a run.

    Attributes:
      stages: numbers of the stages that it takes part in.
      round_seconds: of each stage of the run, what a round takes it or would; None where its speed is not known.
      seconds: of all rounds of the stages that it takes part in; None likewise.
      traffic_bytes: of these, both directions.
      energy_wh: of these, in watt-hours; None where its speed or its power is not known.
    """

    stages: list[int]
    round_seconds: list[float] | None
    seconds: float | None
    traffic_bytes: int
    energy_wh: float | None


def take_part(device: DeviceClass, per_stage: Sequence[Mapping[str, Any]], examples: float, deadline: float) -> Part:
    """What a device does that takes part in every round of all stages that it can afford (``affords``).

    Args:
      device: its class.
      per_stage: of a ledger with peak memory (``resources.ledger``).
      examples: that it trains on.
      deadline: seconds that a round may take; 0 for any.
    """
    rows = [row for row in per_stage if affords(device, row, np.array([examples]), deadline)[0]]
    traffic = sum(row["download_bytes"] + row["upload_bytes"] for row in rows)
    if not device.has_speed:
        return Part([row["stage"] for row in rows], None, None, traffic, None)
    of_a_round = {row["stage"]: float(seconds_of_a_round(device, row, np.array([examples]))[0]) for row in per_stage}
    seconds = sum(row["rounds"] * of_a_round[row["stage"]] for row in rows)
    energy = None if device.watts is None else device.watts * seconds / 3600
    return Part([row["stage"] for row in rows], list(of_a_round.values()), seconds, traffic, energy)


def affords(device: DeviceClass, row: Mapping[str, Any], examples_N: np.ndarray, deadline: float) -> np.ndarray:
    """Whether devices of a class with so many examples can take part in a stage: its memory, and its deadline if any.

    Returns:
      N booleans.
    """
    if row["peak_memory_bytes"] > device.memory_gb * 1e9:
        return np.zeros(len(examples_N), bool)
    if not deadline:
        return np.ones(len(examples_N), bool)
    return seconds_of_a_round(device, row, examples_N) <= deadline


def seconds_of_a_round(device: DeviceClass, row: Mapping[str, Any], examples_N: np.ndarray) -> np.ndarray:
    """N seconds: download, two operations for each multiply-add that the stage executes, upload; speeds are known."""
    assert device.gflops is not None
    assert device.uplink_mbps is not None
    assert device.downlink_mbps is not None
    of_a_sample = 2 * row["flops_executed"] / (device.gflops * 1e9)
    download, upload = row["download_bytes"] / device.downlink_mbps, row["upload_bytes"] / device.uplink_mbps
    return (examples_N * of_a_sample + 8 * (download + upload) / 1e6) / row["rounds"]


def deal(devices: Sequence[DeviceClass], clients: int, seed: int) -> np.ndarray:
    """The class of each client, as an index: at random, in proportion to the counts (largest remainders)."""
    counts = np.array([device.count for device in devices], float)
    exact = clients * counts / counts.sum()
    whole = np.floor(exact).astype(int)
    whole[np.argsort(whole - exact, kind="stable")[: clients - whole.sum()]] += 1
    return np.random.default_rng([seed, FLEET_STREAM]).permutation(np.repeat(np.arange(len(devices)), whole))


class Fleet(NamedTuple):
    """The clients of a run on the devices of a fleet.

    Attributes:
      devices: the classes.
      classes: N, of each client, as an index.
      per_stage: of the run's ledger with peak memory.
      can: for each stage's number, which of the N clients can take part in it.
    """

    devices: Sequence[DeviceClass]
    classes: np.ndarray
    per_stage: Sequence[Mapping[str, Any]]
    can: dict[int, np.ndarray]


def make_fleet(
    devices: Sequence[DeviceClass],
    per_stage: Sequence[Mapping[str, Any]],
    examples_N: np.ndarray,
    deadline: float,
    seed: int,
) -> Fleet:
    """Clients with so many examples, dealt to the classes by the seed; the rest is as for ``take_part``."""
    class_N = deal(devices, len(examples_N), seed)
    of_class = [class_N == number for number in range(len(devices))]
    can = {
        row["stage"]: np.select(of_class, [affords(device, row, examples_N, deadline) for device in devices], False)
        for row in per_stage
    }
    return Fleet(devices, class_N, per_stage, can)


def summary(fleet: Fleet, examples_N: np.ndarray) -> list[dict[str, Any]]:
    """What ``summary.json`` says of each class.

    Returns:
      ``name``, ``clients``, ``stages`` that some of them take part in, ``clients_by_stage`` that do, and
      ``round_seconds_by_stage`` of the slowest of these, None where there is none or its speed is not known.
    """
    result = []
    for number, device in enumerate(fleet.devices):
        taking = [fleet.can[row["stage"]] & (fleet.classes == number) for row in fleet.per_stage]
        result.append(
            {
                "name": device.name,
                "clients": int((fleet.classes == number).sum()),
                "stages": [row["stage"] for row, who in zip(fleet.per_stage, taking, strict=True) if who.any()],
                "clients_by_stage": [int(who.sum()) for who in taking],
                "round_seconds_by_stage": [
                    float(seconds_of_a_round(device, row, examples_N[who]).max())
                    if device.has_speed and who.any()
                    else None
                    for row, who in zip(fleet.per_stage, taking, strict=True)
                ],
            }
        )
    return result


def tell(of_classes: Sequence[Mapping[str, Any]], stages: int) -> str:
    """A line of what ``summary`` gives: each class, its clients, and in which stages they take part."""
    told = [f"{c['name']}, {c['clients']} client{'s' * (c['clients'] != 1)}: {said(c, stages)}" for c in of_classes]
    return f"fleet: {'; '.join(told)}"


def said(of_class: Mapping[str, Any], stages: int) -> str:
    """In which stages the clients of a class of ``summary`` take part, or that only some of them do."""
    if not of_class["clients"]:
        return "none is dealt to it"
    some = any(0 < n < of_class["clients"] for n in of_class["clients_by_stage"])
    return stage_words(of_class["stages"], stages) + ", not all of them" * some


def shares(summary_of_run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of a run's summary each class, with the share of its clients' rounds that they can take part in (NaN for none).

    Raises whatever a damaged summary makes of it; empty for a run without a fleet.
    """
    found = []
    for c in summary_of_run.get("fleet", ()):
        rounds = [row["rounds"] for row in summary_of_run["resources"]["per_stage"]]
        taken = sum(r * n for r, n in zip(rounds, c["clients_by_stage"], strict=True))
        slowest = [s for s in c["round_seconds_by_stage"] if s is not None]
        found.append(
            {
                "class": c["name"],
                "clients": c["clients"],
                "takes_part": said(c, len(rounds)),
                "share_of_rounds": taken / (sum(rounds) * c["clients"]) if c["clients"] else math.nan,
                "slowest_round_seconds": max(slowest, default=math.nan),
            }
        )
    return found


def words(part_in: Sequence[int], stages: int) -> str:
    """In which stages a class takes part: yes, out, out from S, or only those."""
    if len(part_in) == stages:
        return "yes"
    if not part_in:
        return "out"
    if list(part_in) == list(range(1, len(part_in) + 1)):
        return f"out from {len(part_in) + 1}"
    runs = [s for s in part_in if s - 1 not in part_in], [s for s in part_in if s + 1 not in part_in]
    return "only " + ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(*runs, strict=True))


def stage_words(part_in: Sequence[int], stages: int) -> str:
    """In which stages a class takes part, for a sentence."""
    if len(part_in) in (0, stages):
        return "in all stages" if part_in else "in no stage"
    said = words(part_in, stages)
    return said.replace("from", "from stage") if said.startswith("out") else said.replace("only", "in stages")
