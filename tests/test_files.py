"""Data sets in files, and the cache of what is decoded."""

import errno
import gzip
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lwfedssl_jax.config import ConfigError, DataConfig
from lwfedssl_jax.data import cache, files, sources
from lwfedssl_jax.data.views import RECIPES


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "cache" / "lwfedssl_jax" / "data"


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


# ---- idx


def write_idx(path: Path, values: np.ndarray) -> None:
    sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
    content = bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the one of Debian's package, with 20 training and 10 test images."""
    folder = tmp_path / "fashion"
    folder.mkdir()
    for split, n in (("train", 20), ("t10k", 10)):
        images = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(folder / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8) % 10)
    monkeypatch.setattr(files, "FASHION_MNIST", folder)
    return folder


def test_fashion_mnist_is_what_the_idx_files_hold(fashion_mnist: Path, tmp_path: Path) -> None:
    data = load("fashion_mnist", 28)
    expected = np.random.default_rng(20).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    np.testing.assert_array_equal(data.train_images, expected[..., None])
    assert data.test_images.shape == (10, 28, 28, 1)
    assert data.train_labels.tolist() == [i % 10 for i in range(20)]
    assert (data.train_labels.dtype, data.classes) == (np.int32, 10)
    assert data.train_clients is None
    assert load("fashion_mnist", 16).train_images.shape == (20, 16, 16, 1)
    assert RECIPES[sources.find(DataConfig(name="fashion_mnist")).views] is RECIPES["fashion"]
    other = tmp_path / "unpacked"
    shutil.copytree(fashion_mnist, other)
    for path in other.iterdir():  # as some archives have them
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    np.testing.assert_array_equal(load(f"fashion_mnist:{other}", 28).train_images, data.train_images)


def test_fashion_mnist_that_is_not_installed(fashion_mnist: Path) -> None:
    (fashion_mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    for name in ("fashion_mnist", f"fashion_mnist:{fashion_mnist}"):
        message = refused(name)
        assert message.startswith(f"data.name: {name!r} is not installed (no {fashion_mnist}/t10k-labels-idx1-ubyte.gz")
        assert "accepted: Debian's package" in message
        assert "tfds:fashion_mnist" in message


def zipped(content: bytes) -> bytes:
    """The same at any time, as names of tests must be in all processes that collect them."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("images-idx3", b"not gzip", "Not a gzipped file"),
        ("images-idx3", zipped(bytes(5000))[:-9], "end-of-stream"),
        ("images-idx3", zipped(bytes([0, 0, 8])), "does not begin like an idx3 file"),
        ("images-idx3", zipped(bytes([0, 0, 8, 1, 0, 0, 0, 0]) + bytes(20)), "does not begin like an idx3 file"),
        ("labels-idx1", zipped(bytes([0, 0, 8, 1, 0, 0, 0, 20]) + bytes(19)), "19 bytes for the shape (20,)"),
        ("labels-idx1", zipped(bytes([0, 0, 8, 1, 0, 0, 0, 20]) + bytes([10] * 20)), "a label 10"),
        ("images-idx3", np.zeros((19, 28, 28), np.uint8), "shape (19, 28, 28) for 20 labels"),
        ("images-idx3", np.zeros((20, 28, 27), np.uint8), "shape (20, 28, 27)"),
    ],
)
def test_fashion_mnist_that_is_damaged(fashion_mnist: Path, name: str, content: bytes | np.ndarray, why: str) -> None:
    path = fashion_mnist / f"train-{name}-ubyte.gz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_idx(path, content)
    message = refused("fashion_mnist")
    assert message.startswith(f"data.name: 'fashion_mnist' cannot be read, {path} is damaged (")
    assert why in message
    assert "accepted: the file of Debian's package" in message


@pytest.mark.skipif(not files.FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian() -> None:
    data = load("fashion_mnist", 28)
    assert (len(data.train_images), len(data.test_images)) == (60000, 10000)
    assert np.bincount(data.train_labels).tolist() == [6000] * 10
    assert data.train_images.mean() / 255 == pytest.approx(RECIPES["fashion"].mean, abs=1e-3)
    assert data.train_images.std() / 255 == pytest.approx(RECIPES["fashion"].std, abs=1e-3)


# ---- npz


def arrays(channels: tuple[int, ...] = (3,), **changes: Any) -> dict[str, Any]:
    """Of MedMNIST's form: 9 training, 4 validation and 6 test images of 5x5, three classes; None leaves one out."""
    content = {}
    for name, n in (("train", 9), ("val", 4), ("test", 6)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 5, 5, *channels), dtype=np.uint8)
        content |= {f"{name}_images": pixels, f"{name}_labels": np.arange(n, dtype=np.uint8)[:, None] % 3}
    return {name: value for name, value in (content | changes).items() if value is not None}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_npz_of_medmnist(tmp_path: Path, save: Callable[..., None], channels: tuple[int, ...]) -> None:
    content = arrays(channels)
    save(tmp_path / "med.npz", **content)
    data = load(f"npz:{tmp_path}/med.npz", 5)
    expected = np.broadcast_to(content["train_images"].reshape(9, 5, 5, -1), (9, 5, 5, 3))
    np.testing.assert_array_equal(data.train_images, expected)
    assert data.test_images.shape == (6, 5, 5, 3)  # the validation images are in neither
    assert data.test_labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert data.train_labels.dtype == np.int32


