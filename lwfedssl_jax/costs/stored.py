"""Ledgers that are kept on disk, beside compiled programs, for the next command that needs them."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lwfedssl_jax.config import MODELS, Config, to_dict
from lwfedssl_jax.method.aggregation import AGGREGATORS
from lwfedssl_jax.method.objectives import OBJECTIVES
from lwfedssl_jax.method.programs import ledger_config
from lwfedssl_jax.method.stages import STRATEGIES
from lwfedssl_jax.method.terms import TERMS
from lwfedssl_jax.models import ARCHITECTURES
from lwfedssl_jax.system import devices
from lwfedssl_jax.system.files import can_write, write_whole

PACKAGE = "lwfedssl_jax"
LIBRARIES = ("jax", "jaxlib", "flax", "optax", "numpy")
TABLES = (MODELS, ARCHITECTURES, OBJECTIVES, STRATEGIES, AGGREGATORS, TERMS)


class ForeignCodeError(Exception):
    """An entry of a table is a user's own, whose changes would not be noticed."""


def read(config: Config) -> Any:
    """Return the ledger of a (resolved) config as it was written, or None."""
    try:
        file = ledger_file(config)
        return json.loads(file.read_bytes()) if file else None
    except (OSError, ValueError):
        return None


def write(config: Config, ledger: Any) -> None:
    """Keep the ledger of a (resolved) config, if there is a folder for it."""
    if (file := ledger_file(config)) and can_write(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(ledger).encode())


def ledger_file(config: Config) -> Path | None:
    """Return the file of a config's ledger, whose name changes with anything that it depends on; None for no file.

    Those are the fields that ``programs.ledger_config`` keeps, the entries of the tables, the code of this package, the
    libraries, the kind of device that programs are compiled for, and the compiler's flags.
    """
    folder = devices.cache_folder()
    try:
        entries = [describe(table) for table in TABLES]
    except ForeignCodeError:
        return None
    if not folder:
        return None
    device = jax.devices()[0]
    compiler = device.platform, device.device_kind, os.environ.get("XLA_FLAGS", ""), jnp.zeros(0, float).dtype.str
    about = [to_dict(ledger_config(config)), entries, code_digest(), versions(), compiler]
    return folder / "ledgers" / f"{hashlib.sha256(repr(about).encode()).hexdigest()[:32]}.json"


def describe(entry: Any) -> Any:
    """Describe an entry of a table by its plain values and by the names of the functions in it.

    Raises:
      ForeignCodeError: a function is not of this package.
    """
    if isinstance(entry, Mapping):
        return {str(name): describe(value) for name, value in entry.items()}
    if isinstance(entry, str | int | float | bool | None):
        return entry
    if callable(entry) and hasattr(entry, "__qualname__"):
        if entry.__module__.partition(".")[0] != PACKAGE:
            raise ForeignCodeError
        return f"{entry.__module__}.{entry.__qualname__}"
    if dataclasses.is_dataclass(entry):
        return type(entry).__name__, [describe(getattr(entry, field.name)) for field in dataclasses.fields(entry)]
    if isinstance(entry, Iterable):
        return type(entry).__name__, [describe(value) for value in entry]
    raise ForeignCodeError


@functools.cache
def code_digest() -> str:
    """Return a digest of this package's source files."""
    digest_of_all = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest_of_all.update(file.read_bytes())
    return digest_of_all.hexdigest()


@functools.cache
def versions() -> list[str]:
    """Return the versions of the libraries that ledgers depend on."""
    return [importlib.metadata.version(name) for name in LIBRARIES]
