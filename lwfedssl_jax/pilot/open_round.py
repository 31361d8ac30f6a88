"""A round on devices: what it asks for, and what was reported so far."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from lwfedssl_jax.pilot.protocol import Result


class Request(NamedTuple):
    """What a round asks of all of its devices.

    Attributes:
      run: names the run.
      round, stage: from 1.
      config: as JSON.
      trainable: what the stage trains.
      frozen: the stage's frozen layers by their hash, from the first one.
      check: raises ``ValueError`` for a result that is not one of this round.
    """

    run: str
    round: int
    stage: int
    config: str
    trainable: bytes
    frozen: Mapping[str, bytes]
    check: Callable[[Result], None]


class Report(NamedTuple):
    """A device's update, and what it took.

    Attributes:
      result: as it was received, without its bytes.
      missing_layers: numbers of the frozen layers that it was expected not to have.
      payload_down, payload_up: bytes of parameters that were sent to it and received.
      message_seconds: from the first message of the round to its result.
      wire_down: bytes from the server since its last report, as ``relay.Counted``; None if that is not known.
    """

    result: Result
    missing_layers: list[int]
    payload_down: int
    payload_up: int
    message_seconds: float
    wire_down: int | None


class Collected(NamedTuple):
    """A round's reports by the devices' numbers, and the bytes that all devices together were sent, and returned."""

    reports: dict[int, Report]
    payload_down: int
    payload_up: int


@dataclass
class OpenRound:
    """A round whose updates are being collected.

    Attributes:
      request: to all devices.
      waiting: numbers of the devices that may still report.
      began: when its time began to run.
      first_asked, requests, sent_bytes, missing_layers: of each device that was asked.
      reports: of each device that has reported.
      payload_up: bytes of parameters that were received.
    """

    request: Request
    waiting: set[int]
    began: float | None = None
    first_asked: dict[int, float] = field(default_factory=dict)
    requests: dict[int, int] = field(default_factory=dict)
    sent_bytes: dict[int, int] = field(default_factory=dict)
    missing_layers: dict[int, list[int]] = field(default_factory=dict)
    reports: dict[int, Report] = field(default_factory=dict)
