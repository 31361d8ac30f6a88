"""The values of a config's fields: written one way, and refused if they are not valid."""

import dataclasses
import typing
from typing import Any

from lwfedssl_jax.config.fields import check_value, plain_value
from lwfedssl_jax.config.sections import Config
from lwfedssl_jax.system.errors import ConfigError

DATA_NAMES = ("data.name", "evaluation.data")
IN_FILES = ("folder", "npz", "fashion_mnist")  # data sets that are named by a path


def checked(config: Config) -> Config:
    """Return the config with each value in its usual form: Python's numbers, tuples, short paths.

    Raises:
      ConfigError: a value is of the wrong type, out of range, or not among the choices of its field; the message names
        the field, the value and what is accepted.
    """
    for section in dataclasses.fields(config):
        values, expected = getattr(config, section.name), typing.get_type_hints(Config)[section.name].__name__
        if not dataclasses.is_dataclass(values) or isinstance(values, type) or type(values).__name__ != expected:
            raise ConfigError(f"{section.name}: {values!r} is not valid; accepted: {expected}(...)")
        changes: dict[str, Any] = {}
        for field, hint in typing.get_type_hints(type(values), include_extras=True).items():
            name, value = f"{section.name}.{field}", plain_value(getattr(values, field), hint)
            check_value(name, value, hint)
            if name in DATA_NAMES:
                value = short_path(value) if isinstance(value, str) else tuple(map(short_path, value))
            changes[field] = value
        replaced: Any = {section.name: dataclasses.replace(values, **changes)}
        config = dataclasses.replace(config, **replaced)
    return config


def short_path(name: str) -> str:
    """Return the name of a data set with its path in the shortest form: ``folder:./data/`` as ``folder:data``."""
    kind, _, path = name.partition(":")
    if kind not in IN_FILES or not path:
        return name
    parts = [part for part in path.split("/") if part not in ("", ".")]  # ".." may lead elsewhere, from a link
    return f"{kind}:{'/' * path.startswith('/')}{'/'.join(parts) or '.' * (not path.startswith('/'))}"
