"""Config files: finding, running and listing them."""

import ast
import csv
import difflib
import hashlib
import os.path
import sys
import sysconfig
import types
from pathlib import Path

from lwfedssl_jax.config.checked import checked
from lwfedssl_jax.config.sections import Config
from lwfedssl_jax.system.errors import ConfigError
from lwfedssl_jax.system.files import with_home

# In a checkout, the named configs are next to the package; in a wheel, inside it.
CONFIG_DIR = next(
    (d for d in (Path(__file__).parents[2] / "configs", Path(__file__).parents[1] / "configs") if d.is_dir()),
    Path("configs"),
)

PACKAGE = Path(__file__).parents[1]
SWEEPS = "sweeps"  # the folder of sweeps in it
REPLACED = "replaced.csv"  # the table of removed configs, and of the options that give the same runs


def load(name: str, config_dir: Path = CONFIG_DIR) -> Config:
    """Load the ``config`` object of ``config_dir/NAME.py``, or of the Python file ``name``; it is not yet resolved.

    Raises:
      ConfigError: there is no such config, the file does not run or does not define ``config``, or a value has the
        wrong type, is out of range or not among its choices.
    """
    path = find_file(name) if name.endswith(".py") else config_dir / f"{name}.py"
    known, sweep = [n for n, _ in available(config_dir)], name.removeprefix(f"{SWEEPS}/")
    if f"{SWEEPS}/{sweep}" in known and (name != sweep or name not in known):
        raise ConfigError(f"CONFIG: {name} is a sweep; accepted: a config's name (`sweep {sweep}` runs the sweep)")
    if not os.path.isfile(path) or not (name.endswith(".py") or name in known):
        check_not_replaced(name, config_dir)
        if name.endswith(".py"):
            raise ConfigError(f"CONFIG: {name} does not exist; accepted: the path of a .py file, or a name of `list`")
        close = difflib.get_close_matches(name, known, n=3)
        names = f", such as {', '.join(close)}" if close else ""
        raise ConfigError(
            f"CONFIG: {name!r} is not a config; accepted: a name of `list`{names}, or the path of a .py file"
        )
    config = getattr(run_file(path, "CONFIG", "config"), "config", None)
    if not isinstance(config, Config):
        found = f"found {type(config).__name__}; accepted: `config = Config(...)`"
        raise ConfigError(f"CONFIG: {path} does not define `config`, {found}")
    return checked(config)  # before options override them: the parser trusts their types


def named(name: str, config_dir: Path = CONFIG_DIR) -> str:
    """Return the name of a config whose file is given, ``quickstart`` for ``configs/quickstart.py``, if it has one."""
    path = Path(os.path.realpath(name)) if name.endswith(".py") else None
    if path and path.is_relative_to(config_dir.resolve()):
        return path.relative_to(config_dir.resolve()).with_suffix("").as_posix()
    return name


def check_not_replaced(name: str, config_dir: Path) -> None:
    """Refuse the name, or the path, of a config that was removed.

    Raises:
      ConfigError: ``config_dir/replaced.csv`` says what replaces it.
    """
    table = config_dir / REPLACED
    for row in csv.DictReader(table.read_text(encoding="utf-8").splitlines() if table.is_file() else ()):
        if f"/{name}".removesuffix(".py").endswith(f"/{row['removed']}"):
            raise ConfigError(f"CONFIG: {name} was replaced; accepted: {row['instead']}, or the sweep {row['sweep']}")


