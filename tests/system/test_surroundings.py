"""Paths: the home directory, and the folder for what can be made again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from lwfedssl_jax import cli
from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.system.files import user_cache, with_home


def test_home_is_expanded_wherever_a_path_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert with_home("~/x") == tmp_path / "x"
    assert with_home("a~/x") == Path("a~/x")
    words = ["--workdir=~/x", "~/x.py", "--out", "~", "--a.b", "~~", "--data.name=folder:~/x", "-5"]
    expected = [f"--workdir={tmp_path}/x", f"{tmp_path}/x.py", "--out", str(tmp_path), "--a.b"]
    assert [cli.expand_home(word) for word in words if word != "~~"] == [*expected, *words[6:]]
    with pytest.raises(ConfigError, match=r"^~nobody-here/x: there is no home directory ~nobody-here; accepted: "):
        with_home("~nobody-here/x")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HOME": "/h"}, Path("/h/.cache/lwfedssl_jax")),
        ({"HOME": "/h", "XDG_CACHE_HOME": ""}, Path("/h/.cache/lwfedssl_jax")),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/c"}, Path("/c/lwfedssl_jax")),
    ],
)
def test_the_cache_is_where_xdg_says(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Path
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert user_cache() == expected


def test_without_a_home_there_is_no_cache_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from images import load

    from lwfedssl_jax.system import devices

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(os.path, "expanduser", os.fspath)  # as for a user without an entry in passwd
    assert user_cache() is None
    devices.set_up_cache(None)
    assert "programs are not kept for the next run: there is no home directory" in capsys.readouterr().err
    heard: list[str] = []
    assert len(load(f"folder:{folder}", notify=heard.append).train_images) == 6
    assert "there is no cache folder (no home directory, and no XDG_CACHE_HOME): the images stay in memory" in heard


def test_a_platform_that_is_not_there_is_one_line() -> None:
    result = subprocess.run(
        [sys.executable, ROOT / "run.py", "train", "quickstart"],
        env={**os.environ, "JAX_PLATFORMS": "rocm"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.startswith("error: JAX_PLATFORMS: 'rocm' does not start here (")
    assert result.stderr.endswith("; accepted: cpu, or leave it out\n")
    assert result.stderr.count("\n") == 1


def test_a_terminal_of_another_encoding_shows_question_marks(tmp_path: Path) -> None:
    (tmp_path / "résumé.py").write_text("config = 1\n", encoding="utf-8")
    result = subprocess.run(
        [sys.executable, ROOT / "run.py", "train", tmp_path / "résumé.py"],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 2
    assert b"r?sum?.py does not define `config`" in result.stderr
