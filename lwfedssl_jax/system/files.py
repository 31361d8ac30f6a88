"""Paths that a user gives, files written whole, directories locked for one process."""

import os
import secrets
import tempfile
from pathlib import Path

import filelock

from lwfedssl_jax.system.errors import ConfigError

PROBE = ".lwfedssl-"  # prefix of the folders that `can_write` makes


def with_home(path: str | Path) -> Path:
    """Return a path with the home directory in place of a leading ``~`` or ``~USER``.

    Raises:
      ConfigError: there is no such home directory.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigError(f"{path}: there is no home directory {expanded.split(os.sep)[0]}; accepted: a path without ~")
    return Path(expanded)


def user_cache() -> Path | None:
    """Return the folder for what can be made again: below ``XDG_CACHE_HOME``, or the home directory's ``.cache``.

    Returns:
      The folder, which may not exist yet; None if there is neither of the two.
    """
    given = os.environ.get("XDG_CACHE_HOME")
    home = os.path.expanduser("~")
    base = Path(given) if given else Path(home) / ".cache" if home != "~" else None
    return base / "lwfedssl_jax" if base else None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, even if the process is killed or the machine crashes on the way.

    Raises:
      OSError: the file cannot be written; what was there before is unchanged.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")  # another host may write it, too
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def is_leftover(path: Path) -> bool:
    """Whether the name is one that a process leaves if it is killed in ``write_whole`` or ``can_write``."""
    return path.name.startswith(PROBE) or (path.name.startswith(".") and path.name.endswith(".new"))


def can_write(path: Path) -> bool:
    """Whether a folder exists, or can be made, and be written to; by trying it: permissions alone do not tell."""
    path = path.absolute()
    try:
        nearest = next(p for p in [path, *path.parents] if p.exists())
        with tempfile.TemporaryDirectory(prefix=PROBE, dir=nearest) as folder:
            (Path(folder) / path.relative_to(nearest)).mkdir(parents=True, exist_ok=True)
            return True
    except OSError:  # also names that are too long
        return False


class DirectoryLock:
    """A lock on a directory, held by one process at a time and released by the system if that process dies.

    Args:
      file: the lock file, in the directory, which must exist when the lock is acquired.
      patience: seconds to wait for the process that holds the lock.
      option: that names the directory, for the error.
    """

    def __init__(self, file: Path, patience: float = 0, option: str = "--workdir") -> None:
        self._directory, self._option = file.parent, option
        self._lock = filelock.FileLock(file, timeout=patience, is_singleton=False)

    def acquire(self) -> None:
        """Keep the directory for this process until ``release``; does nothing if the file system has no locks.

        Raises:
          ConfigError: another process holds the lock.
        """
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise self.in_use() from None
        except NotImplementedError:
            pass

    def release(self) -> None:
        """Let other processes use the directory."""
        self._lock.release()

    def in_use(self) -> ConfigError:
        """The error that refuses a directory which another process uses."""
        return ConfigError(
            f"{self._option}: {self._directory} is in use by another process; "
            "accepted: another directory, or wait until it ends"
        )
