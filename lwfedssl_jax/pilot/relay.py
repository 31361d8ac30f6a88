"""Counts the bytes between a device and the server: connections to a port of this machine are passed on."""

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

CHUNK = 2**16
LARGE = 4096  # bytes in one direction: more than a poll for messages, or a handshake, takes
TIMED = 100_000  # bytes whose transfer is timed
MOST_LINKS = 1000  # of the latest transfers
MOST_CONNECTIONS = 64


class Counted(NamedTuple):
    """What a relay has passed on since it began, without the headers of TCP and IP.

    An exchange is a request and its answer on one connection. It carries a message's content if either has at least
    ``LARGE`` bytes; all others are Flower's polls, heartbeats and confirmations.

    Attributes:
      wire_down, wire_up: bytes from and to the server in the exchanges that carry content.
      polling_bytes: of all other exchanges, both directions.
      downlink_mbps, uplink_mbps: medians over exchanges of at least ``TIMED`` bytes, from the end of the request or its
        begin to the last or first byte of the answer, in 1e6 bit/s; 0 before there is any.
    """

    wire_down: int = 0
    wire_up: int = 0
    polling_bytes: int = 0
    downlink_mbps: float = 0.0
    uplink_mbps: float = 0.0


@dataclass(eq=False)
class Exchange:
    """A request on a connection and its answer: bytes, and the times of their first and last ones."""

    up: int = 0
    down: int = 0
    began: float = 0.0
    asked: float = 0.0
    answered: float = 0.0
    ended: float = 0.0


class Relay:
    """A TCP relay on this machine.

    Args:
      host, port: that it passes connections on to.

    Attributes:
      port: that it listens on.
      heard: when the last bytes came from the server.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self.heard = time.monotonic()
        self._open = list[Exchange]()
        self._sums = Counted()
        self._downlinks, self._uplinks = deque[float](maxlen=MOST_LINKS), deque[float](maxlen=MOST_LINKS)
        self._room = threading.BoundedSemaphore(MOST_CONNECTIONS)
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    @property
    def is_running(self) -> bool:
        """Whether it accepts connections."""
        return self._accepting.is_alive()

    def counted(self) -> Counted:
        """Return what was passed on so far, also in exchanges that have not ended."""
        with self._lock:
            sums = self._sums
            for exchange in self._open:
                sums = added(sums, exchange)
            downlink, uplink = (median(links) if links else 0.0 for links in (self._downlinks, self._uplinks))
            return sums._replace(downlink_mbps=downlink, uplink_mbps=uplink)

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                if self._room.acquire(blocking=False):
                    threading.Thread(target=self._pass_on, args=(connection,), daemon=True).start()
                else:
                    connection.close()

    def _pass_on(self, near: socket.socket) -> None:
        try:
            self._connect(near)
        finally:
            self._room.release()

    def _connect(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self._target, timeout=30)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        exchange = Exchange()
        with self._lock:
            self._open.append(exchange)
        back = threading.Thread(target=self._copy, args=(far, near, exchange, self._count_down), daemon=True)
        back.start()
        self._copy(near, far, exchange, self._count_up)
        back.join()
        near.close()
        far.close()
        with self._lock:
            self._end(exchange)
            self._open.remove(exchange)

    def _copy(
        self,
        source: socket.socket,
        target: socket.socket,
        exchange: Exchange,
        count: Callable[[Exchange, int], None],
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(CHUNK):
                with self._lock:
                    count(exchange, len(chunk))
                target.sendall(chunk)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def _count_up(self, exchange: Exchange, size: int) -> None:
        now = time.monotonic()
        if exchange.down or not exchange.up:  # a new request
            self._end(exchange)
            exchange.began = now
        exchange.up, exchange.asked = exchange.up + size, now

    def _count_down(self, exchange: Exchange, size: int) -> None:
        now = time.monotonic()
        self.heard = now
        if not exchange.down:
            exchange.answered = now
        exchange.down, exchange.ended = exchange.down + size, now

    def _end(self, exchange: Exchange) -> None:
        """Add an exchange that has ended to the sums, and empty it."""
        self._sums = added(self._sums, exchange)
        for links, size, seconds in (
            (self._downlinks, exchange.down, exchange.ended - exchange.asked),
            (self._uplinks, exchange.up, exchange.answered - exchange.began),
        ):
            if size >= TIMED and seconds > 0:
                links.append(8e-6 * size / seconds)
        exchange.up = exchange.down = 0


def added(sums: Counted, exchange: Exchange) -> Counted:
    """Return sums with the bytes of an exchange."""
    if max(exchange.up, exchange.down) < LARGE:
        return sums._replace(polling_bytes=sums.polling_bytes + exchange.up + exchange.down)
    return sums._replace(wire_down=sums.wire_down + exchange.down, wire_up=sums.wire_up + exchange.up)
