"""Devices that leave, return, or answer late, wrongly or never; no model is trained."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake import FakeLink

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.pilot import protocol
from lwfedssl_jax.pilot.devices import Devices
from lwfedssl_jax.pilot.journal import Journal
from lwfedssl_jax.pilot.open_round import Report, Request
from lwfedssl_jax.pilot.protocol import Ask, Hello, Message, Missing, Refused, Result, Train
from lwfedssl_jax.pilot.relay import Counted
from lwfedssl_jax.workdir.metrics import PILOT_LINES, read_lines

BOOTS = itertools.count()


class Answering:
    """A device that answers without any training."""

    def __init__(self, name: str, images: int = 10, data: str = "d" * 64, layers: str = "") -> None:
        self.name, self.images, self.data, self.layers = name, images, data, layers
        self.boot, self.trains = f"boot {next(BOOTS)}", list[Train]()
        self.hello: dict[str, Any] = {}  # what it says in place of the truth
        self.counted = Counted()

    def handle(self, message: Message) -> Message:
        request = protocol.read(message)
        if isinstance(request, Ask):
            machine = {"cores": 1, "memory_bytes": 2**30, "available_bytes": 2**30, "baseline_bytes": 2**28}
            own = {"images": self.images, "data": self.data, "layers": self.layers}
            hello = Hello(self.name, self.boot, "", "", **machine, **own, **self.counted._asdict())
            return protocol.write(dataclasses.replace(hello, **self.hello))
        assert isinstance(request, Train)
        self.trains.append(request)
        result = Result(
            request.run,
            request.round,
            request.client,
            self.images,
            1.0,
            20,
            4,
            0.5,
            0.0,
            0.0,
            2**29,
            2**20,
            *self.counted,
            {"update": b"up"},
        )
        return protocol.write(result)


class Fleet:
    """Devices a, b and c behind a link, and the server's view of them."""

    def __init__(self, folder: Path, names: str = "abc", most: int = 3, deadline: float = 100.0) -> None:
        self.link, self.journal = FakeLink(), Journal(folder, 0)
        self.folder = folder
        self.journal.open()
        for name in names:
            self.link.workers[f"node-{name}"] = Answering(name)  # type: ignore[assignment]
        self.devices = Devices(self.link, self.journal, most, 2, deadline, now=self.link.clock, sleep=self.link.sleep)

    def collect(
        self, number: int = 1, clients: tuple[int, ...] = (0, 1, 2), check: Callable[[Result], None] = lambda r: None
    ) -> dict[int, Report]:
        request = Request("run", number, 1, "{}", b"trainable", {"h1": b"layer 1", "h2": b"layer 2"}, check)
        return self.devices.collect(request, clients, lambda done, of: None).reports

    def events(self) -> list[tuple[str, int, str]]:
        return [(line["event"], line["round"], line["name"]) for line in read_lines(self.folder, PILOT_LINES)]

    def why(self) -> str:
        return str(read_lines(self.folder, PILOT_LINES)[-1]["why"])


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def test_all_report_and_frozen_layers_are_sent_once(fleet: Fleet) -> None:
    heard: list[list[str]] = []
    fleet.devices.gather(3, heard.append)
    assert heard[-1] == ["a", "b", "c"]
    reports = fleet.collect()
    assert sorted(reports) == [0, 1, 2]
    assert reports[0].payload_down == len(b"trainable") + 2 * len(b"layer 1")
    assert reports[0].missing_layers == [1, 2]
    assert reports[0].payload_up == len(b"up")
    assert fleet.collect(2)[1].payload_down == len(b"trainable")
    assert fleet.events() == [("joined", 0, name) for name in "abc"]
    assert [entry.name for entry in Journal(fleet.folder, 0).roster.values()] == ["a", "b", "c"]


