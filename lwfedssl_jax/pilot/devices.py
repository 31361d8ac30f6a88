"""The server's view of the devices: who is there, who owes an answer, and a round's updates as they come in."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lwfedssl_jax.pilot import protocol
from lwfedssl_jax.pilot.journal import Journal
from lwfedssl_jax.pilot.link import Answer, Link
from lwfedssl_jax.pilot.protocol import Ask, Content, Hello, Missing, ProtocolError, Refused, Result, Train

SECONDS_BETWEEN_POLLS = 0.25
LONGEST_NAME = 64
SECONDS_TO_ANSWER = 60.0  # a question that needs no training


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
      result: as it was received.
      lacking: numbers of the frozen layers that it was expected to lack.
      payload_down, payload_up: bytes of parameters that were sent to it and received.
      message_seconds: from the first message of the round to its result.
    """

    result: Result
    lacking: list[int]
    payload_down: int
    payload_up: int
    message_seconds: float


@dataclass
class Device:
    """A device that has said who it is.

    Attributes:
      name, number: of the device.
      node: where it is reached; None while it is away.
      boot: of its present start.
      layers: hashes of the layers that it has, as far as is known.
      owes: the message that it has not answered.
      round: of that message.
    """

    name: str
    number: int
    node: str | None
    boot: str
    layers: set[str]
    owes: int | None = None
    round: int = 0


@dataclass
class Open:
    """A round that is being collected: clients to be asked or waited for, when each was asked first, bytes, reports."""

    request: Request
    waiting: set[int]
    began: float | None = None
    asked: dict[int, float] = field(default_factory=dict)
    sent_bytes: dict[int, int] = field(default_factory=dict)
    lacking: dict[int, list[int]] = field(default_factory=dict)
    reports: dict[int, Report] = field(default_factory=dict)


