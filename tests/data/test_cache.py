"""The cache of decoded images."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import clients_csv, load, picture, rows_of

from lwfedssl_jax.data import cache

pytestmark = pytest.mark.usefixtures("cache_home")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by a number for every image that is decoded."""
    decoded: list[int] = []
    fit = cache.fit
    monkeypatch.setattr(cache, "fit", lambda *args: decoded.append(1) or fit(*args))
    return decoded


def test_images_are_decoded_once_and_mapped(folder: Path, monkeypatch: pytest.MonkeyPatch, cache_home: Path) -> None:
    clients_csv(folder, "file,client", *rows_of(folder))
    decoded = counted(monkeypatch)
    first, again = load(f"folder:{folder}"), load(f"folder:{folder}")
    assert len(decoded) == 10
    for data in (first, again):
        assert isinstance(data.train_images, np.memmap)
        assert isinstance(data.test_images, np.memmap)
        assert not data.train_images.flags.writeable
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
        assert getattr(one, "dtype", None) == getattr(other, "dtype", None)
    (entry,) = cache_home.iterdir()
    assert entry.name.startswith("folder-pets-4-")
    load(f"folder:{folder}", size=5)
    assert len(decoded) == 20
    os.utime(folder / "train" / "cat" / "inner" / "0.png", (1, 1))
    load(f"folder:{folder}")
    assert len(decoded) == 30
    picture(folder / "train" / "cat" / "new.png", 1)
    clients_csv(folder, "file,client", *rows_of(folder))
    assert len(load(f"folder:{folder}").train_images) == 7


def test_digits_are_not_cached(cache_home: Path) -> None:
    load("digits")
    load("synthetic", synthetic_examples=10)
    assert not cache_home.exists()


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "empty", "no hashes", "bad hashes"])
def test_a_damaged_entry_is_decoded_again_and_said(folder: Path, cache_home: Path, damage: str) -> None:
    before = np.array(load(f"folder:{folder}").train_images)
    (entry,) = cache_home.iterdir()
    path, hashes = entry / "train_images.npy", entry / "sha256.json"
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "missing":
        path.unlink()
    elif damage == "empty":
        for array in entry.glob("*.npy"):
            array.unlink()
        hashes.write_text("{}")
    elif damage == "no hashes":
        hashes.unlink()
    else:
        hashes.write_text("{")
    seen: list[str] = []
    np.testing.assert_array_equal(load(f"folder:{folder}", notify=seen.append).train_images, before)
    assert [line for line in seen if line.startswith(f"{entry} is damaged (") and line.endswith("): decoding again")]
    seen.clear()
    load(f"folder:{folder}", notify=seen.append)
    assert seen[1:] == [f"checking {entry}"]


def test_a_race_is_won_by_the_first(folder: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish, inside = cache._finish, []

    def race(*args: Any) -> None:
        finish(*args)
        if not inside:  # meanwhile another process does it all
            inside.append(1)
            inside.append(load(f"folder:{folder}"))

    monkeypatch.setattr(cache, "_finish", race)
    data = load(f"folder:{folder}")
    np.testing.assert_array_equal(data.train_images, inside[1].train_images)
    assert len(list(cache_home.iterdir())) == 1
    assert isinstance(load(f"folder:{folder}").train_images, np.memmap)


def test_without_a_cache_folder_images_stay_in_memory(folder: Path, cache_home: Path) -> None:
    expected = np.array(load(f"folder:{folder}").train_images)
    shutil.rmtree(cache_home)
    cache_home.write_text("a file")
    seen: list[str] = []
    data = load(f"folder:{folder}", notify=seen.append)
    assert type(data.train_images) is np.ndarray
    np.testing.assert_array_equal(data.train_images, expected)
    assert seen[1].startswith(f"the cache folder {cache_home} cannot be written (")


def test_a_full_disk_is_seen_before_it_is_written(
    folder: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    seen: list[str] = []
    assert type(load(f"folder:{folder}", notify=seen.append).train_images) is np.ndarray
    assert "has no room ([Errno 28] No space left on device): the images stay in memory" in seen[1]
    assert not list(cache_home.iterdir())


def test_what_killed_processes_have_left_goes_after_a_day(folder: Path, cache_home: Path) -> None:
    old, new = cache_home / "x.1.tmp", cache_home / "x.2.tmp"
    for path in (old, new):
        path.mkdir(parents=True)
        (path / "train_images.npy").write_text("")
    for path in (old / "train_images.npy", old):
        os.utime(path, (0, 0))
    load(f"folder:{folder}")
    assert not old.exists()
    assert new.exists()