def test_npz_without_test_images_is_tested_on_val(tmp_path: Path) -> None:
    np.savez(tmp_path / "med.npz", **arrays(test_images=None, test_labels=None))
    assert len(load(f"npz:{tmp_path}/med.npz").test_images) == 4


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"train_images": None}, "has no array train_images"),
        ({"test_labels": None}, "has no array test_labels"),
        ({"test_images": None, "val_images": None}, "has no array val_images"),
        ({"train_labels": np.zeros((9, 14), np.uint8)}, "has 14 labels for each image"),
        ({"train_labels": np.zeros((8, 1), np.uint8)}, "has train_labels of shape (8, 1) for 9 images"),
        ({"train_labels": np.zeros((9, 1), np.float32)}, "has train_labels of type float32"),
        ({"train_labels": np.full(9, -1)}, "has a label -1 in train_labels; accepted: labels from 0 to 1048575"),
        ({"train_labels": np.arange(9) + 2**20 - 8}, "has a label 1048576 in train_labels; accepted: labels from 0"),
        ({"test_labels": np.full(6, 2**64 - 1, np.uint64)}, "has a label 18446744073709551615 in test_labels"),
        ({"train_labels": np.array([{}] * 9)}, "has train_labels of type object"),
        ({"train_images": np.array([{}] * 9)}, "has train_images of shape (9,) and type object"),
        ({"train_images": np.zeros((9, 5, 5), np.float32)}, "has train_images of shape (9, 5, 5) and type float32"),
        ({"train_images": np.zeros((9, 5, 5, 5), np.uint8)}, "has train_images of shape (9, 5, 5, 5) and type uint8"),
        ({"train_images": np.zeros((0, 5, 5), np.uint8)}, "has train_images of shape (0, 5, 5)"),
        ({"train_images": np.asfortranarray(np.zeros((9, 5, 5), np.uint8))}, "cannot be read (an array is in Fortran"),
    ],
)
def test_bad_npz(tmp_path: Path, changes: dict[str, Any], why: str, cache_home: Path) -> None:
    np.savez(tmp_path / "med.npz", **arrays(**changes))
    name = f"npz:{tmp_path}/med.npz"
    assert refused(name).startswith(f"data.name: {name!r} {why}")
    assert not list(cache_home.glob("*"))


def test_npz_that_is_no_npz_or_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "med.npz"
    name = f"npz:{path}"
    assert refused(name).startswith(f"data.name: {name!r} is not a file; accepted: MedMNIST's npz")
    path.write_bytes(b"PK")
    assert refused(name).startswith(f"data.name: {name!r} cannot be read (File is not a zip file)")
    np.savez(tmp_path / "whole.npz", **arrays())
    with zipfile.ZipFile(tmp_path / "whole.npz") as whole, zipfile.ZipFile(path, "w") as cut:
        for member in whole.namelist():
            content = whole.read(member)
            cut.writestr(member, content[:-1] if member == "train_images.npy" else content)
    assert "cannot be read (train_images ends at image 8)" in refused(name)
    content = bytearray((tmp_path / "whole.npz").read_bytes())
    content[content.index(b"train_images.npy") + 200] ^= 255
    path.write_bytes(content)
    assert "cannot be read (Bad CRC-32 for file 'train_images.npy')" in refused(name)
    with zipfile.ZipFile(tmp_path / "whole.npz") as whole, zipfile.ZipFile(path, "w") as huge:
        for member in whole.namelist():
            huge.writestr(
                member, whole.read(member).replace(b"(9, 5, 5, 3), }" + b" " * 9, b"(9999999999, 5, 5, 3), }")
            )
    assert "cannot be read (train_images ends before its shape (9999999999, 5, 5, 3) does)" in refused(name)


