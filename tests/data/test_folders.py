"""Folders of images by class."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import clients_csv, load, picture, refused, rows_of
from PIL import Image

from lwfedssl_jax.config import PartitionConfig
from lwfedssl_jax.data.partition import partition

pytestmark = pytest.mark.usefixtures("cache_home")


def remove(*names: str) -> Callable[[Path], None]:
    return lambda root: [shutil.rmtree(root / name) for name in names] and None


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
    without = load(f"folder:{folder}")
    assert without.test_labels.tolist() == [0, 0, 1, 1]
    assert without.val_labels is None
    shutil.copytree(folder / "val", folder / "test")
    shutil.rmtree(folder / "val" / "dog" / "inner")
    shutil.copytree(folder / "test" / "dog" / "inner", folder / "val" / "dog" / "other")
    both = load(f"folder:{folder}")
    assert both.val_labels is not None
    assert both.val_labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("train", "test", "val"),
    [("Train", "Test", "Val"), ("TRAINING", "testing", "Dev"), ("train", "Eval", "valid"), ("train", "Validation", "")],
)
def test_splits_in_other_spellings(folder: Path, train: str, test: str, val: str) -> None:
    (folder / "train").rename(folder / train)
    (folder / "test").rename(folder / test)
    if val:
        shutil.copytree(folder / test, folder / val)
    picture(folder / "masks" / "0.png", 1)
    heard: list[str] = []
    data = load(f"folder:{folder}", notify=heard.append)
    assert (len(data.train_images), len(data.test_images), data.val_images is not None) == (6, 4, bool(val))
    assert f"folders of {folder} beside its splits are left out: masks" in heard
    assert f"{folder} has 2 classes: cat, dog" in heard


@pytest.mark.parametrize(
    ("folders", "why"),
    [
        ("train2017 test2017", "has folders that look like splits: test2017, train2017; accepted: PATH/train/CLASS/*"),
        ("train test images_val", "has folders that look like splits: images_val; accepted: "),
        ("Trainset Testset", "has folders that look like splits: Testset, Trainset; accepted: "),
        ("train test eval", "has several folders for test: eval, test; accepted: one; "),
        ("train test Val valid", "has several folders for val: Val, valid; accepted: one; "),
        ("test cat", "has a folder test but none for training; accepted: "),
        ("cat/train cat/test dog/train dog/test", "has splits inside its folders: cat/test, cat/train; accepted: PATH"),
        (
            "pets/train pets/test",
            "has splits inside its folders: pets/test, pets/train; accepted: folder:{root}/pets, ",
        ),
    ],
)
def test_what_looks_like_splits_but_is_none_is_refused(tmp_path: Path, folders: str, why: str) -> None:
    root = tmp_path / "all"
    for name in folders.split():
        picture(root / name / "a" / "0.png", 1)
    assert refused(f"folder:{root}").startswith(f"data.name: 'folder:{root}' {why.format(root=root)}")


def test_classes_may_have_words_of_splits(tmp_path: Path) -> None:
    names = ("steam train", "test tube", "Valley", "device", "training_shoe")
    for name in names:
        picture(tmp_path / "all" / name / "0.png", 1)
        picture(tmp_path / "all" / name / "1.png", 1)
    assert load(f"folder:{tmp_path}/all").class_names == tuple(sorted(names))


def test_damaged_exif_data_say_nothing(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (10, 20, 30))
    image.save(tmp_path / "a.png", exif=b"Exif\0\0no such data")
    image.save(tmp_path / "b.webp", exif=b"Exif\0\0no such data", lossless=True)
    assert (load(f"folder:{tmp_path}", size=8).train_images == (10, 20, 30)).all()


def test_a_lone_class_is_warned_of(tmp_path: Path) -> None:
    for i in range(5):
        picture(tmp_path / "all" / "photos" / f"{i}.png", 1)
    heard: list[str] = []
    load(f"folder:{tmp_path}/all", notify=heard.append)
    assert f"{tmp_path}/all has a single class, photos: accuracies will be 100 % and say nothing" in heard


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_images_are_upright_as_exif_says(tmp_path: Path, suffix: str) -> None:
    """All eight orientations of a picture that is red above and blue below, darker on the left."""
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4, :, 0], upright[4:, :, 2] = 255, 255
    upright[:, :4] //= 2
    flip, turn = Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose
    stored = {1: None, 2: flip, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE, 6: turn.ROTATE_90,
              7: turn.TRANSVERSE, 8: turn.ROTATE_270}  # fmt: skip
    for orientation, change in stored.items():
        image, exif = Image.fromarray(upright).resize((64, 64), 0), Image.Exif()
        exif[0x0112] = orientation
        image = image if change is None else image.transpose(change)
        image.save(tmp_path / f"{orientation}.{suffix}", exif=exif)
    for image in load(f"folder:{tmp_path}", size=8).train_images:
        np.testing.assert_allclose(image[::7, ::7], upright[::7, ::7], atol=20)  # the corners


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


@pytest.mark.parametrize(("column", "asked"), [("client", ""), ("user_id", ""), ("owner", "owner")])
def test_clients_csv_says_whose_the_images_are(folder: Path, column: str, asked: str) -> None:
    clients_csv(folder, f"file,{column}", *rows_of(folder))
    data = load(f"folder:{folder}", client_column=asked)
    assert data.train_clients.tolist() == [0, 1, 1, 0, 1, 1]  # type: ignore[union-attr]
    assert (data.class_names, data.client_names) == (("cat", "dog"), ("ann", "bob"))
    config = PartitionConfig(kind="natural", clients=1)
    chosen = [partition(config, data.train_labels, seed, data.train_clients) for seed in range(8)]
    assert {tuple(clients.own) for clients in chosen if clients.own is not None} == {(0,), (1,)}
    assert all((data.train_clients[clients[0]] == clients.own[0]).all() for clients in chosen)  # type: ignore[index]


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


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (remove(""), "is not a folder; accepted: a folder with PATH/train/CLASS/* and PATH/test/CLASS/*, or"),
        (remove("test"), "has a folder train but none for testing; accepted: test or val next to it"),
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
