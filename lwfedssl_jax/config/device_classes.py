"""Classes of devices that clients run on, as text and as CSV."""

import csv
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LARGEST_COUNT = 2**31 - 1
LEAST, MOST = 1e-6, 1e12  # of every quantity of a device


@dataclass(frozen=True)
class DeviceClass:
    """Devices of one kind; a quantity that is not known is None.

    Attributes:
      name: of the class.
      count: number of devices.
      memory_gb: memory that the process which trains can have, in GB of 1e9 bytes.
      gflops: 1e9 floating-point operations per second, sustained; a multiply-add is two.
      uplink_mbps, downlink_mbps: from and to the device, in 1e6 bit/s.
      watts: power while it trains and transfers.
      baseline_gb: the part of memory_gb that this process needs before any model; without it, all is for the model.
    """

    name: str
    count: int
    memory_gb: float
    gflops: float | None = None
    uplink_mbps: float | None = None
    downlink_mbps: float | None = None
    watts: float | None = None
    baseline_gb: float | None = None

    @property
    def step_gb(self) -> float:
        """Memory for a training step, in GB; not above 0 if the process needs all of it."""
        return self.memory_gb - (self.baseline_gb or 0.0)

    @property
    def has_speed(self) -> bool:
        """Whether the time of a round can be computed."""
        return None not in (self.gflops, self.uplink_mbps, self.downlink_mbps)


REQUIRED = ("count", "memory_gb")
QUANTITIES = ("memory_gb", "gflops", "uplink_mbps", "downlink_mbps", "watts", "baseline_gb")
COLUMNS = tuple(field.name for field in dataclasses.fields(DeviceClass))
FORM = (
    "NAME count=30 memory_gb=2 gflops=50 uplink_mbps=10 downlink_mbps=50 watts=3 baseline_gb=0.5, "
    "all but count and memory_gb optional"
)


def load_classes(devices: Sequence[str]) -> list[DeviceClass]:
    """Read the classes of ``fleet.devices``: one description per class, or a single path that ends in .csv.

    Raises:
      ValueError: a description or the file lacks something or is not valid, or two classes have the same name.
    """
    if len(devices) == 1 and devices[0].lower().endswith(".csv"):
        return read_csv(Path(devices[0]))
    return _distinct([_parse(text) for text in devices])


def read_csv(path: Path) -> list[DeviceClass]:
    """Read the classes from a CSV file with the columns name, count and memory_gb, and any of the optional ones.

    Raises:
      ValueError: see ``load_classes``.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read ({why}); accepted: a CSV file with {', '.join(COLUMNS)}") from None
    rows = [[cell.strip() for cell in row] for row in rows]
    lines = [(number, row) for number, row in enumerate(rows, 1) if any(row)]
    (_, head), *classes = lines or [(1, [])]
    if len(head) == 1 and (other := next((mark for mark in (";", "\t", "|") if mark in head[0]), None)):
        raise ValueError(f"{path} separates columns by {other!r}; accepted: commas")
    if wrong := [name for name in head if name not in COLUMNS] or [name for name in head if head.count(name) > 1]:
        raise ValueError(f"{path} has an unknown or repeated column {wrong[0]!r}; accepted: {', '.join(COLUMNS)}")
    if missing := [name for name in ("name", *REQUIRED) if name not in head]:
        raise ValueError(f"{path} lacks the column {missing[0]}; accepted: {', '.join(COLUMNS)}")
    if not classes:
        raise ValueError(f"{path} has columns but no device class; accepted: a line per class")
    devices = []
    for number, row in classes:
        where = f"{path} line {number}"
        if len(row) != len(head):
            raise ValueError(f"{where} has {len(row)} cells; accepted: {len(head)}, one per column")
        devices.append(device_class(dict(zip(head, row, strict=True)), where))
    return _distinct(devices)


def device_class(values: Mapping[str, str], where: str) -> DeviceClass:
    """Make a class from the text of each field; an empty text is an unknown quantity.

    Raises:
      ValueError: naming the field, and the description or line that ``where`` names.
    """
    given = {field: text for field, text in values.items() if text}
    name = given.pop("name", "")
    if not name or "=" in name or not name.isprintable():
        raise ValueError(f"name {name!r} of {where} is not valid; accepted: printable text without '='")
    if missing := [field for field in REQUIRED if field not in given]:
        raise ValueError(f"{where} does not have {missing[0]}; accepted: {FORM}")
    count = given.pop("count")
    if not (count.isascii() and count.isdigit() and len(count) < 11 and 1 <= int(count) <= LARGEST_COUNT):
        raise ValueError(f"count {count!r} of {where} is not valid; accepted: a whole number from 1 to {LARGEST_COUNT}")
    return DeviceClass(name, int(count), **{field: _quantity(field, text, where) for field, text in given.items()})


def describe(device: DeviceClass) -> str:
    """Return the description of a class in the form that ``load_classes`` reads."""
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
