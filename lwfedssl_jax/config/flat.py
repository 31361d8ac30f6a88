"""A config as one level of ``section.field`` names, as tables and trackers show it."""

from collections.abc import Mapping
from typing import Any


def flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """``{"section.field": value}`` of a config as ``to_dict`` or ``config.json`` gives it.

    Raises:
      AttributeError: a section is not a mapping.
    """
    return {f"{section}.{name}": value for section, fields in sections.items() for name, value in fields.items()}


def join_lists(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The same fields, each list or tuple as one text with spaces between its values."""
    return {k: " ".join(map(str, v)) if isinstance(v, list | tuple) else v for k, v in fields.items()}