def test_any_byte_of_an_npz_may_be_wrong(tmp_path: Path) -> None:
    """In the headers, where a byte decides what is read; what Python's zipfile does not look at makes no error."""
    path = tmp_path / "med.npz"
    np.savez(path, **arrays())
    whole, seen = path.read_bytes(), set()
    config, rng = DataConfig(name=f"npz:{path}", image_size=5), np.random.default_rng(0)
    ends = [i for i in range(len(whole)) if whole[i : i + 2] == b"PK"]
    for at in rng.choice([i for end in ends for i in range(end, min(end + 180, len(whole)))], 250):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ int(rng.integers(1, 256))]) + whole[at + 1 :])
        try:
            for split in files.open_npz(config, sources.ignore_text).splits():
                assert len(list(split.items)) == split.size
        except ConfigError as error:
            seen.add((type(error.__cause__), "\n" in str(error)))
    assert {(zipfile.BadZipFile, False), (NotImplementedError, False)} < seen
    assert not any(several_lines for _, several_lines in seen)


# ---- folder


def picture(path: Path, value: int, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if len(Image.new(mode, (1, 1)).getbands()) == 1 else (value,) * len(mode)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """``train/{cat,dog}`` with 3 images each, ``test/{cat,dog}`` with 2, of several sizes, formats and modes."""
    root = tmp_path / "pets"
    for split, n in (("train", 3), ("test", 2)):
        for label, first in (("dog", 100), ("cat", 200)):
            for i, (suffix, mode) in enumerate([("png", "L"), ("PNG", "RGBA"), ("bmp", "RGB")][:n]):
                picture(root / split / label / "inner" / f"{i}.{suffix}", first + i, (4 + i, 7), mode)
    return root


def test_a_folder_by_class(folder: Path) -> None:
    seen: list[str] = []
    data = load(f"folder:{folder}", notify=seen.append)
    assert data.train_images.shape == (6, 4, 4, 3)
    assert data.train_images[:, 2, 1, 0].tolist() == [200, 201, 202, 100, 101, 102]
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test_labels.tolist() == [0, 0, 1, 1]
    assert data.train_clients is None
    assert "decoding 10 of 10 images" in seen
    (folder / "test").rename(folder / "val")
    assert load(f"folder:{folder}").test_labels.tolist() == [0, 0, 1, 1]


def test_a_folder_without_a_split_gets_a_stratified_one_that_stays(tmp_path: Path) -> None:
    for label, n in (("a", 10), ("b", 2), ("c", 40)):
        for i in range(n):
            picture(tmp_path / "all" / label / f"{i:02}.png", i)
    data = load(f"folder:{tmp_path}/all")
    assert np.bincount(data.test_labels).tolist() == [2, 1, 8]
    assert np.bincount(data.train_labels).tolist() == [8, 1, 32]
    of_c = [images[labels == 2, 0, 0, 0].tolist() for images, labels in (data[:2], data[2:4])]
    assert sorted(of_c[0] + of_c[1]) == list(range(40))
    (tmp_path / "all").rename(tmp_path / "moved")
    np.testing.assert_array_equal(load(f"folder:{tmp_path}/moved").test_images, data.test_images)


def test_images_beside_the_class_folders_have_no_label(folder: Path) -> None:
    picture(folder / "train" / "loose.png", 7)
    data = load(f"folder:{folder}")
    assert data.train_labels.tolist() == [-1, 0, 0, 0, 1, 1, 1]
    assert data.train_images[0, 0, 0, 0] == 7
    assert data.labelled.tolist() == [1, 2, 3, 4, 5, 6]


def test_files_that_are_no_images_are_named(folder: Path) -> None:
    (folder / "train" / "cat" / "boxes.txt").write_text("")
    for name in (".DS_Store", "cat/._0.png"):
        (folder / "train" / name).write_text("")
    seen: list[str] = []
    assert len(load(f"folder:{folder}", notify=seen.append).train_images) == 6
    assert seen[0].startswith(
        f"1 files of {folder} do not have the suffix of an image and are left out: {folder}/train/cat/boxes"
    )


def clients_csv(folder: Path, header: str, *rows: str) -> None:
    (folder / "clients.csv").write_text("\n".join([header, *rows]) + "\n", errors="surrogateescape")


def rows_of(folder: Path) -> list[str]:
    names = sorted(p.relative_to(folder).as_posix() for p in (folder / "train").rglob("*.*"))
    return [f"{name},{'ann' if '/0.' in name else 'bob'}" for name in names]


@pytest.mark.parametrize(("column", "asked"), [("client", ""), ("user_id", ""), ("owner", "owner")])
def test_clients_csv_says_whose_the_images_are(folder: Path, column: str, asked: str) -> None:
    clients_csv(folder, f"file,{column}", *rows_of(folder))
    assert load(f"folder:{folder}", client_column=asked).train_clients.tolist() == [0, 1, 1, 0, 1, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("header", "edit", "asked", "why"),
    [
        ("name,client", lambda rows: rows, "", "has a clients.csv with columns name, client; accepted: file, client"),
        ("file,client", lambda rows: rows, "owner", "has a clients.csv with columns file, client; accepted: file, own"),
        ("file,client", lambda rows: rows[:1], "", "has 5 training images without a client in clients.csv: /"),
        ("file,client", lambda rows: [*rows, "x.png,ann"], "", "has a clients.csv with 1 files that are not there: x"),
        (
            "file,client",
            lambda rows: [*rows, rows[0], f"./{rows[0].split(',')[0]},zoe"],
            "",
            "has a clients.csv that gives train/cat/inner/0.png to 'ann' and to 'zoe'; accepted: one client for each",
        ),
        (
            "file,cli\udce9nt",
            lambda rows: rows,
            "",
            "has a clients.csv that cannot be read ('utf-8' codec can't decode",
        ),
        ("file,client", lambda rows: ["x" * 2**18], "", "has a clients.csv that cannot be read (field larger than"),
    ],
)
def test_bad_clients_csv(
    folder: Path, header: str, edit: Callable[[list[str]], list[str]], asked: str, why: str
) -> None:
    clients_csv(folder, header, *edit(rows_of(folder)))
    name = f"folder:{folder}"
    assert refused(name, client_column=asked).startswith(f"data.name: {name!r} {why}")


def test_a_client_column_without_clients_csv(folder: Path) -> None:
    assert "has no clients.csv for data.client_column 'owner'" in refused(f"folder:{folder}", client_column="owner")


def remove(*names: str) -> Callable[[Path], None]:
    return lambda root: [shutil.rmtree(root / name) for name in names] and None


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (remove(""), "is not a folder; accepted: a folder with PATH/train/CLASS/* and PATH/test/CLASS/*, or"),
        (remove("test"), "has a folder train but none for testing; accepted: test or val or validation next to it"),
        (remove("train", "test"), "has no images for training; accepted: PATH/train/CLASS"),
        (remove("train/dog"), "has test images of classes without training images: dog; accepted: the same"),
        (remove("test/dog", "test/cat"), "has test images without a class, or none; accepted: a class folder each, of"),
        (lambda root: picture(root / "test" / "x.png", 1), "has test images without a class, or none; accepted:"),
        (
            lambda root: (remove("train/dog", "train/cat")(root), picture(root / "train" / "x.png", 1)),
            "has test images of classes without training images: cat, dog; accepted: the same",
        ),
        (
            lambda root: (root / "train" / "cat" / "self").symlink_to(root / "train"),
            "has a folder that is reached twice, by a link: ",
        ),
    ],
)
def test_bad_folder(folder: Path, damage: Callable[[Path], Any], why: str) -> None:
    damage(folder)
    name = f"folder:{folder}"
    assert refused(name).startswith(f"data.name: {name!r} {why}")


