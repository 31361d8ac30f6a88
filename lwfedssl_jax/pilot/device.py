"""A device's processes: this one, which stays and trains, and Flower's SuperNode, which is started again if it ends."""

import contextlib
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lwfedssl_jax.pilot import channel
from lwfedssl_jax.pilot.channel import Packet
from lwfedssl_jax.pilot.processes import Process, end_leftover, free_port
from lwfedssl_jax.pilot.protocol import Message
from lwfedssl_jax.pilot.relay import Relay
from lwfedssl_jax.pilot.worker import Worker
from lwfedssl_jax.system.files import DirectoryLock

PROGRAM, SUPERNODE = "flower-supernode", "supernode.pid"
SECONDS_BETWEEN_STARTS = 5.0
SECONDS_OF_SILENCE = 45.0  # more than between two of the SuperNode's heartbeats
WHY = {
    "Exit Code: 302": "its --key cannot be read",
    "Exit Code: 305": "the server does not know its key, or still takes it for connected, for a minute at most",
}


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
    temporary = channel.private_folder(folder)
    listener, busy = channel.listen(temporary / "worker"), threading.Lock()
    answering = threading.Thread(target=answer, args=(listener, worker, tell, busy), daemon=True)
    answering.start()
    command = [PROGRAM, *security, "--superlink", f"127.0.0.1:{relay.port}"]
    command += ["--node-config", f'socket="{temporary / "worker"}"']
    node: Process | None = None
    try:
        while True:
            silence = time.monotonic() - relay.heard
            if node is not None and silence > SECONDS_OF_SILENCE and not busy.locked():  # it may have given up
                tell(
                    f"nothing from the server for {silence:.0f} s: Flower's SuperNode is started again; "
                    "is the server there, and does it ask for encryption or not, as this device does?"
                )
                node.stop()
                node, relay.heard = None, time.monotonic()
            if node is None or not node.is_running:
                if node is not None:
                    said = node.last_lines()
                    why = next((words for code, words in WHY.items() if code in said), said)
                    tell(f"Flower's SuperNode ended and is started again: {why}")
                    node.stop()
                    time.sleep(SECONDS_BETWEEN_STARTS)
                node = Process([*command, "--port", str(free_port())], (folder / SUPERNODE).with_suffix(".log"), folder)
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


def end_supernode(folder: Path) -> None:
    """End the SuperNode of a device that was killed before it could do so."""
    end_leftover(folder / SUPERNODE, PROGRAM)


def answer(listener: socket.socket, worker: Worker, tell: Callable[[str], None], busy: threading.Lock) -> None:
    """Answer messages, one after the other, until the socket is closed; one that cannot be read is left alone.

    Args:
      listener: of the socket.
      worker: the device.
      tell: hears of progress.
      busy: is held while a message is being answered.
    """
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, busy, contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            about, arrays = channel.receive(connection)
            answer = worker.handle(Message(about["kind"], about["fields"], dict(arrays)))
            channel.send(connection, Packet({"kind": answer.kind, "fields": answer.fields}, answer.arrays))
            tell(f"{about['kind']}: {answer.kind}" + (f", {answer.fields['why']}" if "why" in answer.fields else ""))
        worker.compile_ahead()
