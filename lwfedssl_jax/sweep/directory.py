"""The directory in which a sweep is stored."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.sweep.claims import Claims
from lwfedssl_jax.sweep.grid import SweepFile, SweepRun
from lwfedssl_jax.system.files import DirectoryLock, can_write, is_leftover, write_whole

INDEX, SOURCE, RUNS, CLAIMS, SWEEP_LOCK = "sweep.json", "sweep.py", "runs", ".claims", ".sweep.lock"
WRITE_LOCK, PATIENCE = ".sweep.write.lock", 60.0  # seconds that a process waits while another one writes


def digest_of(directory: str) -> str:
    """Return the digest of a run from its directory's name."""
    return directory.rpartition("-")[2]


def runs_in(path: Path) -> list[str]:
    """Return the names of the runs' directories in a sweep's directory."""
    folder = path / RUNS
    return [run.name for run in folder.iterdir() if (run / "config.json").is_file()] if folder.is_dir() else []


class SweepDirectory:
    """A directory that holds a sweep: ``sweep.json``, its file as ``sweep.py``, and the work directories in ``runs``.

    A run is known by the digest at the end of its directory's name: where another setting was added to the sweep, its
    label may differ from the one that the directory was named after.

    Args:
      path: the directory.
      sweep: what it holds.
      shard: ``(number from 1, of how many)``: the process runs that share of the runs only, and does not keep other
        shards from the directory.

    Attributes:
      runs: of the sweep, with the directories that they have here.
      share: those of the shard, neighbours in the sweep's order.
      alone: whether there are no other shards.
      claims: on the runs that this process trains, by their digest.
      others: directories of an earlier version's runs, which stay but are ignored.

    Raises:
      ConfigError: the directory holds something else, cannot be written, or another process is using it (``take``).
    """

    def __init__(self, path: Path, sweep: SweepFile, shard: tuple[int, int] = (1, 1)) -> None:
        self.path, self._source, (number, count) = path, sweep.source, shard
        self.alone = count == 1
        there_by_digest = {digest_of(run): f"{RUNS}/{run}" for run in sorted(runs_in(path), reverse=True)}
        self.runs = [
            run._replace(directory=there_by_digest.pop(digest_of(run.directory), run.directory)) for run in sweep.runs
        ]
        self.others = sorted(there_by_digest.values())
        self.share = self.runs[(number - 1) * len(self.runs) // count : number * len(self.runs) // count]
        self.claims = Claims(path / CLAIMS)
        self._failed: dict[str, str] = {}
        self._tried: set[str] = set()
        self._content: dict[str, Any] = {
            "name": sweep.name,
            "base": sweep.base,
            "about": sweep.about,
            "runs": [
                {"directory": r.directory, "overrides": r.overrides, "seed": r.seed, "label": r.label}
                for r in self.runs
            ],
        }
        self._lock = DirectoryLock(path / SWEEP_LOCK, patience=0 if self.alone else PATIENCE)
        self._writing = DirectoryLock(path / WRITE_LOCK, patience=PATIENCE)
        known = (SWEEP_LOCK, WRITE_LOCK)
        there = [p for p in path.iterdir() if p.name not in known and not is_leftover(p)] if path.is_dir() else []
        if (path.exists() and not path.is_dir()) or (there and not (path / INDEX).is_file()):
            raise ConfigError(f"--workdir: {path} contains no sweep; accepted: a new or empty directory, or a sweep's")
        if not can_write(path):
            raise ConfigError(f"--workdir: {path} cannot be written; accepted: a directory you can write to")

    def take(self) -> None:
        """Lock the directory for this process, unless it is one of several shards, and write ``sweep.json``."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        self._write()
        if not self.alone:
            self._lock.release()
        write_whole(self.path / SOURCE, self._source.encode())

    def close(self) -> None:
        """Let other processes use the directory."""
        self._lock.release()

    def fail(self, directory: str, why: str) -> None:
        """Note that a run has ended without a result."""
        self._failed[directory] = why
        self._write()

    def is_finished(self, run: SweepRun) -> bool:
        """Return whether a run has its summary."""
        return (self.path / run.directory / "summary.json").is_file()

    def unclaimed(self) -> list[SweepRun]:
        """Return the runs of the share that are not finished, that nobody has, and that were not tried here yet."""
        return [
            run
            for run in self.share
            if run.directory not in self._tried and not self.is_finished(run) and self.holder(run) is None
        ]

    def is_waiting(self) -> bool:
        """Whether another process has, or had until lately, a run that is not finished."""
        return any(not self.is_finished(run) and self.holder(run) is not None for run in self.share)

    def claim(self, run: SweepRun) -> bool:
        """Keep a run for this process; return False if it is finished, or another process has it."""
        name = digest_of(run.directory)
        if not self.claims.take(name):
            return False
        if self.is_finished(run):
            self.claims.give_back(name)
            return False
        self._tried.add(run.directory)
        return True

    def give_back(self, run: SweepRun) -> None:
        """Let other processes have a run."""
        self.claims.give_back(digest_of(run.directory))

    def holder(self, run: SweepRun) -> str | None:
        """Return who is training a run, another process or this one, if somebody is."""
        return self.claims.holder(digest_of(run.directory))

    def _write(self) -> None:
        mine = {run.directory for run in self.share}
        with self.alone_writing():
            others = {directory: why for directory, why in self._failed_before().items() if directory not in mine}
            content = self._content | {"failed": others | self._failed}
            write_whole(self.path / INDEX, f"{json.dumps(content, indent=1)}\n".encode())

    @contextlib.contextmanager
    def alone_writing(self) -> Iterator[None]:
        """Within this context, no other shard writes to the sweep's own files."""
        self._writing.acquire()
        try:
            yield
        finally:
            self._writing.release()

    def _failed_before(self) -> dict[str, str]:
        """What other shards have noted."""
        try:
            return dict(json.loads((self.path / INDEX).read_text(encoding="utf-8"))["failed"])
        except (OSError, ValueError, KeyError, TypeError):
            return {}
