"""A link in this process: devices that answer at once, leave, return, are late, or send what they should not."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from lwfedssl_jax.pilot import protocol
from lwfedssl_jax.pilot.cache import LayerCache
from lwfedssl_jax.pilot.images import DeviceImages, write_images
from lwfedssl_jax.pilot.link import Answer
from lwfedssl_jax.pilot.protocol import Message
from lwfedssl_jax.pilot.worker import Worker
from lwfedssl_jax.simulation.setup import Cache

Change = Callable[[str, Message], Message | None]  # of a device's answer to a message; None: it does not answer


class FakeLink:
    """Devices by node, with a clock that moves on when the server sleeps.

    Attributes:
      now: seconds.
      change: what becomes of a device's answers.
      log: kinds of messages, with the node that they were sent to.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.change: Change = lambda node, answer: answer
        self.is_silent = False  # messages without an answer do not expire either
        self.log: list[tuple[str, str]] = []
        self.bytes: dict[str, int] = {}
        self.workers: dict[str, Worker] = {}
        self.delays: dict[str, float] = {}
        self.owners: dict[str, str] = {}
        self.at: list[tuple[float, Callable[[], None]]] = []
        self._answers: list[tuple[float, Answer]] = []
        self._busy: dict[str, float] = {}  # until when, since a node does one thing after the other
        self._sent = 0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for item in [item for item in self.at if item[0] <= self.now]:
            self.at.remove(item)
            item[1]()

    def nodes(self) -> Mapping[str, str]:
        return {node: self.owners.get(node, "") for node in self.workers}

    def send(self, node: str, message: Message, seconds: float) -> int:
        self._sent += 1
        self.log.append((node, message.kind))
        self.bytes[node] = self.bytes.get(node, 0) + sum(map(len, message.arrays.values()))
        answer = self.change(node, self.workers[node].handle(message))
        delay = self.delays.get(node, 0.0) if message.kind == "Train" else 0.0
        self._busy[node] = done = max(self.now, self._busy.get(node, 0.0)) + delay
        if answer is not None and done <= self.now + seconds:
            self._answers.append((done, Answer(node, self._sent, answer)))
        elif answer is None and self.is_silent:
            pass
        else:
            self._answers.append((self.now + seconds, Answer(node, self._sent, None, "the message has expired")))
        return self._sent

    def poll(self) -> list[Answer]:
        there = [answer for when, answer in self._answers if when <= self.now and answer.node in self.workers]
        self._answers = [item for item in self._answers if item[0] > self.now]
        return there

    def leave(self, node: str) -> None:
        self.workers.pop(node)


def worker(folder: Path, name: str, images_NxHxWxC: np.ndarray, programs: Cache | None = None) -> Worker:
    """A device with its own folder of images and its own cache, both of which a restart finds again."""
    if not (folder / name).exists():
        write_images(folder / name, images_NxHxWxC, range(len(images_NxHxWxC)))
    return Worker(name, DeviceImages(folder / name), LayerCache(folder / f"{name}-layers"), programs)


def answer_of(message: Message) -> protocol.Content:
    return protocol.read(message)
