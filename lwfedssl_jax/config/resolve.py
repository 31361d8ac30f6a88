"""Completes and checks a config: overrides, sizes of named models, rules between fields."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from lwfedssl_jax.config.checked import checked
from lwfedssl_jax.config.device_classes import DeviceClass, describe, load_classes
from lwfedssl_jax.config.model_sizes import MODELS
from lwfedssl_jax.config.plain import fill_sizes
from lwfedssl_jax.config.rules import RULES
from lwfedssl_jax.config.sections import Config
from lwfedssl_jax.system.errors import ConfigError

Entry = TypeVar("Entry")


def choose(field: str, name: str, entries: Mapping[str, Entry]) -> Entry:
    """Return the entry that a field names.

    Raises:
      ConfigError: there is no entry with that name.
    """
    if name not in entries:
        raise ConfigError(f"{field}: unknown {name!r}; accepted: {', '.join(entries)}")
    return entries[name]


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return ``config`` with ``{"section.field": value}`` replaced; only the names are validated.

    Raises:
      ConfigError: no such section or field.
    """
    for name, value in changes.items():
        section, _, field_name = name.partition(".")
        part: Any = getattr(config, section, None)
        if field_name not in getattr(part, "__dataclass_fields__", {}):
            raise ConfigError(f"{name}: no such field; accepted: section.field as `train --help` lists them")
        part = dataclasses.replace(part, **{field_name: value})
        replaced: Any = {section: part}
        config = dataclasses.replace(config, **replaced)
    return config


def resolve(config: Config) -> Config:
    """Validate ``config``, fill in the named model's sizes, and replace a CSV file by its device classes.

    Raises:
      ConfigError: a value is of the wrong type, outside its range or choices, or does
        not fit another field.
    """
    config = checked(config)
    choose("model.name", config.model.name, MODELS)
    devices = tuple(map(describe, device_classes(config)))
    fleet = dataclasses.replace(config.fleet, devices=devices)
    config = dataclasses.replace(config, model=fill_sizes(config.model), fleet=fleet)
    for rule in RULES:
        if message := rule(config):
            raise ConfigError(message)
    return config


def device_classes(config: Config) -> list[DeviceClass]:
    """Return the device classes of ``fleet.devices``.

    Raises:
      ConfigError: a description is not valid, or the CSV file cannot be read or is not valid.
    """
    try:
        return load_classes(config.fleet.devices)
    except ValueError as error:
        raise ConfigError(f"fleet.devices: {error}") from None
