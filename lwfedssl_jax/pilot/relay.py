"""Counts the bytes between a device and the server: connections to a port of this machine are passed on."""

import contextlib
import socket
import threading

CHUNK = 2**16


class Relay:
    """A TCP relay on this machine.

    Args:
      host, port: that it passes connections on to.

    Attributes:
      port: that it listens on.
      down, up: bytes that it has passed on from and to the server, without the headers of TCP and IP.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.down = self.up = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._pass_on, args=(connection,), daemon=True).start()

    def _pass_on(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self._target, timeout=30)
        except OSError:
            near.close()
            return
        far.settimeout(None)
        back = threading.Thread(target=self._copy, args=(far, near, "down"), daemon=True)
        back.start()
        self._copy(near, far, "up")
        back.join()
        near.close()
        far.close()

    def _copy(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(CHUNK):
                target.sendall(chunk)
                with self._lock:
                    setattr(self, direction, getattr(self, direction) + len(chunk))
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
