"""Config files of one's own: what they import and load, and what identifies their runs."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lwfedssl_jax.config import CONFIG_DIR, ConfigError, code_of, digest, load, named, override, resolve
from lwfedssl_jax.config.checked import short_path
from lwfedssl_jax.config.files import USER_FILES
from lwfedssl_jax.sweep import Sweep
from lwfedssl_jax.sweep.grid import load_sweep, make_runs

MINE = """
import helper_mod
from lwfedssl_jax.config import load, override

config = override(load("base.py"), {"federation.rounds": helper_mod.ROUNDS})
"""
BASE = "from lwfedssl_jax.config import load\nfrom more import *\n\nconfig = load('quickstart')\n"


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two folders with the same names of files."""
    path, places = list(sys.path), (tmp_path / "cfg dir", tmp_path / "other")
    for rounds, folder in enumerate(places, 7):
        folder.mkdir()
        (folder / "mine.py").write_text(MINE, encoding="utf-8")
        (folder / "base.py").write_text(BASE, encoding="utf-8")
        (folder / "more.py").write_text("", encoding="utf-8")
        (folder / "helper_mod.py").write_text(f"ROUNDS = {rounds}\n", encoding="utf-8")
        (folder / "sweep.py").write_text(
            "from lwfedssl_jax.sweep import Sweep\nsweep = Sweep('mine.py')\n", encoding="utf-8"
        )
    yield places
    sys.path[:] = path


def test_a_config_imports_and_loads_its_neighbours_as_a_script_does(folders: tuple[Path, Path]) -> None:
    for rounds, folder in enumerate(folders, 7):
        assert load(str(folder / "mine.py")).federation.rounds == rounds
        assert [run.config.federation.rounds for run in load_sweep(str(folder / "sweep.py")).runs] == [rounds]
        assert not (folder / "__pycache__").exists()


def test_a_run_is_known_by_its_file_and_by_all_that_this_imports(folders: tuple[Path, Path]) -> None:
    folder, _ = folders
    codes = set()
    for name in ("", "mine.py", "base.py", "more.py", "helper_mod.py"):
        if name:
            with (folder / name).open("a", encoding="utf-8") as file:
                file.write("# changed\n")
        load(str(folder / "mine.py"))
        codes.add(code_of(str(folder / "mine.py")))
    assert len(codes) == 5
    parts = USER_FILES.parts[folder / "mine.py"]
    assert {file.name for file in parts} == {"base.py", "more.py", "helper_mod.py"}


def test_the_own_folder_stays_first_after_another_was_loaded_and_annotations_may_be_text(
    folders: tuple[Path, Path],
) -> None:
    first, second = folders
    (first / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from lwfedssl_jax.config import load, override\n"
        f"load({str(second / 'mine.py')!r})\nimport helper_mod\n\n"
        "@dataclass\nclass Mine:\n    rounds: int = helper_mod.ROUNDS\n\n"
        'config = override(load("quickstart"), {"federation.rounds": Mine().rounds})\n',
        encoding="utf-8",
    )
    assert load(str(first / "mine.py")).federation.rounds == 7


def test_a_named_config_is_the_same_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIG_DIR.parent)
    path = os.path.relpath(CONFIG_DIR / "paper" / "vit_tiny_mocov3.py")
    assert named(path) == named("paper/vit_tiny_mocov3") == "paper/vit_tiny_mocov3"
    assert code_of(path) == b""


def test_numbers_of_numpy_and_lists_are_numbers_and_tuples() -> None:
    plain = {"evaluation.labels_per_class": (0, 5), "partition.clients": 2, "partition.beta": 1.0}
    numpy = {
        "evaluation.labels_per_class": np.array([0, 5]),
        "partition.clients": np.int64(2),
        "partition.beta": 1,
        "runtime.remat": np.bool_(False),
    }
    mixed = {**plain, "evaluation.labels_per_class": [np.int32(0), 5], "partition.beta": np.float32(1)}
    base = load("quickstart")
    one, two, three = (resolve(override(base, changes)) for changes in (plain, numpy, mixed))
    assert one == two == three
    assert len({digest(config) for config in (one, two, three)}) == 1
    runs = make_runs(Sweep(base, product={"partition.beta": np.array([0.25, 0.5])}, seeds=np.arange(2)))
    assert [(run.seed, run.label) for run in runs] == [
        (0, "beta 0.25"),
        (1, "beta 0.25"),
        (0, "beta 0.5"),
        (1, "beta 0.5"),
    ]
    with pytest.raises(ConfigError, match=r"'x' is not a tuple; accepted: a tuple of int, such as \(1,\)$"):
        resolve(override(base, {"evaluation.labels_per_class": "x"}))


def test_a_path_to_data_is_one_however_it_is_written() -> None:
    base = load("quickstart")
    names = ("folder:data", "folder:./data/", "folder:.//data/./")
    assert len({digest(resolve(override(base, {"data.name": name}))) for name in names}) == 1
    assert short_path("folder:link/../data") == "folder:link/../data"
    assert [short_path(name) for name in ("npz:/a//b", "folder:.", "folder:./", "digits")] == [
        "npz:/a/b", "folder:.", "folder:.", "digits",
    ]  # fmt: skip
    further = [resolve(override(base, {"evaluation.data": [f"npz:{x}a.npz", "tfds:a/b"]})) for x in ("", "./")]
    assert further[0] == further[1]
