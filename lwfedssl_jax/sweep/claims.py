"""Claims on the runs of a sweep, by which processes on any number of hosts share them."""

import contextlib
import os
import secrets
import socket
import threading
from pathlib import Path

RENEW_SECONDS, LAPSE_SECONDS = 15.0, 180.0  # a file system of several hosts may show changes a minute late


class Claims:
    """The runs that this process has claimed; a context manager, which renews them and gives them back.

    A claim is a file, which is made if it does not exist yet, as one step of the file system, and whose time of change
    is renewed as long as this process lives. Times are compared on the file system's clock. A claim lapses when it is
    not renewed any more, and at once if its process was on this machine and has ended.

    Args:
      folder: of all claims of a sweep.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._machine = folder, machine()
        self._token = f"{socket.gethostname()} {os.getpid()} {self._machine} {secrets.token_hex(8)}"
        self._clock = folder / f".{secrets.token_hex(8)}"
        self._held: set[str] = set()
        self._over = threading.Event()

    def __enter__(self) -> "Claims":
        self._folder.mkdir(parents=True, exist_ok=True)
        threading.Thread(target=self._renew, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for name in list(self._held):
            self.give_back(name)
        self._clock.unlink(missing_ok=True)

    def take(self, name: str) -> bool:
        """Claim a run, by the name of its claim; return whether it is this process's now."""
        if name in self._held:
            return True
        path = self._folder / name
        if (text := _read(path)) is not None:
            if not self._has_lapsed(path, text):
                return False
            moved = path.with_name(f".{name}.{secrets.token_hex(8)}")
            try:
                path.rename(moved)  # only one process can do this
            except OSError:
                return False
            text = _read(moved) or ""
            lapsed = self._has_lapsed(moved, text)
            moved.unlink(missing_ok=True)
            if not lapsed:  # another process took it over in between
                _create(path, text)
                return False
        if not _create(path, self._token):
            return False
        self._held.add(name)
        return True

    def give_back(self, name: str) -> None:
        """End a claim of this process."""
        self._held.discard(name)
        path = self._folder / name
        if _read(path) == self._token:
            path.unlink(missing_ok=True)

    def holder(self, name: str) -> str | None:
        """Return the host and the process that hold a claim, or None if nobody does any more."""
        path = self._folder / name
        text = _read(path)
        if text is None or self._has_lapsed(path, text):
            return None
        host, process, *_ = (*text.split(), "", "")
        return f"process {process} on {host}"

    def _has_lapsed(self, path: Path, text: str) -> bool:
        _, process, where, *_ = (*text.split(), "", "", "")
        if where == self._machine and process.isdecimal() and not _is_alive(int(process)):
            return True
        try:
            self._clock.touch()
            return self._clock.stat().st_mtime - path.stat().st_mtime > LAPSE_SECONDS
        except OSError:  # it has just been given back
            return False

    def _renew(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            for name in list(self._held):
                path = self._folder / name
                if _read(path) == self._token:
                    with contextlib.suppress(OSError):
                        os.utime(path)
                else:  # this process slept for too long, and another one has it now
                    self._held.discard(name)


def machine() -> str:
    """What tells machines, and containers on one, apart: numbers of processes mean the same only within one."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    return socket.gethostname()


def _read(path: Path) -> str | None:
    """The text of a file; None if it is not there."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None


def _create(path: Path, text: str) -> bool:
    """Make a file; False if it exists."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # not ours, but alive
        return True
    return True
