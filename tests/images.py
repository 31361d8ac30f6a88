"""Data sets of image files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lwfedssl_jax.config import ConfigError, DataConfig
from lwfedssl_jax.data import sources


def load(
    name: str, size: int = 4, notify: Callable[[str], None] = sources.ignore_text, **fields: Any
) -> sources.Dataset:
    config = DataConfig(name=name, image_size=size, **fields)
    return sources.find(config).load(config, notify)


def refused(name: str, **fields: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load(name, **fields)
    assert "\n" not in str(error.value)
    assert "; accepted: " in str(error.value)
    return str(error.value)


def picture(path: Path, value: int, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if len(Image.new(mode, (1, 1)).getbands()) == 1 else (value,) * len(mode)).save(path)


def clients_csv(folder: Path, header: str, *rows: str) -> None:
    (folder / "clients.csv").write_text("\n".join([header, *rows]) + "\n", errors="surrogateescape")


def rows_of(folder: Path) -> list[str]:
    names = sorted(p.relative_to(folder).as_posix() for p in (folder / "train").rglob("*.*"))
    return [f"{name},{'ann' if '/0.' in name else 'bob'}" for name in names]
