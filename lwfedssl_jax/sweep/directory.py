"""The directory of a sweep."""

import json
from pathlib import Path
from typing import Any

import filelock

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.sweep.grid import SweepFile, SweepRun
from lwfedssl_jax.system.files import can_hold

INDEX, SOURCE, LOCK = "sweep.json", "sweep.py", ".sweep.lock"


class SweepDirectory:
    """A directory that holds a sweep: ``sweep.json``, its file as ``sweep.py``, and the work directories in ``runs``.

    Runs that an earlier form of the sweep left there stay, and count no longer.

    Raises:
      ConfigError: the directory holds something else, cannot be written, or another process is using it (``take``).
    """

    def __init__(self, path: Path, sweep: SweepFile) -> None:
        self.path, self._source = path, sweep.source
        self._content: dict[str, Any] = {
            "name": sweep.name,
            "about": sweep.about,
            "runs": [
                {"directory": r.directory, "overrides": r.overrides, "seed": r.seed, "label": r.label}
                for r in sweep.runs
            ],
            "failed": {},
        }
        self._lock = filelock.FileLock(path / LOCK, timeout=0)
        there = [p for p in path.iterdir() if p.name != LOCK] if path.is_dir() else []
        if (path.exists() and not path.is_dir()) or (there and not (path / INDEX).is_file()):
            raise ConfigError(f"--workdir: {path} holds no sweep; accepted: a new or empty directory, or a sweep's")
        if not can_hold(path):
            raise ConfigError(f"--workdir: {path} cannot be written; accepted: a directory you can write to")

    def take(self) -> None:
        """Make the directory this process's and write ``sweep.json``."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise ConfigError(
                f"--workdir: {self.path} is in use by another process; accepted: another directory, or wait"
            ) from None
        self._write()
        (self.path / SOURCE).write_text(self._source)

    def close(self) -> None:
        """Let other processes use the directory."""
        self._lock.release()

    def fail(self, directory: str, why: str) -> None:
        """Note that a run has ended without a result."""
        self._content["failed"][directory] = why
        self._write()

    def is_finished(self, run: SweepRun) -> bool:
        """Whether a run has its summary."""
        return (self.path / run.directory / "summary.json").is_file()

    def _write(self) -> None:
        part = self.path / f".{INDEX}.new"
        part.write_text(json.dumps(self._content, indent=1) + "\n")
        part.replace(self.path / INDEX)
