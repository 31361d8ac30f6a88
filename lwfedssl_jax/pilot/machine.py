"""The machine that a device's process runs on: its memory, and the most that the process had."""

import contextlib
import os
import resource
import sys
from pathlib import Path


def memory_bytes() -> int:
    """Return the memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int:
    """Return the memory that this process can have: what it has and what is free, or its control group's limit.

    Where the system does not tell what is free, all of the machine's memory.
    """
    room = memory_bytes()
    with contextlib.suppress(OSError, ValueError, KeyError):
        kib = dict(line.split(":") for line in lines_of("/proc/meminfo"))
        own = dict(line.split(":", 1) for line in lines_of("/proc/self/status"))
        room = 1024 * (int(kib["MemAvailable"].split()[0]) + int(own["VmRSS"].split()[0]))
    with contextlib.suppress(OSError, ValueError):
        groups = [line.removeprefix("0::/") for line in lines_of("/proc/self/cgroup") if line.startswith("0::/")]
        for folder in [path for group in groups for path in (Path(group), *Path(group).parents)]:
            (limit,) = lines_of(f"/sys/fs/cgroup/{folder}/memory.max")
            room = room if limit == "max" else min(room, int(limit))
    return room


def lines_of(path: str) -> list[str]:
    """Return the lines of a file of the system."""
    return Path(path).read_text(encoding="utf-8").splitlines()


def peak_bytes() -> int:
    """Return the most memory that this process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else 1024 * int(peak)


def cores() -> int:
    """Return how many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