def test_a_device_that_leaves_is_not_waited_for_and_keeps_its_number_when_it_returns(fleet: Fleet) -> None:
    fleet.devices.gather(3, lambda names: None)
    fleet.link.change = lambda node, answer: answer if node != "node-b" else None
    fleet.link.at.append((5.0, lambda: fleet.link.leave("node-b")))
    assert sorted(fleet.collect()) == [0, 2]
    assert fleet.link.now < 20
    fleet.link.change = lambda node, answer: answer
    fleet.link.workers["another node"] = Answering("b", layers="h1,h2")  # type: ignore[assignment]
    reports = fleet.collect(2)
    assert sorted(reports) == [0, 1, 2]
    assert reports[1].payload_down == len(b"trainable")
    assert fleet.events()[3:] == [("left", 1, "b"), ("returned", 2, "b")]


def test_a_device_that_returns_in_time_is_asked_again_in_the_same_round(fleet: Fleet) -> None:
    fleet.devices.gather(3, lambda names: None)
    fleet.link.change = lambda node, answer: answer if node != "node-b" or fleet.link.now > 3 else None
    returned = Answering("b")
    fleet.link.delays["node-c"] = 20.0

    def restart() -> None:
        fleet.link.workers["node-b2"] = returned  # type: ignore[assignment]  # the old node is still there

    fleet.link.at.append((5.0, restart))
    reports = fleet.collect()
    assert sorted(reports) == [0, 1, 2]
    assert reports[1].payload_down == 2 * (len(b"trainable") + 2 * len(b"layer 1"))
    assert fleet.events()[3:] == [("left", 1, "b"), ("returned", 1, "b")]


def test_a_device_that_is_too_slow_is_not_in_the_round_nor_asked_before_it_has_answered(fleet: Fleet) -> None:
    fleet.devices.gather(3, lambda names: None)
    fleet.link.delays["node-c"] = 150.0
    assert sorted(fleet.collect()) == [0, 1]
    assert 100 <= fleet.link.now < 102
    fleet.link.delays["node-a"] = fleet.link.delays["node-b"] = 30.0
    assert sorted(fleet.collect(2)) == [0, 1]  # c's old answer comes after this round
    slow = fleet.link.workers["node-c"]
    assert [train.round for train in slow.trains] == [1]  # type: ignore[attr-defined]
    fleet.link.delays.clear()
    fleet.link.sleep(50)
    assert sorted(fleet.collect(3)) == [0, 1, 2]
    assert fleet.events()[3:] == [("failed", 1, "c")]
    assert [kind for node, kind in fleet.link.log if node == "node-c"] == ["Ask", "Train", "Ask", "Train"]


def test_a_lost_layer_is_sent_again(fleet: Fleet) -> None:
    fleet.devices.gather(3, lambda names: None)
    fleet.collect()
    lost = [True]

    def change(node: str, answer: Message) -> Message:
        if node == "node-a" and lost and lost.pop():
            return protocol.write(Missing("run", 2, "h2"))
        return answer

    fleet.link.change = change
    reports = fleet.collect(2)
    assert sorted(reports) == [0, 1, 2]
    assert reports[0].payload_down == 2 * len(b"trainable") + len(b"layer 2")
    assert fleet.events()[-1] == ("missing", 2, "a")


def test_a_layer_that_is_lost_again_and_again_ends_the_devices_part(fleet: Fleet) -> None:
    fleet.devices.gather(3, lambda names: None)
    fleet.link.change = lambda node, right: protocol.write(Missing("run", 1, "h2")) if node == "node-a" else right
    assert sorted(fleet.collect()) == [1, 2]
    assert fleet.events()[-1] == ("refused", 1, "a")  # h2 was in the message that it answers
    assert "it answered Missing" in fleet.why()


def test_a_moment_without_nodes_ends_nothing(fleet: Fleet) -> None:
    fleet.devices.gather(3, lambda names: None)
    fleet.link.delays |= dict.fromkeys(("node-a", "node-b", "node-c"), 30.0)
    workers = dict(fleet.link.workers)
    fleet.link.at += [(10.0, fleet.link.workers.clear), (12.0, lambda: fleet.link.workers.update(workers))]
    assert sorted(fleet.collect()) == [0, 1, 2]
    assert fleet.events()[3:] == []


