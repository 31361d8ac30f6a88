"""The server's link to devices by Flower: its SuperLink, started again if it ends, and a run that carries messages."""

import json
import select
import shutil
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lwfedssl_jax.pilot import channel
from lwfedssl_jax.pilot.channel import Packet
from lwfedssl_jax.pilot.keys import CA, CERTIFICATE, DEVICES, KEY
from lwfedssl_jax.pilot.link import Answer
from lwfedssl_jax.pilot.processes import Process, end_leftover, environment
from lwfedssl_jax.pilot.protocol import Message
from lwfedssl_jax.system.files import DirectoryLock, write_whole

SECONDS_TO_START = SECONDS_TO_ANSWER = 120.0
MOST_FAILURES = 5
SUPERLINK, REGISTERED = "superlink.pid", "registered.json"
IN_USE = "Public key already in use"  # as Flower says it
FAB = Path(__file__).parent / "fab"


class FlowerLink:
    """A ``Link`` over Flower's SuperLink, which listens on this machine alone.

    Args:
      folder: for its database, settings and logs.
      port: of the SuperLink.
      keys: a folder as ``make_keys`` makes it: connections are encrypted, and only devices with a key may join.
    """

    def __init__(self, folder: Path, port: int, keys: Path | None = None) -> None:
        self._folder, self._port, self._keys = folder, port, keys.absolute() if keys else None
        self._temporary: Path | None = None
        self._listener: socket.socket | None = None
        self._superlink: Process | None = None
        self._connection: socket.socket | None = None
        self._open: dict[str, tuple[int, str]] = {}  # by Flower's id of a message: its number, and its node
        self._lost: list[Answer] = []
        self._sent = 0
        self._lock = DirectoryLock(folder / ".lock")
        self._failures = 0  # one after the other

    @property
    def pid(self) -> int | None:
        """The SuperLink's process."""
        return self._superlink.pid if self._superlink else None

    def start(self) -> None:
        """Start what carries messages; after that, it is started again whenever it ends.

        Raises:
          ConfigError: another process uses the folder.
          OSError: it does not start.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()  # before anything that another process may have there is touched
        self._temporary = channel.private_folder(self._folder)
        self._listener = channel.listen(self._temporary / "server")
        trusted = f'root-certificates = "{self._keys / CA}"' if self._keys else "insecure = true"
        (self._folder / "config.toml").write_text(
            f'[superlink.pilot]\naddress = "127.0.0.1:{self._port}"\n{trusted}\n', encoding="utf-8"
        )
        self._connected()

    def close(self) -> None:
        """End all processes."""
        if self._connection:
            self._connection.close()
        if self._superlink:
            self._superlink.stop()
        if self._listener and self._temporary:
            self._listener.close()
            shutil.rmtree(self._temporary, ignore_errors=True)
        self._lock.release()

    def nodes(self) -> Mapping[str, str]:
        """Return the nodes that are online, with the names that their keys are registered under.

        There is none while the SuperLink is away.
        """
        answer = self._do(do="nodes")
        return answer.data["nodes"] if answer else {}

    def send(self, node: str, message: Message, seconds: float) -> int:
        """Send a message."""
        self._sent += 1
        about = {"kind": message.kind, "fields": message.fields, "node": node, "seconds": max(1.0, float(seconds))}
        answer = self._do(message.arrays, do="send", **about)
        if answer and answer.data["id"]:
            self._open[answer.data["id"]] = self._sent, node
        else:
            self._lost.append(Answer(node, self._sent, None, "it could not be sent"))
        return self._sent

    def poll(self) -> list[Answer]:
        """Return the answers that came."""
        found, self._lost = self._lost, []
        packet = self._do(do="poll", ids=list(self._open))
        for number, entry in enumerate(packet.data["answers"] if packet else ()):
            sent, node = self._open.pop(entry["id"], (0, ""))
            if "why" in entry:
                found.append(Answer(node, sent, None, entry["why"]))
            elif packet:
                arrays = {name: packet.arrays[f"{number} {name}"] for name in entry["arrays"]}
                found.append(Answer(node, sent, Message(entry["kind"], entry["fields"], arrays)))
        return found

    def _do(self, arrays: dict[str, bytes] | None = None, **request: Any) -> Packet | None:
        """Have Flower's run do something; None if it is away, which loses all answers that are still to come."""
        try:
            connection = self._connected()
            channel.send(connection, Packet(request, arrays or {}))
            self._wait(connection)
            answer = channel.receive(connection)
            self._failures = 0
            return answer
        except OSError as error:
            self._failures += 1
            if self._failures == MOST_FAILURES:
                raise OSError(f"Flower's server cannot be reached, also after it was started again: {error}") from error
            if self._connection:
                self._connection.close()
            self._connection = None
            self._lost += [Answer(node, sent, None, "Flower's server ended") for sent, node in self._open.values()]
            self._open.clear()
            return None

    def _wait(self, connection: socket.socket) -> None:
        """Wait for an answer of Flower's run, which itself waits for ever once the SuperLink is gone.

        Raises:
          OSError: the SuperLink has ended, or there is no answer.
        """
        until = time.monotonic() + SECONDS_TO_ANSWER
        while not select.select([connection], [], [], 0.5)[0]:
            if not (self._superlink and self._superlink.is_running) or time.monotonic() > until:
                raise ConnectionResetError("Flower's server ended")

    def _connected(self) -> socket.socket:
        """The connection to Flower's run, which is started if there is none.

        Raises:
          OSError: it does not start.
        """
        if self._connection:
            return self._connection
        if not (self._superlink and self._superlink.is_running):
            if self._superlink:
                self._superlink.stop()
            self._start()
        assert self._temporary
        assert self._listener
        self._submit(self._temporary)
        self._listener.settimeout(SECONDS_TO_START)
        self._connection = self._listener.accept()[0]
        self._connection.setblocking(True)
        return self._connection

    def _start(self) -> None:
        """Start the SuperLink.

        Raises:
          OSError: it does not start in time.
        """
        command = ["flower-superlink", "--host", "127.0.0.1", "--port", str(self._port), *self._security()]
        end_leftover(self._folder / SUPERLINK, command[0])
        try:
            socket.create_server(("127.0.0.1", self._port)).close()
        except OSError as error:
            raise OSError(f"--port: {self._port} cannot be used ({error.strerror}); accepted: a free one") from error
        command += ["--database", str(self._folder / "state.db"), "--disable-runtime-dependency-installation"]
        self._superlink = Process(command, (self._folder / SUPERLINK).with_suffix(".log"), self._folder)
        until = time.monotonic() + SECONDS_TO_START
        while time.monotonic() < until and self._superlink.is_running:
            if self._is_healthy():
                return self._register()
            time.sleep(0.2)
        raise OSError(f"Flower's SuperLink did not start: {self._superlink.last_lines()}")

    def _security(self) -> list[str]:
        """Options of the SuperLink."""
        if not self._keys:
            return ["--insecure"]
        files = {"--ssl-certfile": CERTIFICATE, "--ssl-keyfile": KEY, "--ssl-ca-certfile": CA}
        words = [word for option, name in files.items() for word in (option, str(self._keys / name))]
        return [*words, "--enable-supernode-auth"]

    def _register(self) -> None:
        """Let the devices join whose keys are there, and no others any more.

        Raises:
          OSError: Flower refuses one of them.
        """
        file = self._folder / REGISTERED
        known: dict[str, int] = json.loads(file.read_bytes()) if file.exists() else {}
        keys = {path.stem: path for path in sorted((self._keys / DEVICES).glob("*.pub"))} if self._keys else {}
        for name in known.keys() - keys.keys() if self._keys else ():
            self._flwr("supernode", "unregister", str(known.pop(name)), "pilot", "--format", "json")
        for name, path in keys.items():
            answer, said = self._flwr("supernode", "register", str(path), "pilot", "--name", name, "--format", "json")
            if answer.get("success"):
                known[name] = answer["node-id"]
            elif IN_USE not in said:  # it is registered
                raise OSError(f"the key {path} could not be registered: {said}")
        write_whole(file, json.dumps(known).encode())

    def _is_healthy(self) -> bool:
        scheme, context = (
            ("https", ssl.create_default_context(cafile=self._keys / CA)) if self._keys else ("http", None)
        )
        try:
            handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
            with urllib.request.build_opener(*handlers).open(f"{scheme}://127.0.0.1:{self._port}/health", timeout=5):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _submit(self, temporary: Path) -> None:
        """Start a run of Flower's that carries messages.

        Raises:
          OSError: it does not start.
        """
        app = temporary / "fab"
        if not app.exists():
            shutil.copytree(FAB, app, ignore=shutil.ignore_patterns("__pycache__"))
        path = temporary / "server"
        answer, output = self._flwr("run", str(app), "pilot", "--run-config", f'socket="{path}"', "--format", "json")
        if not answer.get("success"):
            raise OSError(f"Flower's run did not start: {output}")

    def _flwr(self, *words: str) -> tuple[dict[str, Any], str]:
        """Run a command of Flower's; return its answer, empty if there is none, and the end of what it said."""
        command = [str(Path(sys.executable).parent / "flwr"), *words]
        given = {"capture_output": True, "encoding": "utf-8", "errors": "replace", "env": environment(self._folder)}
        try:
            done = subprocess.run(command, timeout=SECONDS_TO_START, check=False, **given)  # type: ignore[call-overload]
        except subprocess.TimeoutExpired:
            return {}, f"no answer within {SECONDS_TO_START:g} s"
        try:
            answer = dict(json.loads(done.stdout[done.stdout.find("{") :]))
        except (ValueError, TypeError):
            answer = {}
        return answer, " ".join((done.stdout + done.stderr).split())[-300:]
