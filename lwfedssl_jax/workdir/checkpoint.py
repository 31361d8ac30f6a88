"""Checkpoints: written whole or not at all, and verified against a manifest of hashes before they are used."""

import errno
import hashlib
import logging
import os
import re
import shutil
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lwfedssl_jax.tree import Tree
from lwfedssl_jax.workdir.metrics import METRICS

KEPT = 3  # the last ones, besides those that are always kept
MANIFEST = "manifest.sha256"  # in the format of sha256sum


class Checkpoint(NamedTuple):
    """What ``load`` finds.

    Attributes:
      rounds: finished when it was saved.
      state: dicts and lists of arrays, on the host.
      metrics: the lines that there were.
    """

    rounds: int
    state: Tree
    metrics: bytes


def save(folder: Path, rounds: int, state: Tree, metrics: bytes = b"", always_kept: Collection[int] = ()) -> None:
    """Save dicts and lists of arrays, and lines, as ``folder/ROUNDS``.

    Checkpoints of later rounds go, having been damaged; of the others, the last ``KEPT`` and ``always_kept`` stay.

    Raises:
      OSError: the folder cannot be written.
    """
    folder.mkdir(exist_ok=True)
    for leftover in folder.glob(".*"):  # of a process that was killed
        shutil.rmtree(leftover)
    target = folder / str(rounds)
    if target.exists() and fault(target) is None:
        return
    new = folder / f".{rounds}.new"
    new.mkdir()
    _save_state(new / "state", state)
    (new / METRICS).write_bytes(metrics)
    (new / MANIFEST).write_text(manifest(new))
    for path in [*new.rglob("*"), new]:
        _sync(path)
    _remove(target)
    new.rename(target)
    _sync(folder)
    there = numbers(folder)
    kept = {*[n for n in there if n <= rounds][-KEPT:], *always_kept}
    for number in there:
        if number not in kept or number > rounds:
            _remove(folder / str(number))


def load(folder: Path) -> tuple[Checkpoint | None, dict[int, str]]:
    """The last whole checkpoint, if there is one, and what is wrong with each that is newer.

    Raises:
      OSError: a whole one cannot be read, such as by another version of orbax.
    """
    faults = {}
    for rounds in reversed(numbers(folder)):
        path = folder / str(rounds)
        if (why := fault(path)) is not None:
            faults[rounds] = why
            continue
        import orbax.checkpoint as ocp

        try:
            with _checkpointer() as checkpointer:
                state = checkpointer.restore((path / "state").absolute(), args=ocp.args.StandardRestore())
        except Exception as error:  # orbax raises many kinds; the files are as they were saved
            raise OSError(f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]})") from error
        return Checkpoint(rounds, state, (path / METRICS).read_bytes()), faults
    return None, faults


def numbers(folder: Path) -> list[int]:
    """The rounds of which there are checkpoints, whole or not, in order."""
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal()) if folder.is_dir() else []


def manifest(path: Path) -> str:
    """A line ``SHA-256  FILE`` for every file of a checkpoint but the manifest, in order."""
    lines = []
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p != path / MANIFEST):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        lines.append(f"{digest}  {file.relative_to(path).as_posix()}\n")
    return "".join(lines)


def fault(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
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

    # Threads of orbax print and log what it raises here too.
    state = jax.device_get(state)
    if shutil.disk_usage(path.parent).free < sum(np.asarray(x).nbytes for x in jax.tree.leaves(state)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # before orbax leaves threads behind that complain
    hook, threading.excepthook = threading.excepthook, lambda _: None
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(path.absolute(), args=ocp.args.StandardSave(state))
    except ValueError as error:
        if code := re.search(r"os_error_code='(\d+)'", str(error)):  # of tensorstore
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error
        raise
    finally:
        threading.excepthook = hook
        logger.setLevel(level)


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, outlast a crash of the machine."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill on the way leaves no part under its name."""
    if path.exists():
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.old")))


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    # Of several processes the first saves for all.
    several = ocp.options.MultiprocessingOptions(active_processes={0}, barrier_sync_key_prefix="first")
    options = several if jax.process_count() > 1 else ocp.options.MultiprocessingOptions()
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)
