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

SECONDS_BETWEEN_STARTS = 5.0


def run_device(worker: Worker, relay: Relay, folder: Path, tell: Callable[[str], None], security: list[str]) -> None:
    """Serve a pilot until interrupted.

    Args:
      worker: the device.
      relay: to the server; it is closed in the end.
      folder: for Flower's settings and logs.
      tell: hears of progress.
      security: options of the SuperNode.
    """
    temporary = Path(tempfile.mkdtemp(prefix="lwfedssl-"))
    folder.mkdir(parents=True, exist_ok=True)
    listener = channel.listen(temporary / "worker")
    threading.Thread(target=answer, args=(listener, worker, tell), daemon=True).start()
    command = ["flower-supernode", *security, "--superlink", f"127.0.0.1:{relay.port}", "--port", str(free_port())]
    command += ["--node-config", f'socket="{temporary / "worker"}"']
    node: Process | None = None
    try:
        while True:
            if node is None or not node.is_running:
                if node is not None:
                    tell(f"Flower's SuperNode ended and is started again: {node.last_lines()}")
                    node.stop()
                    time.sleep(SECONDS_BETWEEN_STARTS)
                node = Process(command, folder / "supernode.log", folder)
            time.sleep(0.5)
    finally:
        if node is not None:
            node.stop()
        listener.close()
        relay.close()
        shutil.rmtree(temporary, ignore_errors=True)


def answer(listener: socket.socket, worker: Worker, tell: Callable[[str], None]) -> None:
    """Answer messages, one after the other, until the socket is closed."""
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                about, arrays = channel.receive(connection)
                answer = worker.handle(Message(about["kind"], about["fields"], dict(arrays)))
                tell(f"{about['kind']}: {answer.kind}")
                channel.send(connection, Packet({"kind": answer.kind, "fields": answer.fields}, answer.arrays))
            worker.compile_ahead()