class UserFiles:
    """The user's own Python files that run as configs and sweeps, as scripts would: their own folder is searched first.

    Attributes:
      running: files that run now, each one loaded by the file before it.
      parts: of each file that has run, the user's other files that it imported or loaded.
    """

    def __init__(self) -> None:
        self.running: list[Path] = []
        self.parts: dict[Path, set[Path]] = {}
        self._imported: list[str] = []

    def run(self, path: Path) -> types.ModuleType:
        """Run a file as a module."""
        name = f"lwfedssl_config_{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:8]}"
        module = sys.modules[name] = types.ModuleType(name)  # where dataclasses look their annotations up
        module.__file__ = str(path)
        folder = str(path.parent.absolute())
        if not self.running:  # neighbours may have changed, and those of another folder may have the same names
            for name in self._imported:
                sys.modules.pop(name, None)
            self._imported.clear()
        before, bytecode = set(sys.modules), sys.dont_write_bytecode
        _search_first(folder)  # it stays, for imports when it trains
        sys.dont_write_bytecode = True  # a __pycache__ may be older than a file by less than its clock tells
        self.running.append(path)
        parts = self.parts[path.absolute()] = set()
        try:
            exec(compile(path.read_bytes(), path, "exec"), vars(module))
        finally:
            self.running.pop()
            sys.dont_write_bytecode = bytecode
            new = {name: file for name in set(sys.modules) - before if (file := _own_file(sys.modules[name], folder))}
            self._imported += new
            parts |= set(new.values())
            if self.running:
                outer = self.running[-1].absolute()
                if not path.resolve().is_relative_to(CONFIG_DIR.resolve()):  # it is the user's, too
                    self.parts[outer] |= parts | {path.absolute()}
                if str(outer.parent) != folder:  # whose files may have the same names
                    _search_first(str(outer.parent))
                    for name in new:
                        sys.modules.pop(name, None)
        return module

    def code(self, path: Path) -> bytes:
        """The text of a file that has run, and of the user's other files that it imported or loaded."""
        folder = path.absolute().parent
        parts = sorted(self.parts.get(path.absolute(), ()), key=lambda file: os.path.relpath(file, folder))
        return b"".join(file.read_bytes() for file in [path, *parts])


def _search_first(folder: str) -> None:
    sys.path[:] = [folder, *(entry for entry in sys.path if entry != folder)]


def _own_file(module: types.ModuleType, folder: str) -> Path | None:
    """The file of a module that a user wrote next to a config, and did not install."""
    file = Path(getattr(module, "__file__", None) or os.devnull)
    places = (PACKAGE, sysconfig.get_path("stdlib"))
    installed = {"site-packages", "dist-packages"} & set(file.parts) or any(file.is_relative_to(p) for p in places)
    return file if file.is_relative_to(folder) and not installed else None


USER_FILES = UserFiles()


def find_file(name: str) -> Path:
    """Return the path of a user's file: next to the config that names it, or else from the working directory."""
    path = with_home(name)
    beside = USER_FILES.running[-1].parent / path if USER_FILES.running else path
    return beside if os.path.isfile(beside) else path


def code_of(name: str, config_dir: Path = CONFIG_DIR) -> bytes:
    """Return what a run depends on besides its config: the text of the user's own file, and of those that it imports.

    Args:
      name: of a config, or its file, that has been loaded.
      config_dir: of the named configs, whose text does not count.
    """
    return USER_FILES.code(with_home(name)) if named(name, config_dir).endswith(".py") else b""


def code_digest(name: str) -> str:
    """Return the hash of ``code_of``, as work directories have it; empty for a named config."""
    text = code_of(name)
    return hashlib.sha256(text).hexdigest() if text else ""


def run_file(path: Path, argument: str, what: str) -> types.ModuleType:
    """Run a Python file, which should define ``what``, as a module.

    Raises:
      ConfigError: it does not run.
    """
    try:
        return USER_FILES.run(path)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's own file: anything that it raises is bad input
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"{argument}: {path} does not run ({why}); accepted: a file that defines `{what}`") from error


def available(config_dir: Path = CONFIG_DIR) -> list[tuple[str, str]]:
    """``(name, first line of its docstring)`` of every config, and of every sweep, under ``config_dir``."""
    return [
        (
            path.relative_to(config_dir).with_suffix("").as_posix(),
            (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0],
        )
        for path in sorted(config_dir.rglob("*.py"))
    ]
