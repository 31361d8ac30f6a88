"""Flower's processes: started with a log, supervised, and ended by their ids with all that they have started."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import lwfedssl_jax
from lwfedssl_jax.config import ConfigError

SECONDS_TO_END = 20.0
LARGEST_LOG = 10_000_000
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Process:
    """A process of its own session; one that an earlier process has left behind, because it was killed, is ended first.

    Args:
      command: its words; the first one is a program of this Python's environment.
      log: a file that its output is added to; its id is written beside it.
      home: Flower's folder.
    """

    def __init__(self, command: Sequence[str], log: Path, home: Path) -> None:
        self._log, self._id, self._asked = log, log.with_suffix(".pid"), False
        end_leftover(self._id, command[0])
        with log.open("wb" if log.exists() and log.stat().st_size > LARGEST_LOG else "ab") as output:
            self._start = output.tell()
            self._process = subprocess.Popen(
                [str(Path(sys.executable).parent / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(home),
                start_new_session=True,
            )
        self._id.write_text(f"{self._process.pid}\n", encoding="utf-8")

    @property
    def is_running(self) -> bool:
        """Whether it is still running."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """Its id, which is also that of its group."""
        return self._process.pid

    def last_lines(self, count: int = 3) -> str:
        """Return the last lines of its log that speak of an error, or else its last lines."""
        text = COLOURS.sub("", self._log.read_bytes()[self._start :].decode(errors="replace"))
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return " | ".join(
            [line for line in lines if "error" in line.lower() or "Exit Code" in line][-count:] or lines[-count:]
        )

    def ask_to_stop(self) -> None:
        """Ask it to end what it has started, and itself; once, because to be asked again interrupts that."""
        if not self._asked:
            self._asked = True
            self._signal(signal.SIGTERM)

    def stop(self, seconds: float = SECONDS_TO_END) -> None:
        """End it and all that it has started, after ``seconds`` by killing it."""
        self.ask_to_stop()
        self._wait(seconds)
        self._signal(signal.SIGKILL)
        self._wait(SECONDS_TO_END)
        self._id.unlink(missing_ok=True)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)


def end_leftover(file: Path, program: str) -> None:
    """End the process whose id a file has, with all that it has started, if it is still that program."""
    try:
        pid = int(file.read_text(encoding="utf-8"))
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except (OSError, ValueError):
        return
    if program in words:
        for sent in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, sent)
                time.sleep(1.0)
    file.unlink(missing_ok=True)


def environment(home: Path) -> dict[str, str]:
    """Return the environment of Flower's processes: they find each other and this package, and report to nobody."""
    root, here = str(Path(lwfedssl_jax.__file__).parent.parent), str(Path(sys.executable).parent)
    paths: Mapping[str, tuple[str, str]] = {"PATH": (here, ""), "PYTHONPATH": (root, "")}
    joined = {
        name: os.pathsep.join(filter(None, [first, os.environ.get(name, default)]))
        for name, (first, default) in paths.items()
    }
    direct = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1,localhost"]))
    return dict(os.environ) | joined | {
        "NO_PROXY": direct,
        "no_proxy": direct,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
    }  # fmt: skip


def check_flower() -> None:
    """Refuse to go on without Flower.

    Raises:
      ConfigError: it is not installed.
    """
    if not (Path(sys.executable).parent / "flower-superlink").exists():
        raise ConfigError('pilot: Flower is not installed; accepted: after pip install "lwfedssl_jax[pilot]"')


def free_port() -> int:
    """Return a port of this machine that nobody uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
