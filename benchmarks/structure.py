"""The shape of the code in numbers, to compare two checkouts by.

    python benchmarks/structure.py              # this checkout
    python benchmarks/structure.py ../before    # another one

Of the package ``lwfedssl_jax``, except for the last three rows. A body's lines are counted without its docstring,
arguments with ``self``, and nesting is of compound statements inside a function.
"""

import argparse
import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
COMPOUND = (ast.If, ast.For, ast.While, ast.With, ast.Try, ast.Match)
PHRASES = (
    r"has not\b", r"have not [a-z]+s\b", r"is no (directory|file|folder|number|address)", r"but for", r"so many\b",
    r"(labels|layers|examples|images|bytes|seconds|steps) an? (class|stage|client|round|sample|call)\b",
    r"stands there", r"as told", r"is said and",
)  # fmt: skip


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def body_lines(function: Function) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]


def arguments(function: Function) -> int:
    a = function.args
    return len(a.posonlyargs + a.args + a.kwonlyargs) + bool(a.vararg) + bool(a.kwarg)


def nesting(node: ast.AST) -> int:
    """The deepest compound statement below a node; inner functions count on their own, an ``elif`` as its ``if``."""
    deepest = 0
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, Function | ast.ClassDef | ast.Lambda):
                continue
            is_elif = isinstance(node, ast.If) and field == "orelse" and isinstance(child, ast.If) and len(value) == 1
            deepest = max(deepest, nesting(child) + (isinstance(child, COMPOUND) and not is_elif))
    return deepest


def inner_imports(tree: ast.AST) -> int:
    return sum(isinstance(node, ast.Import | ast.ImportFrom) for f in outer_functions(tree) for node in ast.walk(f))


def outer_functions(tree: ast.AST) -> Iterator[Function]:
    inner = {id(node) for f in functions(tree) for node in ast.walk(f) if node is not f}
    return (f for f in functions(tree) if id(f) not in inner)


def assigned_lambdas(tree: ast.AST) -> int:
    return sum(isinstance(n, ast.Assign | ast.AnnAssign) and isinstance(n.value, ast.Lambda) for n in ast.walk(tree))


def top_names(tree: ast.Module) -> set[str]:
    """Functions, classes and constants that a module defines, except for private ones."""
    names = {node.name for node in tree.body if isinstance(node, Function | ast.ClassDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names |= {n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def measure(root: Path) -> dict[str, object]:
    files = sorted((root / "lwfedssl_jax").rglob("*.py"))
    trees = {file: ast.parse(file.read_text()) for file in files}
    lengths = {file: len(file.read_text().splitlines()) for file in files}
    found = [(file, f) for file, tree in trees.items() for f in functions(tree)]
    defined = Counter(name for tree in trees.values() for name in top_names(tree))
    largest = max(files, key=lengths.__getitem__)
    texts = [*files, *(root / "docs").rglob("*.md"), *(root / "configs").rglob("*.py"), root / "README.md"]
    phrases = sum(len(re.findall("|".join(PHRASES), text.read_text())) for text in texts if text.is_file())
    top = [p for p in (root / "lwfedssl_jax").iterdir() if p.is_file() and p.suffix in (".py", ".typed", ".j2")]
    return {
        "modules, lines": f"{len(files)}, {sum(lengths.values())}",
        "largest module, lines": f"{lengths[largest]} ({largest.relative_to(root / 'lwfedssl_jax')})",
        "functions with a body over 40 lines": sum(body_lines(f) > 40 for _, f in found),
        "functions with over 6 arguments": sum(arguments(f) > 6 for _, f in found),
        "functions with nesting of 4 or more": sum(nesting(f) >= 4 for _, f in found),
        "imports inside functions": sum(inner_imports(tree) for tree in trees.values()),
        "names defined at the top of two modules or more": sum(count > 1 for count in defined.values()),
        "assigned lambdas": sum(assigned_lambdas(tree) for tree in trees.values()),
        "files at the package's top": len(top),
        "files in configs/paper": len(list((root / "configs" / "paper").glob("*.py"))),
        "lines of README.md": len((root / "README.md").read_text().splitlines()),
        "stumbling phrases in code, configs, README and docs": phrases,
    }


def details(root: Path) -> Iterator[str]:
    """Where the functions, imports, names and lambdas are that the table counts."""
    names: dict[str, list[str]] = {}
    for file in sorted((root / "lwfedssl_jax").rglob("*.py")):
        tree, place = ast.parse(file.read_text()), file.relative_to(root / "lwfedssl_jax")
        for name in top_names(tree):
            names.setdefault(name, []).append(str(place))
        for f in functions(tree):
            if body_lines(f) > 40 or arguments(f) > 6 or nesting(f) >= 4:
                counts = f"body {body_lines(f)}, arguments {arguments(f)}, nesting {nesting(f)}"
                yield f"{place}:{f.lineno} {f.name}: {counts}"
        if count := inner_imports(tree):
            yield f"{place}: {count} imports inside functions"
        if count := assigned_lambdas(tree):
            yield f"{place}: {count} assigned lambdas"
        for number, line in enumerate(file.read_text().splitlines(), 1):
            if re.search("|".join(PHRASES), line):
                yield f"{place}:{number} {line.strip()}"
    yield from (f"{name}: {', '.join(places)}" for name, places in sorted(names.items()) if len(places) > 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", nargs="?", type=Path, default=Path(__file__).parent.parent)
    parser.add_argument("--details", action="store_true", help="where they are")
    options = parser.parse_args()
    for name, value in measure(options.checkout).items():
        print(f"{name:55} {value}")
    if options.details:
        print(*details(options.checkout), sep="\n")


if __name__ == "__main__":
    main()
