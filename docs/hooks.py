"""Fills ``<!-- config fields -->`` of reference/config.md with tables made from the config's dataclasses."""

import ast
import dataclasses
import inspect
import itertools
import re
import sys
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

sys.path.insert(0, str(Path(__file__).parent.parent))  # the package of this checkout, installed or not

from lwfedssl_jax.config import Config

PAGE, MARKER = "reference/config.md", "<!-- config fields -->"
LARGEST_INTEGER = 2**31 - 1  # every whole number is at most this; the page states it once
TYPES = {int: "whole number", float: "number", bool: "`True` or `False`", str: "text"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """MkDocs calls this for every page."""
    if page.file.src_uri != PAGE:
        return markdown
    if MARKER not in markdown:
        raise ValueError(f"{PAGE} does not contain {MARKER}")
    hints = typing.get_type_hints(Config)
    return markdown.replace(MARKER, "\n".join(section(f.name, hints[f.name]) for f in dataclasses.fields(Config)))


def section(name: str, kind: type) -> str:
    """A heading, the section's docstring, and a table with one row per field."""
    hints, texts = typing.get_type_hints(kind, include_extras=True), field_docstrings(kind)
    rows = [
        f"| `{name}.{field.name}` | {accepted(hints[field.name])} | `{default(field)}` | {escape(texts[field.name])} |"
        for field in dataclasses.fields(kind)
    ]
    head = ["| field | accepted | default | meaning |", "|---|---|---|---|"]
    return "\n".join([f"## {name}", "", escape(inspect.getdoc(kind) or ""), "", *head, *rows, ""])


def field_docstrings(kind: type) -> dict[str, str]:
    """The string below each field, which is also its help text on the command line."""
    module = ast.parse(inspect.getsource(inspect.getmodule(kind) or types.ModuleType("")))
    (body,) = [node.body for node in module.body if isinstance(node, ast.ClassDef) and node.name == kind.__name__]
    found = {}
    for node, below in itertools.pairwise(body):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(below, ast.Expr):
            found[node.target.id] = inspect.cleandoc(ast.literal_eval(below.value))
    return found


def accepted(hint: Any) -> str:
    """A field's type and bounds in words."""
    if get_origin(hint) is Annotated:
        kind, *bounds = get_args(hint)
        text = ", ".join([accepted(kind), *map(str, bounds)])
        return text.removesuffix(f" and at most {LARGEST_INTEGER}")
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is tuple:
        return f"any number of: {accepted(get_args(hint)[0])}"
    return TYPES.get(hint) or escape(getattr(hint, "__name__", str(hint)))


def default(field: "dataclasses.Field[Any]") -> str:
    """A field's default as Python writes it."""
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    return repr(made).replace("|", "\\|")


def escape(text: str) -> str:
    """One line of Markdown that shows the text as it is, except for its code spans."""
    parts = re.split(r"(`+[^`]+`+)", " ".join(text.split()))
    plain = [
        part if part.startswith("`") else re.sub(r"([\\*_\[\]{}#])", r"\\\1", part.replace("<", "&lt;"))
        for part in parts
    ]
    return "".join(plain).replace("|", "\\|")