def test_a_round_whose_devices_are_gone_ends_at_its_deadline_while_others_are_there(fleet: Fleet) -> None:
    fleet.devices.gather(3, lambda names: None)
    fleet.link.leave("node-a")
    assert fleet.collect(clients=(0,)) == {}
    assert 100 <= fleet.link.now < 110
    assert fleet.events()[3:] == [("left", 1, "a")]


def test_all_leave_in_a_round_and_return_in_time(fleet: Fleet) -> None:
    fleet.devices.gather(3, lambda names: None)
    fleet.link.delays |= dict.fromkeys(("node-a", "node-b", "node-c"), 30.0)
    workers = dict(fleet.link.workers)
    fleet.link.at += [(10.0, fleet.link.workers.clear), (40.0, lambda: fleet.link.workers.update(workers))]
    assert sorted(fleet.collect()) == [0, 1, 2]
    assert fleet.events()[3:] == [
        *[("left", 1, name) for name in "abc"], *[("returned", 1, name) for name in "abc"],
    ]  # fmt: skip


def test_a_question_without_an_answer_is_asked_again(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, names="a")
    fleet.link.change = lambda node, answer: answer if fleet.link.now > 100 else None
    fleet.devices.gather(1, lambda names: None)
    assert fleet.events() == [("joined", 0, "a")]
    assert fleet.link.log == [("node-a", "Ask")] * 3


def test_an_answer_that_never_comes_is_given_up(fleet: Fleet) -> None:
    fleet.devices.gather(3, lambda names: None)
    fleet.link.is_silent = True
    fleet.link.change = lambda node, answer: answer if node != "node-a" or fleet.link.now > 1 else None
    assert sorted(fleet.collect()) == [1, 2]
    for number in (2, 3, 4):
        fleet.link.sleep(50)
        reports = fleet.collect(number)
    assert sorted(reports) == [0, 1, 2]


def test_a_device_that_starts_again_at_the_same_node_is_asked_who_it_is(fleet: Fleet) -> None:
    fleet.devices.gather(3, lambda names: None)
    fleet.link.workers["node-a"] = Answering("a", images=11, data="e" * 64)  # type: ignore[assignment]
    assert sorted(fleet.collect()) == [1, 2]
    assert sorted(fleet.collect(2)) == [0, 1, 2]
    assert fleet.events()[3:] == [("refused", 1, "a"), ("returned", 2, "a")]


def test_two_devices_of_one_name_do_not_drive_each_other_out(fleet: Fleet) -> None:
    fleet.devices.gather(3, lambda names: None)
    fleet.link.workers["node-a2"] = Answering("a")  # type: ignore[assignment]
    for number in range(1, 5):
        assert sorted(fleet.collect(number)) == [0, 1, 2]
        fleet.link.sleep(100)
    assert fleet.events()[3:] == [("left", 1, "a"), ("returned", 1, "a")]


