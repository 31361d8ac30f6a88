"""Imports go one way."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lwfedssl_jax"

# Each module may import those of the lines above it, and nothing of the package besides.
ORDER = [
    ["fleet"],
    ["config", "interrupts"],
    ["tree", "errors", "results", "trackers"],
    ["augment", "data.cache", "data.partition", "models.dense", "models.encoder", "objectives", "packing", "devices"],
    ["models.vit", "models.resnet", "models.heads", "data.feed", "data.files", "data.tfds"],
    ["stages", "additions", "data.sources"],
    ["client"],
    ["aggregation", "calibration", "fedca", "starts", "traffic"],
    ["checks"],
    ["rounds", "evaluate", "resources"],
    ["finetune", "checkpoint", "export", "report"],
    ["workdir", "comparison"],
    ["tables", "plan"],
    ["figures"],
    ["page"],
    ["simulate"],
    ["tracking"],
    ["experiment", "sweep"],
    ["progress", "workers"],
    ["cli"],
    ["library"],
]
HEAVY = ("tensorflow_datasets", "matplotlib", "orbax", "pandas", "scipy", "jinja2", "wandb", "tensorboardX")
MODULES = [module for line in ORDER for module in line]


def imports_of(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lwfedssl_jax"):
            inner = (node.module or "").removeprefix("lwfedssl_jax").removeprefix(".")
            for alias in node.names:
                full = f"{inner}.{alias.name}".removeprefix(".")
                found.add(full if full in MODULES else inner)
    return found - {""}


def test_every_module_has_its_place() -> None:
    files = {p.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for p in PACKAGE.rglob("*.py")}
    assert {f for f in files if not f.endswith("__init__")} == set(MODULES)


@pytest.mark.parametrize("line", range(len(ORDER)))
def test_imports_go_downwards(line: int) -> None:
    below = {module for earlier in ORDER[:line] for module in earlier}
    for module in ORDER[line]:
        assert imports_of(module) <= below, module


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    for file in PACKAGE.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] in HEAVY for n in names), file