class Devices:
    """The devices of a pilot.

    Args:
      link: to them.
      journal: their roster, and where events are written.
      most: how many there may be.
      fewest: images that a device needs.
      deadline: seconds for a round, from its first message on.
      between_polls: called between polls; may raise to abandon the round.
      now, sleep: the clock.
    """

    def __init__(
        self,
        link: Link,
        journal: Journal,
        most: int,
        fewest: int,
        deadline: float,
        between_polls: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._link, self._journal, self._most, self._fewest = link, journal, most, fewest
        self._deadline, self._between_polls, self._now, self._sleep = deadline, between_polls, now, sleep
        self._asked: dict[str, tuple[int, float]] = {}  # nodes that have been asked who they are
        self._named: dict[str, Device] = {}  # by node
        self._strangers: set[str] = set()  # nodes that may not join
        self._devices: dict[str, Device] = {}  # by name
        self._round = 0

    def gather(self, count: int, hear: Callable[[list[str]], None]) -> None:
        """Wait until a number of devices are there; ``hear`` is called with their names when these change."""
        here: list[str] | None = None
        while here is None or len(here) < count:
            self._step(None)
            found = sorted(device.name for device in self._named.values())
            if found != here:
                here = found
                hear(here)
            if len(here) < count:
                self._wait()

    def collect(self, request: Request, clients: Sequence[int], hear: Callable[[int, int], None]) -> dict[int, Report]:
        """Ask clients for a round of local training; return the reports of those that answer within the deadline.

        The round ends when no client that can be reached owes an answer; while none can be reached, it waits.

        Args:
          request: to all of them.
          clients: their numbers.
          hear: called with how many reports there are, and may be.
        """
        self._round = request.round
        open_round = Open(request, set(clients))
        told, is_alone = -1, False
        while open_round.waiting:
            self._step(open_round)
            if open_round.began is None:
                if not is_alone and not self._reachable(open_round):
                    self._event("waiting", "", "no device of the round can be reached")
                    is_alone = True
            elif self._now() - open_round.began > self._deadline or not self._reachable(open_round):
                break
            if len(open_round.reports) > told:
                told = len(open_round.reports)
                hear(told, len(clients))
            if open_round.waiting:
                self._wait()
        for device in self._devices.values():
            if device.number in open_round.waiting and device.owes is not None and device.round == request.round:
                self._event("late", device.name, f"no update within {self._deadline:g} s")
        return open_round.reports

    def name_of(self, number: int) -> str:
        """Return the name of a device."""
        return next(entry.name for entry in self._journal.roster.values() if entry.number == number)

    def _reachable(self, open_round: Open) -> bool:
        """Whether a client that is waited for can be reached, or a node has not said yet who it is.

        Once others have been asked, one that is still busy with an earlier round is not waited for.
        """
        number, unnamed = open_round.request.round, set(self._asked) - set(self._named) - self._strangers
        devices = [device for device in self._named.values() if device.number in open_round.waiting]
        if open_round.began is not None:
            devices = [device for device in devices if device.owes is None or device.round == number]
        return bool(unnamed or devices)

    def _wait(self) -> None:
        self._between_polls()
        self._sleep(SECONDS_BETWEEN_POLLS)

    def _event(self, event: str, name: str, why: str = "") -> None:
        self._journal.write({"event": event, "round": self._round, "name": name} | ({"why": why} if why else {}))

    def _step(self, open_round: Open | None) -> None:
        """See who is there, read what came, and ask who can be asked."""
        nodes = set(self._link.nodes())
        for node in set(self._asked) - nodes:
            del self._asked[node]
            self._strangers.discard(node)
            if device := self._named.pop(node, None):
                self._away(device, "left")
        for node in sorted(nodes - set(self._asked)):
            self._asked[node] = self._link.send(node, protocol.write(Ask()), SECONDS_TO_ANSWER), self._now()
        for answer in self._link.poll():
            self._read(answer, open_round)
        for node, (_, when) in list(self._asked.items()):
            if node not in self._named and node not in self._strangers and self._now() - when > 2 * SECONDS_TO_ANSWER:
                del self._asked[node]  # to be asked again
        if open_round:
            for device in self._named.values():
                if device.number in open_round.waiting and device.owes is None:
                    self._ask_for_training(device, open_round)

    def _away(self, device: Device, event: str) -> None:
        device.node = None
        self._event(event, device.name, "while it was training" if device.owes is not None else "")
        device.owes = None

    def _ask_for_training(self, device: Device, open_round: Open) -> None:
        request, now = open_round.request, self._now()
        open_round.began = now if open_round.began is None else open_round.began
        left = self._deadline - (now - open_round.began)
        if left <= 0 or device.node is None:
            return
        lacking = {digest: content for digest, content in request.frozen.items() if digest not in device.layers}
        train = Train(
            run=request.run,
            round=request.round,
            stage=request.stage,
            client=device.number,
            config=request.config,
            frozen=",".join(request.frozen),
            seconds=left,
            arrays={"trainable": request.trainable} | lacking,
        )
        device.owes, device.round = self._link.send(device.node, protocol.write(train), left), request.round
        device.layers |= set(lacking)
        open_round.asked.setdefault(device.number, now)
        numbers = [number for number, digest in enumerate(request.frozen, start=1) if digest in lacking]
        open_round.lacking.setdefault(device.number, numbers)
        size = sum(map(len, train.arrays.values()))
        open_round.sent_bytes[device.number] = open_round.sent_bytes.get(device.number, 0) + size

    def _read(self, answer: Answer, open_round: Open | None) -> None:
        device = self._named.get(answer.node)
        if device is None:
            if answer.node in self._asked and answer.sent == self._asked[answer.node][0]:
                self._greet(answer)
            return
        if answer.sent != device.owes:
            return  # from before it left
        device.owes = None
        try:
            content: Content | None = protocol.read(answer.message) if answer.message else None
        except ProtocolError as error:
            content = Refused(str(error))
        if content is None:
            self._event("failed", device.name, answer.why)
            self._give_up(device, open_round)
        elif isinstance(content, Missing):
            lost = set(protocol.split(content.layers))
            device.layers -= lost
            self._event("missing", device.name, f"{len(lost)} layers that it had are lost or damaged")
            if open_round and not lost & set(open_round.request.frozen):
                self._give_up(device, open_round)
        elif isinstance(content, Result):
            self._accept(device, content, open_round)
        else:
            why = content.why if isinstance(content, Refused) else f"it answered {type(content).__name__}"
            self._event("refused", device.name, why)
            self._give_up(device, open_round)

    def _give_up(self, device: Device, open_round: Open | None) -> None:
        """Wait no longer for a device in this round, if it was asked in it."""
        if open_round and device.round == open_round.request.round:
            open_round.waiting.discard(device.number)

    def _accept(self, device: Device, result: Result, open_round: Open | None) -> None:
        if not open_round or (result.run, result.round) != (open_round.request.run, open_round.request.round):
            self._event("late", device.name, f"its update of round {result.round} came after the round")
            return
        request = open_round.request
        try:
            if result.client != device.number:
                raise ValueError(f"an update of client {result.client}, and it is client {device.number}")
            if result.examples != self._journal.roster[device.name].images:
                raise ValueError(f"an update from {result.examples} images")
            request.check(result)
        except ValueError as error:
            self._event("refused", device.name, str(error))
            self._give_up(device, open_round)
            return
        open_round.waiting.discard(device.number)
        open_round.reports[device.number] = Report(
            result=result,
            lacking=open_round.lacking[device.number],
            payload_down=open_round.sent_bytes[device.number],
            payload_up=sum(map(len, result.arrays.values())),
            message_seconds=self._now() - open_round.asked[device.number],
        )

    def _greet(self, answer: Answer) -> None:
        """Read who a node is, and enter it into the roster."""
        try:
            hello: Any = protocol.read(answer.message) if answer.message else Refused(answer.why)
            if not isinstance(hello, Hello):
                raise ValueError(hello.why if isinstance(hello, Refused) else "it does not say who it is")
            if not (hello.name.isprintable() and 0 < len(hello.name) <= LONGEST_NAME):
                raise ValueError(
                    f"its name is {hello.name[:LONGEST_NAME]!r}; accepted: at most {LONGEST_NAME} characters"
                )
            if hello.images < self._fewest:
                raise ValueError(f"it has {hello.images} images; accepted: at least {self._fewest}")
            before = self._journal.roster.get(hello.name)
            is_new = before is None or not before.images
            changed = before is not None and not is_new and (before.images, before.data) != (hello.images, hello.data)
            entry = self._journal.enter(hello.name, hello.images, hello.data, self._most)
            if entry is None:
                raise ValueError(f"there are {self._most} devices already, and {hello.name} is none of them")
        except ValueError as error:
            self._event("refused", "", f"a device: {error}")
            self._strangers.add(answer.node)
            return
        known = self._devices.get(hello.name)
        if known and known.node is not None:  # it is faster than the news that it left
            self._named.pop(known.node, None)
            self._away(known, "left")
        device = Device(hello.name, entry.number, answer.node, hello.boot, set(protocol.split(hello.layers)))
        self._devices[hello.name] = self._named[answer.node] = device
        what = "joined" if is_new else "returned"
        self._event(what, hello.name, "with other images than before" if changed else "")