def test_what_an_upload_took_is_known_when_the_device_is_asked_again(fleet: Fleet) -> None:
    fleet.devices.gather(3, lambda names: None)
    a, b, c = (fleet.link.workers[f"node-{name}"] for name in "abc")
    a.counted = b.counted = c.counted = Counted(1000, 0, 50)  # type: ignore[attr-defined]
    assert [report.wire_down for report in fleet.collect().values()] == [1000] * 3
    a.counted = b.counted = Counted(1500, 300, 70)  # type: ignore[attr-defined]
    fleet.link.leave("node-b")
    fleet.link.workers["node-b2"] = Answering("b")  # type: ignore[assignment]  # which has started again
    fleet.link.workers["node-b2"].counted = Counted(90, 0, 10)  # type: ignore[attr-defined]
    c.counted = Counted(-1)  # type: ignore[attr-defined]
    reports = fleet.collect(2)
    assert {client: report.wire_down for client, report in reports.items()} == {0: 500, 1: None}
    assert [line["why"] for line in read_lines(fleet.folder, PILOT_LINES) if line.get("event") == "refused"] == [
        "its wire_down is -1",
        "a device: its wire_down is -1",  # when it is asked again
    ]
    a.counted = Counted(1500, 620, 80)  # type: ignore[attr-defined]
    fleet.link.change = lambda node, answer: answer if node == "node-a" else None
    began = fleet.link.now
    fleet.devices.settle()
    assert 15 <= fleet.link.now - began < 16  # b does not answer
    measured = [line for line in read_lines(fleet.folder, PILOT_LINES) if "measured" in line]
    assert [(line["round"], line["name"], line["measured"]) for line in measured] == [
        (1, "a", {"wire_up": 300, "polling_bytes": 20}),
        (2, "a", {"wire_up": 320, "polling_bytes": 10}),
    ]


def test_bytes_that_were_sent_for_nothing_count(fleet: Fleet) -> None:
    fleet.devices.gather(3, lambda names: None)
    fleet.link.change = lambda node, right: protocol.write(Refused("busy")) if node == "node-a" else right
    request = Request("run", 1, 1, "{}", b"trainable", {}, lambda result: None)
    collected = fleet.devices.collect(request, (0, 1, 2), lambda done, of: None)
    assert (collected.payload_down, collected.payload_up) == (3 * len(b"trainable"), 2 * len(b"up"))
    assert fleet.devices.last_reason == "a: busy"


def test_without_any_device_the_round_waits_and_its_time_does_not_run(fleet: Fleet) -> None:
    fleet.devices.gather(3, lambda names: None)
    workers = dict(fleet.link.workers)
    fleet.link.workers.clear()
    fleet.link.sleep(1)
    fleet.link.at.append((1000.0, lambda: fleet.link.workers.update(workers)))
    assert sorted(fleet.collect()) == [0, 1, 2]
    assert fleet.link.now >= 1000
    assert ("waiting", 1, "") in fleet.events()


def refuse(result: Result) -> None:
    raise ValueError("an update of 2 bytes where 8 were expected")


@pytest.mark.parametrize(
    ("answer", "event", "why"),
    [
        (protocol.write(Refused("no room")), "refused", "no room"),
        (Message("Result", {"version": 7}, {}), "refused", "protocol 7"),
        (protocol.write(Ask()), "refused", "it answered Ask"),
        (None, "failed", "the message has expired"),
    ],
)
def test_what_is_no_result_is_not_in_the_round(fleet: Fleet, answer: Message | None, event: str, why: str) -> None:
    fleet.devices.gather(3, lambda names: None)
    fleet.link.change = lambda node, right: answer if node == "node-b" else right
    assert sorted(fleet.collect()) == [0, 2]
    assert fleet.events()[-1] == (event, 1, "b")
    assert why in fleet.why()


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("client", 2, "from client 2; accepted: of round 1 from client 1"),
        ("examples", 10**6, "an update from 1000000 images"),
        ("round", 7, "of round 7"),
        ("run", "other", "accepted: of round 1"),
    ],
)
def test_results_that_do_not_fit_the_roster_are_refused(fleet: Fleet, field: str, value: int, why: str) -> None:
    fleet.devices.gather(3, lambda names: None)

    def change(node: str, answer: Message) -> Message:
        return answer._replace(fields=answer.fields | {field: value}) if node == "node-b" else answer

    fleet.link.change = change
    assert sorted(fleet.collect()) == [0, 2]
    assert why in fleet.why()


def test_updates_that_cannot_be_read_are_refused(fleet: Fleet) -> None:
    fleet.devices.gather(3, lambda names: None)
    assert fleet.collect(check=refuse) == {}
    assert "8 were expected" in fleet.why()