def test_folders_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def forbidding(path: Any) -> Any:  # as a mode of 0 is for all but root
        if Path(path).name == "inner" and Path(path).parents[1].name == "train":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidding)
    assert f"has 2 folders that cannot be read: {folder}/train/" in (message := refused(f"folder:{folder}"))
    assert "/inner (Permission denied); accepted: folders that you can read" in message


def test_a_class_of_one_image_cannot_be_split(tmp_path: Path) -> None:
    picture(tmp_path / "all" / "a" / "0.png", 1)
    assert "has one image of class a; accepted: two" in refused(f"folder:{tmp_path}/all")


def test_images_that_cannot_be_read_are_counted_and_named(folder: Path, cache_home: Path) -> None:
    picture(folder / "train" / "dog" / "deep.png", 1, mode="I;16")
    (folder / "train" / "cat" / "empty.png").write_bytes(b"")
    (folder / "test" / "dog" / "gone.png").symlink_to(folder / "nothing")
    whole = (folder / "train" / "cat" / "inner" / "2.bmp").read_bytes()
    for i in range(3):
        (folder / "test" / "cat" / f"cut{i}.bmp").write_bytes(whole[:-40])
    message = refused(f"folder:{folder}")
    assert f"has 6 of 16 images that cannot be read: {folder}/train/cat/empty.png (cannot identify" in message
    assert (
        f"{folder}/train/dog/deep.png (its mode I;16 has more than 8 bits per channel), {folder}/test/cat/c" in message
    )
    assert " and 3 more; accepted: images that Pillow reads" in message
    assert not list(cache_home.glob("*"))


# ---- cache


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
        assert one.dtype == other.dtype
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
    assert seen == [f"checking {entry}"]


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
    assert seen[0].startswith(f"the cache folder {cache_home} cannot be written (")


def test_a_full_disk_is_seen_before_it_is_written(
    folder: Path, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    seen: list[str] = []
    assert type(load(f"folder:{folder}", notify=seen.append).train_images) is np.ndarray
    assert "has no room ([Errno 28] No space left on device): the images stay in memory" in seen[0]
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
