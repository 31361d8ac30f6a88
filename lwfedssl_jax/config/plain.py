"""Configs as plain data: to JSON and back, and the digest that names a run's directory."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lwfedssl_jax.config.flat import flat
from lwfedssl_jax.config.model_sizes import MODELS
from lwfedssl_jax.config.sections import Config, ModelConfig

INERT_FIELDS = ("runtime.trackers",)  # they do not affect results: a run may continue with other values


def to_dict(config: Config) -> dict[str, Any]:
    """Return the config as nested plain data that survives a round trip through JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(sections: Mapping[str, Any]) -> Config:
    """Rebuild a config from the result of ``to_dict``, of this version or another; values are not checked.

    Missing fields get today's defaults, and missing sizes those of the named model, since the data may be older than a
    field. Fields that no longer exist are left out.

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
    """Replace sizes of 0 or auto by those of the named model; return ``model`` unchanged if there is no such name."""
    size = MODELS.get(model.name) if isinstance(model.name, str) else None
    sizes = dataclasses.asdict(size) if size else {}
    unset = {name: value for name, value in sizes.items() if getattr(model, name, None) in (0, "auto")}
    return dataclasses.replace(model, **unset)


def digest(config: Config, code: str = "") -> str:
    """Hash a config, and the ``code`` that its run also depends on (``WorkDir``), to eight hexadecimal digits.

    Fields at their default are left out, as are sizes that are the named model's own and ``INERT_FIELDS``: a
    field that a later version adds does not change the digests of configs that leave it at its default.
    """
    usual = flat(to_dict(from_dict({"model": {"name": config.model.name}})))
    fields = flat(to_dict(dataclasses.replace(config, model=fill_sizes(config.model))))
    changes = {k: v for k, v in fields.items() if k not in INERT_FIELDS and (k == "model.name" or v != usual[k])}
    return hashlib.sha256((json.dumps(changes, sort_keys=True) + code).encode()).hexdigest()[:8]
