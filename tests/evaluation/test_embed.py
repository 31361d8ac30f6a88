"""Features of one's own pictures, by the command and by the library."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from conftest import small_config
from images import picture
from PIL import Image

from lwfedssl_jax import cli, load_encoder
from lwfedssl_jax.data.cache import fit
from lwfedssl_jax.evaluation.export import encoder_files
from lwfedssl_jax.method.task import make_task
from lwfedssl_jax.workdir import WorkDir


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of an untrained encoder."""
    config, path = small_config(model__depth=1), tmp_path_factory.mktemp("run")
    task = make_task(config)
    WorkDir(path, config).save_encoder(encoder_files(config, task, task.encoder.init(jax.random.key(0))))
    return path


def test_pictures_of_any_kind_become_features(run: Path, tmp_path: Path) -> None:
    encode, rng = load_encoder(run), np.random.default_rng(0)
    pixels = rng.integers(0, 255, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = encode(fit(pixels, 8, 3)[None])
    gray = Image.fromarray(pixels).convert("L")
    for given in ([pixels], [Image.fromarray(pixels)], [tmp_path / "a.png"], str(tmp_path / "a.png"), pixels[None]):
        np.testing.assert_array_equal(encode(given), expected)
    mixed = encode([pixels, gray, np.asarray(gray), Image.fromarray(pixels).resize((9, 5)).convert("RGBA")])
    assert mixed.shape == (4, encode.num_features)
    np.testing.assert_allclose(mixed[0], expected[0], atol=1e-6)  # another batch, another order of sums
    np.testing.assert_allclose(mixed[1], mixed[2], atol=1e-6)
    assert encode([]).shape == (0, encode.num_features)
    with pytest.raises(ValueError, match=r"gone.png: cannot be read"):
        encode([tmp_path / "gone.png"])
    with pytest.raises(ValueError, match=r"float64 \(4, 4\) is no picture; accepted: uint8"):
        encode([np.zeros((4, 4))])


def test_the_command_writes_names_and_features(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, name in enumerate(("x.png", "deep/y.png", ".hidden/z.png", "deep/a.txt.png")):
        picture(tmp_path / "all" / name, i, (5 + i, 9))
    (tmp_path / "all" / "broken.jpg").write_bytes(b"no image")
    assert cli.main(["embed", str(run), str(tmp_path / "all"), "--out", str(tmp_path / "new" / "f.npz")]) == 0
    shown = capsys.readouterr()
    assert "3 images, " in shown.out
    assert "1 images cannot be read and are left out: broken.jpg (cannot identify" in shown.err
    assert "4 of 4 images" in shown.err
    with np.load(tmp_path / "new" / "f.npz") as found:
        assert found["names"].tolist() == ["deep/a.txt.png", "deep/y.png", "x.png"]
        expected = load_encoder(run)([tmp_path / "all" / name for name in found["names"]])
        np.testing.assert_allclose(found["features"], expected, atol=1e-6)
    images = np.zeros((3, 4, 6), np.uint8)
    np.savez(tmp_path / "x.npz", some=images, labels=np.arange(3))
    assert cli.main(["embed", str(run), str(tmp_path / "x.npz"), "--out", str(tmp_path / "f.csv")]) == 0
    table = pd.read_csv(tmp_path / "f.csv", index_col="name")
    assert list(table.index) == ["some[0]", "some[1]", "some[2]"]
    assert table.shape == (3, load_encoder(run).num_features)


def test_what_cannot_be_embedded_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.npz").write_bytes(b"x")
    (tmp_path / "bad.png").write_bytes(b"x")
    out = ["--out", str(tmp_path / "f.npz")]
    for words, message in (
        ([str(run), str(tmp_path / "empty"), *out], f"IMAGES: {tmp_path}/empty has no images; accepted: a folder"),
        ([str(run), str(tmp_path / "gone"), *out], f"IMAGES: {tmp_path}/gone does not exist; accepted: a folder"),
        ([str(run), str(tmp_path / "bad.npz"), *out], f"IMAGES: {tmp_path}/bad.npz cannot be read ("),
        ([str(run), str(tmp_path / "bad.png"), *out], f"IMAGES: no image in {tmp_path}/bad.png can be read; accepted"),
        (
            [str(tmp_path), str(tmp_path), "--out", "x.txt"],
            "--out: x.txt cannot be written; accepted: a file that ends",
        ),
        ([str(run)], "IMAGES: missing; accepted: all of IMAGES, --out"),
    ):
        assert cli.main(["embed", *words]) == 2
        assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "f.npz").exists()
    shutil.copytree(run, tmp_path / "unfinished")
    (tmp_path / "unfinished" / "encoder.json").unlink()
    picture(tmp_path / "empty" / "a.png", 1)
    assert cli.main(["embed", str(tmp_path / "unfinished"), str(tmp_path / "empty"), *out]) == 2
    assert "accepted: the work directory of a finished run" in capsys.readouterr().err
