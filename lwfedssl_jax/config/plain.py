"""Configs as plain data: to JSON and back, and the digest that names a run's directory."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lwfedssl_jax.config.flat import flat
from lwfedssl_jax.config.model_sizes import MODELS
from lwfedssl_jax.config.sections import Config, ModelConfig

INERT_FIELDS = ("runtime.trackers",)  # they do not change a run, which may continue with other values


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain data, equal to what JSON gives back."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(sections: Mapping[str, Any]) -> Config:
    """The config that ``to_dict`` made plain, in this version or another; values are not checked.

    Fields that it lacks have today's default, sizes those of the named model: it may be older than a field. Fields
    that do not exist today are left out.

    Raises:
      TypeError: the config or a section is not a mapping.
    """
    values: dict[str, Any] = {}
    for section in dataclasses.fields(Config):
        stored = sections.get(section.name, {}) if isinstance(sections, Mapping) else None
        if not isinstance(stored, Mapping):
            raise TypeError(f"{section.name} is not a section of a config")
        default = getattr(Config(), section.name)
        known = {name: stored[name] for name in default.__dataclass_fields__ if name in stored}
        values[section.name] = dataclasses.replace(
            default, **{name: tuple(value) if isinstance(value, list) else value for name, value in known.items()}
        )
    config = Config(**values)
    return dataclasses.replace(config, model=fill_sizes(config.model))


def fill_sizes(model: ModelConfig) -> ModelConfig:
    """``model`` with the named model's sizes where it has 0 or auto; as it is if there is no such name."""
    size = MODELS.get(model.name) if isinstance(model.name, str) else None
    sizes = dataclasses.asdict(size) if size else {}
    unset = {name: value for name, value in sizes.items() if getattr(model, name, None) in (0, "auto")}
    return dataclasses.replace(model, **unset)


def digest(config: Config, code: str = "") -> str:
    """Eight hexadecimal digits that name a config and the ``code`` that its run also depends on (``WorkDir``).

    Fields at their default are left out, as are sizes that are the named model's own and ``INERT_FIELDS``: a
    field that a later version adds does not change the digests of configs that leave it at its default.
    """
    usual = flat(to_dict(from_dict({"model": {"name": config.model.name}})))
    fields = flat(to_dict(dataclasses.replace(config, model=fill_sizes(config.model))))
    changes = {k: v for k, v in fields.items() if k not in INERT_FIELDS and (k == "model.name" or v != usual[k])}
    return hashlib.sha256((json.dumps(changes, sort_keys=True) + code).encode()).hexdigest()[:8]
