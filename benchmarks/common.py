"""What the benchmarks share: interleaved timing, a table on the screen, a JSON beside it."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout needs no installation

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def arguments(doc: str, **extra: dict[str, Any]) -> argparse.Namespace:
    """Parse the command line: ``--repeats``, ``--cores`` (the process is pinned to so many), and what is given."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side, interleaved")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="CPU cores all sides may use")
    for name, options in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    return options


def interleave(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, run in turn A B C A B C ..., after one run each that is not counted.

    Every side must wait for its own results.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            if repeat:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(a: list[float], b: list[float]) -> float:
    """Median of the ratios a / b, pair by pair: a machine that slows down slows both."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def publish(name: str, title: str, rows: list[dict[str, Any]], **details: Any) -> None:
    """Print ``rows`` as a table and write them to ``results/NAME.json``."""
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right", overflow="fold")
    for row in rows:
        table.add_row(*(f"{v:,.4g}" if isinstance(v, float) else str(v) for v in row.values()))
    Console(width=160).print(table)
    if details:
        Console(width=160).print(details)
    RESULTS.mkdir(exist_ok=True)
    content = {
        "title": title,
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": processor(),
            "cores used": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            **{package: version(package) for package in ("jax", "flax", "torch", "flwr")},
        },
        "rows": rows,
        **details,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def processor() -> str:
    """The processor's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def version(package: str) -> str | None:
    """A package's version, None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
