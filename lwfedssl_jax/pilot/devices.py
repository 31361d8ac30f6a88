"""The server's view of the devices: which are there, which have yet to answer, and a round's updates as they come."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lwfedssl_jax.analysis.wording import event_sentence
from lwfedssl_jax.pilot import protocol
from lwfedssl_jax.pilot.checks import check_counted, check_hello
from lwfedssl_jax.pilot.journal import Entry, Journal
from lwfedssl_jax.pilot.link import Answer, Link
from lwfedssl_jax.pilot.open_round import Collected, OpenRound, Report, Request
from lwfedssl_jax.pilot.protocol import Ask, Content, Hello, Message, Missing, ProtocolError, Refused, Result, Train
from lwfedssl_jax.pilot.tallies import Tallies

SECONDS_BETWEEN_POLLS = 0.25
SECONDS_TO_ANSWER = 60.0  # a question that needs no training
SECONDS_TO_GREET = 15.0  # that a round waits for who it is that has come
SECONDS_TO_ASK_AGAIN = 10.0  # after a question without an answer
SECONDS_TO_LEAVE = 5.0  # that a node must be gone: a transport that starts again has no nodes for a moment
MOST_REQUESTS = 3  # to a device in a round
LONGEST_REASON = 200
ABOUT = ("software", "platform", "cores", "memory_bytes", "available_bytes", "baseline_bytes")


@dataclass
class Device:
    """A device that has said who it is.

    Attributes:
      name, number: of the device.
      layers: hashes of the layers that it has, as far as is known.
      sent: hashes of those that were in the last message.
      owes: the message that it has yet to answer, by the link's number; None without any.
      until: when that answer will no longer come.
      round: of that message.
    """

    name: str
    number: int
    layers: set[str]
    sent: set[str] = field(default_factory=set)
    owes: int | None = None
    until: float = 0.0
    round: int = 0


@dataclass
class Node:
    """Where a device can be reached.

    Attributes:
      seen: when it was last there.
      owner: name of the device whose key it has; empty if there are no keys.
      device: that answers there; None as long as that is not known.
      question: number of the message that asks who it is, until the answer.
      asked: when it was asked.
      is_refused: whether it may not join.
    """

    seen: float
    owner: str = ""
    device: Device | None = None
    question: int | None = None
    asked: float = -SECONDS_TO_ASK_AGAIN
    is_refused: bool = False


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
      tell: called with what happened to a device, in words.
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
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._tell = tell
        self._link, self._journal, self._most, self._fewest = link, journal, most, fewest
        self._deadline, self._between_polls, self._now, self._sleep = deadline, between_polls, now, sleep
        self._nodes: dict[str, Node] = {}
        self._boots: dict[str, str] = {}  # of each device that is there, which differs each time that it starts
        self._tallies = Tallies(journal)
        self._round, self._looked = 0, 0.0
        self.last_reason = ""

    @property
    def here(self) -> list[Device]:
        """The devices that can be reached."""
        return [node.device for node in self._nodes.values() if node.device]

    def gather(self, count: int, hear: Callable[[list[str]], None]) -> None:
        """Wait until a number of devices are there; ``hear`` is called with their names when these change."""
        names: list[str] | None = None
        while names is None or len(names) < count:
            self._step(None)
            found = sorted(device.name for device in self.here)
            if found != names:
                names = found
                hear(names)
            if len(names) < count:
                self._wait()

    def collect(self, request: Request, clients: Sequence[int], hear: Callable[[int, int], None]) -> Collected:
        """Ask clients for a round of local training; return the reports of those that answer within the deadline.

        The round ends when nobody who can be reached has to answer any more, without any report only at the deadline.
        Its time runs from the first message on, or, if none of its devices is there, while any other is.

        Args:
          request: to all of them.
          clients: their numbers.
          hear: called with how many reports there are, and may be.
        """
        self._round = request.round
        open_round, heard, is_told = OpenRound(request, set(clients)), -1, False
        while open_round.waiting:
            self._step(open_round)
            if open_round.began is None and any(n.device and n.seen == self._looked for n in self._nodes.values()):
                open_round.began = self._now()
            if open_round.began is None:
                if not is_told:
                    self._event("waiting", "", "no device can be reached")
                    is_told = True
            elif self._is_over(open_round, self._now() - open_round.began):
                break
            if len(open_round.reports) > heard:
                heard = len(open_round.reports)
                hear(heard, len(clients))
            if open_round.waiting:
                self._wait()
        for device in self.here:
            if device.number in open_round.waiting and device.owes is not None and device.round == request.round:
                self._event("late", device.name, f"no update within {self._deadline:g} s")
        received = sum(report.payload_up for report in open_round.reports.values())
        return Collected(open_round.reports, sum(open_round.sent_bytes.values()), received)

    def settle(self) -> None:
        """After the last round, ask the devices for what its upload took on the wire; wait for a short while."""
        began = self._now()
        for name, node in self._nodes.items():
            if self._is_open(node) and node.question is None:
                node.question, node.asked = self._link.send(name, protocol.write(Ask()), SECONDS_TO_ANSWER), began
        while any(map(self._is_open, self._nodes.values())) and self._now() - began < SECONDS_TO_GREET:
            self._sleep(SECONDS_BETWEEN_POLLS)  # not to be interrupted: the round is not written yet
            self._step(None)

    def _is_open(self, node: Node) -> bool:
        """Whether what the last upload of a node's device took is not known."""
        return node.device is not None and self._tallies.is_open(node.device.name)

    def name_of(self, number: int) -> str:
        """Return the name of a device."""
        return next(entry.name for entry in self._journal.roster.values() if entry.number == number)

    def _is_over(self, open_round: OpenRound, seconds: float) -> bool:
        if seconds > self._deadline:
            return True
        coming = [node for node in self._nodes.values() if node.question is not None]
        is_busy = any(self._now() - node.asked <= SECONDS_TO_GREET for node in coming)
        for device in self.here:  # one that is still busy with an earlier round is not waited for
            has_to_answer = device.owes is None or device.round == open_round.request.round
            is_busy |= device.number in open_round.waiting and has_to_answer
        return not is_busy and bool(open_round.reports)

    def _wait(self) -> None:
        self._between_polls()
        self._sleep(SECONDS_BETWEEN_POLLS)

    def _event(self, event: str, name: str, why: str = "", about: Mapping[str, object] | None = None) -> None:
        why = " ".join(why.split())[:LONGEST_REASON]
        self.last_reason = f"{name}: {why}" if name and why else why or self.last_reason
        line = {"event": event, "round": self._round, "name": name}
        line |= {"why": why} if why else {}
        self._journal.write(line | ({"device": dict(about)} if about else {}))
        self._tell(event_sentence(line))

    def _step(self, open_round: OpenRound | None) -> None:
        """See which nodes are there, read what came, and ask those that can be asked."""
        names = self._link.nodes()
        self._looked = now = self._now()
        for name in sorted(names):
            self._nodes.setdefault(name, Node(now, names[name])).seen = now
        for answer in self._link.poll():
            self._read(answer, open_round)
        for name, node in list(self._nodes.items()):
            if now - node.seen > SECONDS_TO_LEAVE:
                del self._nodes[name]
                if device := node.device:
                    self._leave(device, "while it was training" if device.owes is not None else "")
            elif name in names:
                self._ask(name, node, open_round)

    def _leave(self, device: Device, why: str) -> None:
        self._boots.pop(device.name, None)
        self._event("left", device.name, why)

    def _ask(self, name: str, node: Node, open_round: OpenRound | None) -> None:
        """Ask a node who it is, or for training, unless it has to answer first or has nothing to do."""
        now, device = self._now(), node.device
        if node.question is not None:
            if now - node.asked > 2 * SECONDS_TO_ANSWER:
                node.question = None  # it is lost
        elif device is None:
            if not node.is_refused and now - node.asked >= SECONDS_TO_ASK_AGAIN:
                node.question, node.asked = self._link.send(name, protocol.write(Ask()), SECONDS_TO_ANSWER), now
        elif device.owes is not None:
            if now > device.until:
                self._fail(node, device, "its answer is lost")
        elif open_round and device.number in open_round.waiting:
            self._ask_for_training(name, device, open_round)

    def _ask_for_training(self, node: str, device: Device, open_round: OpenRound) -> None:
        request, now, number = open_round.request, self._now(), device.number
        open_round.began = now if open_round.began is None else open_round.began
        left = self._deadline - (now - open_round.began)
        if left <= 0:
            return
        open_round.requests[number] = open_round.requests.get(number, 0) + 1
        if open_round.requests[number] > MOST_REQUESTS:
            self._event("failed", device.name, f"it was asked {MOST_REQUESTS} times")
            open_round.waiting.discard(number)
            return
        missing = {digest: content for digest, content in request.frozen.items() if digest not in device.layers}
        train = Train(
            run=request.run,
            round=request.round,
            stage=request.stage,
            client=number,
            config=request.config,
            frozen=",".join(request.frozen),
            seconds=left,
            arrays={"trainable": request.trainable} | missing,
        )
        device.owes, device.round = self._link.send(node, protocol.write(train), left), request.round
        device.until, device.sent = now + left + SECONDS_TO_ANSWER, set(missing)
        device.layers |= device.sent
        open_round.first_asked.setdefault(number, now)
        layers = [layer for layer, digest in enumerate(request.frozen, start=1) if digest in missing]
        open_round.missing_layers.setdefault(number, layers)
        size = sum(map(len, train.arrays.values()))
        open_round.sent_bytes[number] = open_round.sent_bytes.get(number, 0) + size

    def _read(self, answer: Answer, open_round: OpenRound | None) -> None:
        node = self._nodes.get(answer.node)
        if node is None:
            return  # it has left
        if answer.sent == node.question:
            node.question = None
            self._greet(node, answer)
        elif (device := node.device) and answer.sent == device.owes:
            device.owes = None
            if answer.message is None:
                self._fail(node, device, answer.why)
            else:
                self._read_content(node, device, content_of(answer.message), open_round)

    def _fail(self, node: Node, device: Device, why: str) -> None:
        """Ask a device whose answer did not come who it is, since it may have started again; then for training."""
        self._event("failed", device.name, why)
        node.device = None

    def _read_content(self, node: Node, device: Device, content: Content, open_round: OpenRound | None) -> None:
        wire_down = self._tallies.count(device.name, content) if isinstance(content, Result) else None
        is_in_round = open_round is not None and device.round == open_round.request.round
        if not open_round or not is_in_round:
            self._event("late", device.name, f"its answer of round {device.round} came after the round")
        elif isinstance(content, Missing) and not (lost := set(protocol.split(content.layers))) & device.sent:
            device.layers -= lost
            self._event("missing", device.name, f"{len(lost)} layers that it had are lost or damaged")
        else:
            open_round.waiting.discard(device.number)
            try:
                self._accept(device, content, open_round, wire_down)
            except ValueError as error:
                self._event("refused", device.name, str(error))
                node.device = None  # it is asked again who it is: its images may be others now

    def _accept(self, device: Device, result: Content, open_round: OpenRound, wire_down: int | None) -> None:
        """Take a result into the round.

        Raises:
          ValueError: it is none, or not one of this device and round.
        """
        if not isinstance(result, Result):
            raise ValueError(result.why if isinstance(result, Refused) else f"it answered {type(result).__name__}")
        request, number = open_round.request, device.number
        if (result.run, result.round, result.client) != (request.run, request.round, number):
            raise ValueError(
                f"an update of round {result.round} from client {result.client}; "
                f"accepted: of round {request.round} from client {number}"
            )
        if result.examples != self._journal.roster[device.name].images:
            raise ValueError(f"an update from {result.examples} images, which is not the number that it joined with")
        check_counted(result)
        if result.arrays.keys() != {"update"}:
            raise ValueError(f"an update with {len(result.arrays)} arrays; accepted: one")
        request.check(result)
        open_round.reports[number] = Report(
            result=dataclasses.replace(result, arrays={}),
            missing_layers=open_round.missing_layers[number],
            payload_down=open_round.sent_bytes[number],
            payload_up=len(result.arrays["update"]),
            message_seconds=self._now() - open_round.first_asked[number],
            # Less than was sent: a message went to the device before it started again.
            wire_down=wire_down if wire_down is not None and wire_down >= open_round.sent_bytes[number] else None,
        )
        self._tallies.open(device.name, request.round, number)

    def _greet(self, node: Node, answer: Answer) -> None:
        """Read who answers at a node, and enter it into the roster."""
        if answer.message is None:
            return  # it is asked again
        content, node.asked = content_of(answer.message), -SECONDS_TO_ASK_AGAIN
        try:
            hello, before, entry = self._enter(content, node.owner)
        except ValueError as error:
            self._event("refused", "", f"a device: {error}")
            node.is_refused = True
            return
        changed = before.images > 0 and (before.images, before.data) != (hello.images, hello.data)
        for other in self._nodes.values():
            if (
                other is not node and other.device and other.device.name == hello.name
            ):  # where it was before, or a copy of it
                self._leave(other.device, "it came again elsewhere")
                other.device, other.is_refused = None, True
        node.device = Device(hello.name, entry.number, set(protocol.split(hello.layers)))
        if changed or self._boots.get(hello.name) != hello.boot:
            event = "returned" if before.images else "joined"
            why = "with other images than before" if changed else ""
            self._event(event, hello.name, why, {name: getattr(hello, name) for name in ABOUT})
        self._tallies.count(hello.name, hello)
        self._boots[hello.name] = hello.boot

    def _enter(self, content: Content, owner: str) -> tuple[Hello, Entry, Entry]:
        """Return who a device is, its entry of the roster as it was, without images if it is new, and as it is now.

        Raises:
          ValueError: it may not join.
        """
        if not isinstance(content, Hello):
            raise ValueError(content.why if isinstance(content, Refused) else "it does not say who it is")
        check_hello(content, owner, self._fewest)
        name = content.name
        known = self._journal.roster.get(name)
        before = dataclasses.replace(known) if known else Entry(-1, name, 0, "")
        entry = self._journal.enter(name, content.images, content.data, self._most)
        if entry is None:
            raise ValueError(f"there are {self._most} devices already, and {name} is not in the roster")
        return content, before, entry


def content_of(message: Message) -> Content:
    """Return what a device says; what cannot be read is a refusal."""
    try:
        return protocol.read(message)
    except ProtocolError as error:
        return Refused(str(error))
