"""What carries messages between server and devices."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from lwfedssl_jax.pilot.protocol import Message


class Answer(NamedTuple):
    """A node's answer to a message, by the number that ``Link.send`` gave it; None if there will be none, and why."""

    node: str
    sent: int
    message: Message | None
    why: str = ""


class Link(Protocol):
    """A transport to nodes: devices, which may be another node when they return."""

    def nodes(self) -> Mapping[str, str]:
        """Return the nodes that can be reached now, as far as is known, and whose key each has, or an empty name."""

    def send(self, node: str, message: Message, seconds: float) -> int:
        """Send a message, which is worth nothing after some seconds; return a number that no other message has."""

    def poll(self) -> list[Answer]:
        """Return the answers that came since the last call; does not wait."""
