"""Configs as flat dicts with ``section.field`` keys, as tables and trackers show them."""

from collections.abc import Mapping
from typing import Any


def flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return ``{"section.field": value}`` of a config in the form of ``to_dict`` or ``config.json``.

    Raises:
      AttributeError: a section is not a mapping.
    """
    return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}


def join_lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same fields with each list or tuple as one text, its values separated by spaces."""
    return {k: " ".join(map(str, v)) if isinstance(v, list | tuple) else v for k, v in fields.items()}
