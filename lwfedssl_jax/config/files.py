"""Config files: finding, running and listing them."""

import ast
import csv
import difflib
import os.path
import types
from pathlib import Path

from lwfedssl_jax.config.sections import Config, check_fields
from lwfedssl_jax.system.errors import ConfigError

# In a checkout, the named configs are next to the package; in a wheel, inside it.
CONFIG_DIR = next(
    (d for d in (Path(__file__).parents[2] / "configs", Path(__file__).parents[1] / "configs") if d.is_dir()),
    Path("configs"),
)

SWEEPS = "sweeps"  # the folder of sweeps in it
REPLACED = "replaced.csv"  # the table of removed configs, and of the options that give the same runs


def load(name: str, config_dir: Path = CONFIG_DIR) -> Config:
    """Load the ``config`` object of ``config_dir/NAME.py``, or of the Python file ``name``; it is not yet resolved.

    Raises:
      ConfigError: there is no such config, the file does not run or does not define ``config``, or a value has the
        wrong type, is out of range or not among its choices.
    """
    path = Path(name) if name.endswith(".py") else config_dir / f"{name}.py"
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
    check_fields(config)  # before options override them: the parser trusts their types
    return config


def check_not_replaced(name: str, config_dir: Path) -> None:
    """Refuse the name, or the path, of a config that was removed.

    Raises:
      ConfigError: ``config_dir/replaced.csv`` says what replaces it.
    """
    table = config_dir / REPLACED
    for row in csv.DictReader(table.read_text(encoding="utf-8").splitlines() if table.is_file() else ()):
        if f"/{name}".removesuffix(".py").endswith(f"/{row['removed']}"):
            raise ConfigError(f"CONFIG: {name} was replaced; accepted: {row['instead']}, or the sweep {row['sweep']}")


def run_file(path: Path, argument: str, what: str) -> types.ModuleType:
    """Run a Python file, which should define ``what``, as a module.

    Raises:
      ConfigError: it does not run.
    """
    module = types.ModuleType("lwfedssl_config")
    module.__file__ = str(path)
    try:  # not by import, which would write and use a __pycache__
        exec(compile(path.read_bytes(), path, "exec"), vars(module))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's own file: anything that it raises is bad input
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"{argument}: {path} does not run ({why}); accepted: a file that defines `{what}`") from error
    return module


def available(config_dir: Path = CONFIG_DIR) -> list[tuple[str, str]]:
    """``(name, first line of its docstring)`` of every config, and of every sweep, under ``config_dir``."""
    return [
        (
            path.relative_to(config_dir).with_suffix("").as_posix(),
            (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0],
        )
        for path in sorted(config_dir.rglob("*.py"))
    ]
