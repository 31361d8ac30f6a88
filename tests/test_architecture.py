"""The house: a room imports rooms of the lines above it, and inside a room imports form no circle."""

import ast
import graphlib
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "lwfedssl_jax"
ROOMS = [
    {"tree"},
    {"system"},
    {"config"},
    {"data", "models"},
    {"method"},
    {"costs"},
    {"simulation", "evaluation"},
    {"workdir"},
    {"analysis"},
    {"experiment"},
    {"sweep", "plan", "pilot"},
    {"cli", "api"},
    {"__main__"},
]
HEAVY = ("dp_accounting", "tensorflow_datasets", "matplotlib", "orbax", "scipy", "jinja2", "wandb", "tensorboardX")
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports_of(module: str) -> set[str]:
    """Modules of the package that a module imports, wherever in it; its version is the root's only name below."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lwfedssl_jax"):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module or "")
            if node.module == "lwfedssl_jax" and [alias.name for alias in node.names] == ["__version__"]:
                found.discard("lwfedssl_jax")
    return found - {module}


def test_every_room_has_its_place() -> None:
    assert {room(module) for module in MODULES} - {""} == set().union(*ROOMS)
    assert {test.parent.name for test in TESTS.glob("*/test_*.py")} == set().union(*ROOMS) - {"tree", "api", "__main__"}
    assert all(ast.get_docstring(ast.parse(path.read_text())) for path in MODULES.values())


@pytest.mark.parametrize("line", range(len(ROOMS)))
def test_rooms_import_rooms_above_them(line: int) -> None:
    above = set().union(*ROOMS[:line])
    for module in MODULES:
        if room(module) in ROOMS[line]:
            rooms = {room(imported) for imported in imports_of(module)} - {room(module)}
            assert rooms <= above, module


def test_imports_form_no_circle() -> None:
    faces = {module for module, path in MODULES.items() if path.name == "__init__.py"}  # they re-export
    graph = {module: imports_of(module) - faces for module in MODULES if module not in faces}
    graphlib.TopologicalSorter(graph).prepare()


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    for file in PACKAGE.rglob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(n.split(".")[0] in HEAVY for n in names), file


def test_text_files_are_utf8_whatever_the_locale() -> None:
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                keywords = {keyword.arg for keyword in node.keywords}
                values = [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mode")]
                modes = {a.value for a in values if isinstance(a, ast.Constant)} & {"r", "w", "a", "x", "r+", "w+"}
                is_text = name in ("read_text", "write_text") or (name in ("open", "fdopen") and modes)
                assert not is_text or "encoding" in keywords, f"{module}, line {node.lineno}"
