"""The devices of a run: set-up before JAX starts, memory, and several processes."""

import contextlib
import os
import re
import socket
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lwfedssl_jax.system.errors import ConfigError
from lwfedssl_jax.system.files import can_write, user_cache
from lwfedssl_jax.tree import Tree

MEMORY_SHARE = 0.9  # of a device's memory that a program may ask for


def set_up(compilation_cache: str | None) -> None:
    """Set JAX up before a run (``set_up_cpu``, ``set_up_cache``, ``check_platform``)."""
    set_up_cpu()
    set_up_cache(compilation_cache)
    check_platform()


def set_up_cpu() -> None:
    """Make each CPU core a device of its own, unless ``XLA_FLAGS`` or ``JAX_NUM_CPU_DEVICES`` say otherwise.

    Training one client per core is faster than splitting one client's products over the cores. Does nothing if JAX
    has started its backends.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    if "JAX_NUM_CPU_DEVICES" not in os.environ and devices != cores:
        with contextlib.suppress(RuntimeError):  # too late
            jax.config.update("jax_num_cpu_devices", cores)


def set_up_cache(folder: str | None) -> None:
    """Keep compiled programs on disk for the next run.

    Args:
      folder: a path; ``off`` for no cache; None for ``JAX_COMPILATION_CACHE_DIR``, or else the user's cache folder;
        if that cannot be written, there is no cache, which is said on standard error.

    Raises:
      ConfigError: the folder cannot be written.
    """
    if folder == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return
    given = folder or os.environ.get("JAX_COMPILATION_CACHE_DIR")
    path = Path(given) if given else user_cache()
    if path is None or not can_write(path):
        if given:
            raise ConfigError(f"--compilation-cache: {given} cannot be written; accepted: a folder, or off")
        why = f"{path} cannot be written" if path else "there is no home directory, and no XDG_CACHE_HOME"
        print(f"programs are not kept for the next run: {why} (--compilation-cache DIR)", file=sys.stderr)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def cache_folder() -> Path | None:
    """Return the folder in which this process keeps what it computes for the next one (``set_up_cache``), if any."""
    settings: Any = jax.config
    folder = settings.jax_compilation_cache_dir if settings.jax_enable_compilation_cache else None
    return Path(folder) if folder else None


def check_platform() -> None:
    """Start JAX's backends.

    Raises:
      ConfigError: ``JAX_PLATFORMS`` asks for one that does not start here.
    """
    try:
        jax.devices()
    except Exception as error:  # RuntimeError, or AssertionError where a plugin is missing
        asked = jax.config.jax_platforms  # type: ignore[attr-defined]
        if not asked:
            raise
        jax.config.update("jax_platforms", "")
        there = sorted({"cpu", *(device.platform for device in jax.devices())})
        reason = " ".join(str(error).split()) or "its plugin is not installed"
        raise ConfigError(
            f"JAX_PLATFORMS: {asked!r} does not start here ({reason}); accepted: {', '.join(there)}, or leave it out"
        ) from error


def connect(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Join the other processes of a run over several hosts; does nothing if no argument is given.

    Args:
      coordinator: HOST:PORT of process 0; ``auto`` if JAX finds the processes by itself (SLURM, TPU pods).
      processes: number of processes.
      process: number of this process, from 0.

    Raises:
      ConfigError: one of the three is missing, or the other processes cannot be reached.
    """
    if coordinator is None and processes is None and process is None:
        return
    missing = [processes, process].count(None)
    if coordinator is None or missing != (2 if coordinator == "auto" else 0):
        raise ConfigError(
            "--coordinator: --coordinator, --processes and --process belong together; "
            "accepted: all three, or --coordinator auto alone"
        )
    host, _, port = coordinator.rpartition(":")
    if coordinator != "auto" and not (host and re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 2**16):
        raise ConfigError(f"--coordinator: {coordinator!r} is not an address; accepted: HOST:PORT, or auto")
    if processes is not None and processes < 1:
        raise ConfigError(f"--processes: {processes} is out of range; accepted: at least 1")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ConfigError(f"--process: {process} of {processes} processes; accepted: 0 to {processes - 1}")
    address = () if coordinator == "auto" else (coordinator, processes, process)
    try:
        if coordinator != "auto":  # JAX crashes if there is no such host or its port is in use
            socket.getaddrinfo(host.strip("[]"), port)
            if process == 0:
                socket.create_server(("", int(port))).close()
        keep_output_to_python()
        # The others wait while the first process evaluates and writes.
        jax.distributed.initialize(*address, shutdown_timeout_seconds=24 * 3600)  # type: ignore[misc]
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        accepted = "SLURM or a TPU pod" if coordinator == "auto" else "HOST:PORT that process 0 can open"
        raise ConfigError(f"--coordinator: {coordinator} cannot be joined ({reason}); accepted: {accepted}") from error


def keep_output_to_python() -> None:
    """Let only Python write to standard output: Gloo prints a line there for each group of processes."""
    if sys.stdout is None:  # it is closed
        return
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    sys.stdout = own


def is_one_of_several() -> bool:
    """Whether this process has joined others (``connect``)."""
    return bool(jax.distributed.is_initialized())


def leave(code: int) -> None:
    """End this process at once with an exit code; a normal end would wait for the other processes."""
    sys.stderr.flush()
    os._exit(code)


def is_first_process() -> bool:
    """Whether this process writes and prints."""
    return jax.process_index() == 0


def memory_limit(mesh: Mesh) -> int:
    """Return the bytes that one program may use on each device of the mesh, the smallest over all hosts.

    CPU devices share the machine's memory.
    """
    stats = mesh.local_devices[0].memory_stats() or {}
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(mesh.local_devices)
    limit = int(stats.get("bytes_limit", machine) * MEMORY_SHARE)
    return min(from_all(limit))


def from_all(number: int) -> list[int]:
    """Return the numbers, below 2^62, that all processes call this with, in the order of processes."""
    if jax.process_count() == 1:
        return [number]
    halves = multihost_utils.process_allgather(np.array([number >> 31, number & (2**31 - 1)], np.int32))
    return [(int(high) << 31) + int(low) for high, low in halves]


def from_first(x: Tree) -> Tree:
    """Return the first process's value in all processes."""
    return multihost_utils.broadcast_one_to_all(x) if jax.process_count() > 1 else x


def program_memory(program: jax.stages.Compiled) -> int:
    """Return the bytes of a program on one device by its compiler: arguments + outputs + temporaries - aliased."""
    sizes: Any = program.memory_analysis()
    total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes
    return int(total - sizes.alias_size_in_bytes)
