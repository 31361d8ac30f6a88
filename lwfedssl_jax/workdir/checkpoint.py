"""Checkpoints, which are written completely or not at all, and verified against a manifest of hashes before use."""

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lwfedssl_jax.tree import Tree
from lwfedssl_jax.workdir.metrics import METRICS

KEPT = 3  # the newest ones, in addition to those that are always kept
MANIFEST = "manifest.sha256"  # in the format of sha256sum


class Checkpoint(NamedTuple):
    """A checkpoint that ``load`` has verified.

    Attributes:
      rounds: number of rounds that were finished when it was saved.
      state: dicts and lists of arrays, on the host.
      metrics: the content of ``metrics.jsonl`` at that time.
    """

    rounds: int
    state: Tree
    metrics: bytes


def save(folder: Path, rounds: int, state: Tree, metrics: bytes = b"", always_kept: Collection[int] = ()) -> None:
    """Save the state after a number of rounds as ``folder/ROUNDS``.

    Checkpoints of later rounds are removed: they are damaged, which is why the run continued from here. Of the others,
    the newest ``KEPT`` and those in ``always_kept`` are kept.

    Args:
      folder: made if it does not exist.
      rounds: number of rounds that are finished.
      state: dicts and lists of arrays.
      metrics: the content of ``metrics.jsonl``.
      always_kept: numbers of rounds.

    Raises:
      OSError: the folder cannot be written.
    """
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(".*"):  # of a process that was killed
        shutil.rmtree(leftover)
    target = folder / str(rounds)
    if target.exists() and find_fault(target) is None:
        return
    new = folder / f".{rounds}.new"
    new.mkdir()
    _save_state(new / "state", state)
    (new / METRICS).write_bytes(metrics)
    (new / MANIFEST).write_text(manifest(new), encoding="utf-8")
    for path in [*new.rglob("*"), new]:
        _sync(path)
    _remove(target)
    new.rename(target)
    _sync(folder)
    saved = saved_rounds(folder)
    kept = {*[number for number in saved if number <= rounds][-KEPT:], *always_kept}
    for number in saved:
        if number not in kept or number > rounds:
            _remove(folder / str(number))


def load(folder: Path) -> tuple[Checkpoint | None, dict[int, str]]:
    """Load the newest intact checkpoint, if there is one.

    Returns:
      The checkpoint or None, and by number of rounds what is wrong with each that is newer.

    Raises:
      OSError: an intact one cannot be read, for instance because another version of orbax wrote it.
    """
    faults = {}
    for rounds in reversed(saved_rounds(folder)):
        path = folder / str(rounds)
        if (fault := find_fault(path)) is not None:
            faults[rounds] = fault
            continue
        import orbax.checkpoint as ocp

        try:
            with _checkpointer() as checkpointer:
                state = checkpointer.restore((path / "state").absolute(), args=ocp.args.StandardRestore())
        except Exception as error:  # orbax raises many kinds; the files are as they were saved
            raise OSError(f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})") from error
        return Checkpoint(rounds, state, (path / METRICS).read_bytes()), faults
    return None, faults


def saved_rounds(folder: Path) -> list[int]:
    """Return the numbers of rounds that have a checkpoint, intact or not, in order."""
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else []


def manifest(path: Path) -> str:
    """Return a line ``SHA-256  FILE`` for every file of a checkpoint except for the manifest, in order."""
    lines = []
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p != path / MANIFEST):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        lines.append(f"{digest}  {file.relative_to(path).as_posix()}\n")
    return "".join(lines)


def find_fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is intact."""
    try:
        expected, found = (path / MANIFEST).read_bytes().decode(errors="replace"), manifest(path)
    except OSError as error:
        return f"{MANIFEST} is missing" if isinstance(error, FileNotFoundError) else str(error)
    if expected == found:
        return None
    differing = sorted({line[66:] for line in set(expected.splitlines()) ^ set(found.splitlines())})
    return f"not what was saved: {', '.join(differing[:3]) or MANIFEST}"


def _save_state(path: Path, state: Tree) -> None:
    import orbax.checkpoint as ocp

    state = jax.device_get(state)
    if shutil.disk_usage(path.parent).free < sum(np.asarray(x).nbytes for x in jax.tree.leaves(state)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # before failing threads of orbax outlive the save
    try:
        with _quiet_orbax(), _checkpointer() as checkpointer:
            checkpointer.save(path.absolute(), args=ocp.args.StandardSave(state))
    except ValueError as error:
        if code := re.search(r"os_error_code='(\d+)'", str(error)):  # from tensorstore
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        raise


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silence what threads report, and absl logs, in this process.

    Where a save fails, orbax's threads print a traceback each, and its logger repeats them. The same error reaches
    the caller of ``save``, who reports it in one line, so the others would only hide that line. Both settings belong
    to the process: orbax has none of its own. A thread of another library that fails during a save is silent, too.
    """
    hook, threading.excepthook = threading.excepthook, lambda _: None
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        threading.excepthook = hook
        logger.setLevel(level)


def _sync(path: Path) -> None:
    """Write a file, or the names in a folder, to disk, so that they survive a crash of the machine."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _remove(path: Path) -> None:
    """Remove a checkpoint; a process that is killed meanwhile leaves no part of it under its name."""
    if path.exists():
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.old")))


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    # If there are several processes, the first one saves for all.
    several = ocp.options.MultiprocessingOptions(active_processes={0}, barrier_sync_key_prefix="first")
    options = several if jax.process_count() > 1 else ocp.options.MultiprocessingOptions()
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)