def test_who_may_join(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, names="ab", most=2)
    fleet.devices.gather(2, lambda names: None)
    fleet.link.workers["node-d"] = Answering("d")  # type: ignore[assignment]
    fleet.link.workers["node-e"] = Answering("e", images=1)  # type: ignore[assignment]
    assert sorted(fleet.collect(clients=(0, 1))) == [0, 1]
    assert fleet.link.now < 10
    fleet.link.workers["node-f"] = Answering("f\n")  # type: ignore[assignment]
    fleet.link.workers["node-g"] = Answering("g", images=2**40)  # type: ignore[assignment]
    fleet.link.workers["node-h"] = Answering("h", data="\u2028" * 200_000)  # type: ignore[assignment]
    fleet.link.workers["node-i"] = Answering("a")  # type: ignore[assignment]
    fleet.link.owners |= {"node-a": "a", "node-i": "i"}
    for name, value in (("platform", "Linux x=1"), ("software", "\x1b[2J"), ("available_bytes", 0), ("cores", 2**60)):
        fleet.link.workers[f"node-{name}"] = Answering("a")  # type: ignore[assignment]
        fleet.link.workers[f"node-{name}"].hello = {name: value}  # type: ignore[attr-defined]
    assert sorted(fleet.collect(2, clients=(0, 1))) == [0, 1]
    whys = [line["why"] for line in read_lines(tmp_path, PILOT_LINES) if line["event"] == "refused"]
    assert sorted(whys) == sorted(
        [
            "a device: there are 2 devices already, and d is not in the roster",
            "a device: it has 1 images; accepted: 2 to 16777216",
            "a device: its name is 'f\\n'; accepted: 1 to 64 characters",
            f"a device: it has {2**40} images; accepted: 2 to 16777216",
            "a device: its hash of the images is not one; accepted: SHA-256",
            "a device: its available_bytes is 0",
            f"a device: its cores is {2**60}",
            "a device: it says that it is a, with the key of i",
            "a device: its platform is 'Linux x=1'",
            "a device: its software is '\\x1b[2J'",
        ]
    )


def test_a_device_whose_images_have_changed_counts_with_its_new_number(fleet: Fleet) -> None:
    fleet.devices.gather(3, lambda names: None)
    fleet.link.leave("node-a")
    fleet.link.workers["node-a2"] = Answering("a", images=11, data="e" * 64)  # type: ignore[assignment]
    assert fleet.collect()[0].result.examples == 11
    assert fleet.journal.roster["a"].images == 11
    returned = next(line for line in read_lines(fleet.folder, PILOT_LINES) if line["event"] == "returned")
    assert returned["why"] == "with other images than before"


def test_a_journal_forgets_what_was_measured_in_rounds_that_are_run_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0)
    journal.enter("a", 10, "d", 3)
    for number in (1, 2):
        journal.write({"round": number, "measured": {}})
        journal.write({"event": "late", "round": number, "name": "a"})
    assert not list(tmp_path.iterdir())  # before the work directory exists
    journal.open()
    with (tmp_path / "pilot.jsonl").open("a") as file:
        file.write('{"round": 3, "mea')  # killed on the way
    again = Journal(tmp_path, 1)
    again.open()
    assert [("event" in line, line["round"]) for line in read_lines(tmp_path, PILOT_LINES)] == [
        (False, 1),
        (True, 1),
        (True, 2),
    ]
    assert again.roster == journal.roster
    for text in ("number,name\nx,a\n", "number,name,images,data\n7,a,10,d\n", f"number,name\n0,{'a' * 200_000}\n"):
        (tmp_path / "roster.csv").write_text(text)
        with pytest.raises(ConfigError, match=r"roster\.csv cannot be read"):
            Journal(tmp_path, 1)
    assert json.loads((tmp_path / "pilot.jsonl").read_text().splitlines()[0]) == {"round": 1, "measured": {}}
