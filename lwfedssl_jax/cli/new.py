"""The command ``new``: a folder to begin one's own work in."""

import shlex
import shutil
from pathlib import Path

from lwfedssl_jax.cli.options import NewOptions
from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.system.files import can_write
from lwfedssl_jax.system.program import program

# In a checkout, the files are among the examples; in a wheel, inside the package.
FILES = next(
    (d for d in (Path(__file__).parents[2] / "examples" / "new", Path(__file__).parents[1] / "new") if d.is_dir()),
    Path("new"),
)


def run_new(options: NewOptions) -> None:
    """Copy the files to the folder, and print what each is for.

    Raises:
      ConfigError: the folder has files already, or cannot be written.
    """
    folder = options.directory
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "is not empty" if folder.is_dir() else "is a file"
        raise ConfigError(f"DIR: {folder} {what}; accepted: a new or empty folder")
    if not can_write(folder):
        raise ConfigError(f"DIR: {folder} cannot be written; accepted: a folder that you can write to")
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(file.name for file in FILES.glob("*.py"))
    for name in names:
        shutil.copyfile(FILES / name, folder / name)
        print(f"{folder / name}: {about(FILES / name)}")
    print(f"begin with: {shlex.join([*program(), 'train', str(folder / 'config.py')])}")


def about(file: Path) -> str:
    """Return the first line of a file's docstring."""
    return file.read_text(encoding="utf-8").removeprefix('"""').splitlines()[0].removesuffix('"""')
