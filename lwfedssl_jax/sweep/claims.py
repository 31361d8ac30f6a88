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
    not renewed any more, and at once if its process was on this host and has ended.

    Args:
      folder: of all claims of a sweep.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._token = folder, f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
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

    def take(self, name: str) -> bool:
        """Claim a run, by the name of its claim; return whether it is this process's now."""
        if name in self._held:
            return True
        path = self._folder / name
        if self.holder(name) is None and path.exists():  # lapsed: only one process can move it away
            moved = path.with_name(f".{name}.{secrets.token_hex(8)}")
            with contextlib.suppress(OSError):
                path.rename(moved)
                if not self._has_lapsed(moved):  # another process took it over in between
                    os.link(moved, path)
                moved.unlink()
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(self._token)
        except FileExistsError:
            return False
        self._held.add(name)
        return True

    def give_back(self, name: str) -> None:
        """End a claim of this process."""
        self._held.discard(name)
        path = self._folder / name
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == self._token:
                path.unlink()

    def holder(self, name: str) -> str | None:
        """Return the host and the process that hold a claim, or None if nobody does any more."""
        path = self._folder / name
        if not path.exists() or self._has_lapsed(path):
            return None
        host, process, *_ = (*path.read_text(encoding="utf-8").split(), "", "")
        return f"process {process} on {host}"

    def _has_lapsed(self, path: Path) -> bool:
        try:
            host, process, *_ = (*path.read_text(encoding="utf-8").split(), "", "")
            age = self._now() - path.stat().st_mtime
        except OSError:
            return False
        here = host == socket.gethostname() and process.isdecimal()
        return age > LAPSE_SECONDS or (here and not _is_alive(int(process)))

    def _now(self) -> float:
        """The file system's time."""
        probe = self._folder / f".{secrets.token_hex(8)}.now"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now

    def _renew(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            for name in list(self._held):
                with contextlib.suppress(OSError):
                    os.utime(self._folder / name)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # not ours, but alive
        return True
    return True
