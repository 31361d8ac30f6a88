"""The messages between server and devices, and their plain form, which any transport can carry."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

VERSION = 2


class ProtocolError(ValueError):
    """A message that is not one of this version's."""


class Message(NamedTuple):
    """A message in its plain form.

    Attributes:
      kind: names its class below.
      fields: its texts and numbers.
      arrays: its bytes, by name.
    """

    kind: str
    fields: dict[str, str | int | float]
    arrays: dict[str, bytes]


@dataclass(frozen=True)
class Ask:
    """The server asks who a device is."""


@dataclass(frozen=True)
class Hello:
    """A device says who it is.

    Attributes:
      name: of the device, the same whenever it returns.
      boot: differs each time that the device starts.
      software: its versions.
      platform: its operating system and processor, and its accelerator, if any.
      cores: how many the process may use.
      memory_bytes: of the machine.
      available_bytes: that its process can have, with Flower's processes beside it, or of its accelerator.
      baseline_bytes: of its process, before it has seen any model.
      images: how many it has.
      data: a hash of its images' names and sizes.
      layers: hashes of the layers that it has, separated by commas.
      wire_down, wire_up, polling_bytes, downlink_mbps, uplink_mbps: as ``relay.Counted``, until it was asked.
    """

    name: str
    boot: str
    software: str
    platform: str
    cores: int
    memory_bytes: int
    available_bytes: int
    baseline_bytes: int
    images: int
    data: str
    layers: str
    wire_down: int
    wire_up: int
    polling_bytes: int
    downlink_mbps: float
    uplink_mbps: float


@dataclass(frozen=True)
class Train:
    """The server asks for a round of local training.

    Attributes:
      run: names the run.
      round, stage: from 1.
      client: the device's number in the run, from 0, on which its random draws depend.
      config: of the run, as JSON.
      frozen: hashes of the frozen layers, from the first one, separated by commas.
      seconds: until the round's deadline.
      arrays: ``trainable``, and frozen layers by their hash.
    """

    run: str
    round: int
    stage: int
    client: int
    config: str
    frozen: str
    seconds: float
    arrays: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class Result:
    """A device's update.

    Attributes:
      run, round, client: of the request.
      examples: how many images it has trained on.
      loss, samples: its loss summed over samples, and their number.
      layers: layers run, summed over the steps.
      train_seconds, compile_seconds: that training took, and compiling its programs before the first round of a stage.
      overlap_seconds: of the training, in which the device also compiled programs for the next stage.
      peak_bytes: most memory that its process ever had.
      program_bytes: of the compiled program.
      wire_down, wire_up, polling_bytes, downlink_mbps, uplink_mbps: as ``relay.Counted``, until it was asked.
      arrays: ``update``.
    """

    run: str
    round: int
    client: int
    examples: int
    loss: float
    samples: int
    layers: int
    train_seconds: float
    compile_seconds: float
    overlap_seconds: float
    peak_bytes: int
    program_bytes: int
    wire_down: int
    wire_up: int
    polling_bytes: int
    downlink_mbps: float
    uplink_mbps: float
    arrays: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class Missing:
    """Hashes of the layers that a device does not have, separated by commas."""

    run: str
    round: int
    layers: str


@dataclass(frozen=True)
class Refused:
    """A device does not do what it was asked for."""

    why: str
    round: int = 0


Content = Ask | Hello | Train | Result | Missing | Refused
TYPES: dict[Any, Any] = {str: str, int: int, float: (int, float), dict[str, bytes]: dict}
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (Ask, Hello, Train, Result, Missing, Refused)}


def write(content: Content) -> Message:
    """Return a message in its plain form."""
    names = [f.name for f in dataclasses.fields(content)]
    fields = {name: getattr(content, name) for name in names if name != "arrays"}
    return Message(type(content).__name__, fields | {"version": VERSION}, dict(getattr(content, "arrays", {})))


def read(message: Message) -> Content:
    """Return the message of a plain form.

    Raises:
      ProtocolError: it is of another version or kind, or a field is missing or of another type.
    """
    if type(version := message.fields.get("version")) is not int or version != VERSION:
        raise ProtocolError(f"a message of protocol {version}; accepted: {VERSION}")
    if message.kind not in KINDS:
        raise ProtocolError(f"a message {message.kind!r:.100}; accepted: {', '.join(KINDS)}")
    kind, values = KINDS[message.kind], dict[str, Any]()
    for known in dataclasses.fields(kind):
        value = message.arrays if known.name == "arrays" else message.fields.get(known.name)
        if not isinstance(value, TYPES[known.type]) or isinstance(value, bool):
            raise ProtocolError(f"a message {message.kind} whose {known.name} is {value!r:.100}")
        try:
            values[known.name] = float(value) if known.type is float else value
        except OverflowError as error:
            raise ProtocolError(f"a message {message.kind} whose {known.name} is too large") from error
    if any(not isinstance(content, bytes) for content in message.arrays.values()):
        raise ProtocolError(f"a message {message.kind} whose arrays are not bytes")
    content: Content = kind(**values)
    return content


def split(digests: str) -> list[str]:
    """Return hashes that are separated by commas."""
    return digests.split(",") if digests else []
