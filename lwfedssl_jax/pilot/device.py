"""A device's processes: this one, which stays and trains, and Flower's SuperNode, which is started again if it ends."""

import contextlib
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lwfedssl_jax.pilot import channel
from lwfedssl_jax.pilot.channel import Packet
from lwfedssl_jax.pilot.processes import Process, free_port
from lwfedssl_jax.pilot.protocol import Message
from lwfedssl_jax.pilot.relay import Relay
from lwfedssl_jax.pilot.worker import Worker
from lwfedssl_jax.system.files import DirectoryLock

SECONDS_BETWEEN_STARTS = 5.0


def run_device(worker: Worker, relay: Relay, folder: Path, tell: Callable[[str], None], security: list[str]) -> None:
    """Serve a pilot until interrupted.

    Args:
      worker: the device.
      relay: to the server; it is closed in the end.
      folder: for Flower's settings and logs.
      tell: hears of progress.
      security: options of the SuperNode.

    Raises:
      ConfigError: another process uses the folder.
      OSError: messages can no longer be received.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = DirectoryLock(folder / ".lock", option="--folder")
    lock.acquire()
    temporary = Path(tempfile.mkdtemp(prefix="lwfedssl-"))
    listener = channel.listen(temporary / "worker")
    answering = threading.Thread(target=answer, args=(listener, worker, tell), daemon=True)
    answering.start()
    command = ["flower-supernode", *security, "--superlink", f"127.0.0.1:{relay.port}"]
    command += ["--node-config", f'socket="{temporary / "worker"}"']
    node: Process | None = None
    try:
        while True:
            if node is None or not node.is_running:
                if node is not None:
                    tell(f"Flower's SuperNode ended and is started again: {node.last_lines()}")
                    node.stop()
                    time.sleep(SECONDS_BETWEEN_STARTS)
                node = Process([*command, "--port", str(free_port())], folder / "supernode.log", folder)
            if not answering.is_alive() or not relay.is_running:
                raise OSError("the device can no longer answer: see the messages above")  # systemd starts it again
            time.sleep(0.5)
    finally:
        if node is not None:
            node.stop()
        listener.close()
        relay.close()
        lock.release()
        shutil.rmtree(temporary, ignore_errors=True)


def answer(listener: socket.socket, worker: Worker, tell: Callable[[str], None]) -> None:
    """Answer messages, one after the other, until the socket is closed; one that cannot be read is left alone."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            about, arrays = channel.receive(connection)
            answer = worker.handle(Message(about["kind"], about["fields"], dict(arrays)))
            channel.send(connection, Packet({"kind": answer.kind, "fields": answer.fields}, answer.arrays))
            tell(f"{about['kind']}: {answer.kind}")
        worker.compile_ahead()
