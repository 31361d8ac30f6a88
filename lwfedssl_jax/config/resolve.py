"""From a config as written to one that is complete and checked: overrides, named sizes, rules between fields."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from lwfedssl_jax.config.device_classes import DeviceClass, describe, load_classes
from lwfedssl_jax.config.sections import MODELS, Config, ResNetSize, check_fields, to_dict
from lwfedssl_jax.system.errors import ConfigError

Entry = TypeVar("Entry")


def choose(field: str, name: str, entries: Mapping[str, Entry]) -> Entry:
    """The entry that a field names.

    Raises:
      ConfigError: there is none of that name.
    """
    if name not in entries:
        raise ConfigError(f"{field}: unknown {name!r}; accepted: {', '.join(entries)}")
    return entries[name]


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """``config`` with ``{"section.field": value}`` replaced; not validated beyond the names.

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
    """Validate ``config``, fill in the named model's sizes, and put a CSV file's device classes in its place.

    Raises:
      ConfigError: a value is of the wrong type, outside its range or choices, or does
        not fit another field.
    """
    check_fields(config)
    size = MODELS[config.model.name]._asdict()
    for name, unset in (("patch_size", 0), ("heads", 0), ("stem", "auto")):
        if name not in size and (value := getattr(config.model, name)) != unset:
            raise ConfigError(f"model.{name}: {config.model.name} has none, found {value!r}; accepted: leave it out")
    given = {k: getattr(config.model, k) for k in size}
    chosen = {k: default if given[k] in (0, "auto") else given[k] for k, default in size.items()}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **chosen))
    devices = tuple(map(describe, device_classes(config)))
    config = dataclasses.replace(config, fleet=dataclasses.replace(config.fleet, devices=devices))
    _check_together(config)
    return config


def device_classes(config: Config) -> list[DeviceClass]:
    """What ``fleet.devices`` describes.

    Raises:
      ConfigError: it does not, or the CSV file it names does not.
    """
    try:
        return load_classes(config.fleet.devices)
    except ValueError as error:
        raise ConfigError(f"fleet.devices: {error}") from None


def digest(config: Config, code: str = "") -> str:
    """Eight hexadecimal digits that name a config, and the ``code`` that its run depends on besides (``WorkDir``)."""
    return hashlib.sha256((json.dumps(to_dict(config)) + code).encode()).hexdigest()[:8]


def _check_together(config: Config) -> None:
    data, model = config.data, config.model
    if isinstance(MODELS[model.name], ResNetSize):
        if model.depth > MODELS[model.name].depth:
            raise ConfigError(f"model.depth: {model.depth} is more than {model.name} has; accepted: 1 to 4")
    elif data.image_size % model.patch_size:
        raise ConfigError(
            f"model.patch_size: {model.patch_size} does not divide data.image_size {data.image_size}; "
            f"accepted: one of {', '.join(map(str, divisors(data.image_size)))}"
        )
    elif model.width % model.heads:
        raise ConfigError(
            f"model.heads: {model.heads} does not divide model.width {model.width}; "
            f"accepted: one of {', '.join(map(str, divisors(model.width)))}"
        )
    if data.name == "synthetic" and data.synthetic_examples < data.synthetic_classes:
        raise ConfigError(
            f"data.synthetic_examples: {data.synthetic_examples} cannot show all classes; "
            f"accepted: at least data.synthetic_classes {data.synthetic_classes}"
        )
    if config.strategy.layers_per_stage > model.depth:
        raise ConfigError(
            f"strategy.layers_per_stage: {config.strategy.layers_per_stage} is more than the encoder has; "
            f"accepted: 1 to model.depth {model.depth}"
        )
    if config.federation.clients_per_round > config.partition.clients:
        raise ConfigError(
            f"federation.clients_per_round: {config.federation.clients_per_round} is more than the "
            f"population; accepted: 0 to partition.clients {config.partition.clients}"
        )
    deadline, slow = config.fleet.deadline_seconds, [d.name for d in device_classes(config) if not d.has_speed]
    if deadline and (slow or not config.fleet.devices):
        found = f"{slow[0]!r} has not" if slow else "there is none"
        raise ConfigError(
            f"fleet.deadline_seconds: {deadline} needs classes in fleet.devices with gflops, uplink_mbps and "
            f"downlink_mbps, and {found}; accepted: 0.0, or classes that say them"
        )
    judge = config.evaluation
    if not (judge.labels_per_class or judge.neighbours or judge.fine_tune_epochs):
        raise ConfigError(
            "evaluation: no protocol is left; accepted: labels_per_class, neighbours or fine_tune_epochs above 0"
        )
    if 0 < judge.fine_tune_epochs <= judge.fine_tune_warmup_epochs:
        raise ConfigError(
            f"evaluation.fine_tune_warmup_epochs: {judge.fine_tune_warmup_epochs} leaves none of "
            f"evaluation.fine_tune_epochs {judge.fine_tune_epochs}; accepted: 0 to {judge.fine_tune_epochs - 1}"
        )


def divisors(n: int) -> list[int]:
    """In order, 1 and ``n`` among them."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
