"""Data sets of tensorflow-datasets: small real ones, prepared on disk."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from images import load, refused
from PIL import Image

from lwfedssl_jax.config import ConfigError, DataConfig, PartitionConfig
from lwfedssl_jax.data import files, sources, tfds
from lwfedssl_jax.data.partition import partition


@pytest.fixture(autouse=True)
def tfds_home(cache_home: Path, tmp_path: Path) -> Path:
    """Where data sets are prepared, empty."""
    return tmp_path / "tfds"


def builder(
    name: str,
    features: dict[str, Any],
    splits: dict[str, list[dict[str, Any]]],
    own: Any = None,
    known: bool = False,
    version: str = "1.0.0",
) -> Any:
    """A builder class; ``known``: tensorflow-datasets finds it by its name."""
    import tensorflow_datasets as tf_datasets
    from tensorflow_datasets.core import registered

    def info(self: Any) -> Any:
        return tf_datasets.core.DatasetInfo(
            builder=self, features=tf_datasets.features.FeaturesDict(features), supervised_keys=own
        )

    def generators(self: Any, manager: Any) -> Any:
        return {split: self._generate_examples(rows) for split, rows in splits.items()}

    def examples(self: Any, rows: Any) -> Any:
        yield from enumerate(rows)

    methods = {"_info": info, "_split_generators": generators, "_generate_examples": examples}
    content = {"VERSION": tf_datasets.core.Version(version), "__module__": __name__, **methods}
    if known:
        return type(name, (tf_datasets.core.GeneratorBasedBuilder,), content)
    with registered.skip_registration():
        return type(name, (tf_datasets.core.GeneratorBasedBuilder,), content)


def prepare(*args: Any, **kwargs: Any) -> None:
    builder(*args, **kwargs)(file_format="array_record", data_dir=tfds.tfds_folder()).download_and_prepare()


def png(value: int, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, (value,) * len(mode)).save(file, "PNG")
    return file.getvalue()


def pixels(value: int) -> np.ndarray:
    return np.full((4, 4, 1), value, np.uint8)


def test_encoded_images_labels_and_clients_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow_datasets as tf_datasets

    f = tf_datasets.features
    rows = [{"photo": png(i, (4 + i % 3, 6)), "species": i % 3, "user_id": f"u{i // 4}", "n": i} for i in range(12)]
    features = {"photo": f.Image(shape=(None, None, 3)), "species": f.ClassLabel(num_classes=3)}
    prepare("Pets", features | {"user_id": f.Text(), "n": np.int64}, {"train": rows, "validation": rows[:6]})
    data = load("tfds:pets")
    assert isinstance(data.train_images, np.memmap)
    assert data.train_images.shape == (12, 4, 4, 3)
    value = data.train_images[:, 3, 0, 2]
    assert sorted(value.tolist()) == list(range(12))
    np.testing.assert_array_equal(data.train_labels, value % 3)
    np.testing.assert_array_equal(data.train_clients, value // 4)  # type: ignore[arg-type]
    assert sorted(data.test_images[:, 0, 0, 0].tolist()) == list(range(6))
    clients = partition(PartitionConfig(kind="natural", clients=3), data.train_labels, 0, data.train_clients)
    assert [sorted(value[c].tolist()) for c in clients] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    by_n = load("tfds:pets", client_column="n")
    assert by_n.train_clients is not None
    assert len(set(by_n.train_clients.tolist())) == 12
    assert "data.client_column: 'tfds:pets' has no scalar integer or text 'owner'; accepted: one of n Tensor" in (
        refused("tfds:pets", client_column="owner")
    )
    monkeypatch.setattr(tf_datasets.core.DatasetBuilder, "as_data_source", None)
    np.testing.assert_array_equal(load("tfds:pets").train_images, data.train_images)  # from the cache


def test_tensors_and_integers_serve_and_test_labels_of_minus_one_do_not() -> None:
    import tensorflow_datasets as tf_datasets

    features = {"x": tf_datasets.features.Tensor(shape=(4, 4, 1), dtype=np.uint8), "y": np.int64}
    rows = [{"x": pixels(i), "y": i % 2} for i in range(6)]
    unlabelled = [{"x": pixels(i), "y": -1} for i in range(5)]
    prepare("Plain", features, {"train": rows + unlabelled, "test": unlabelled, "validation": rows[:4]})
    data = load("tfds:plain")
    assert data.train_images.shape == (11, 4, 4, 3)
    assert sorted(data.train_labels.tolist()) == [-1] * 5 + [0] * 3 + [1] * 3
    assert sorted(data.test_labels.tolist()) == [0, 0, 1, 1]
    assert data.val_labels is None
    prepare("Both", features, {"train": rows, "test": rows[:3], "validation": rows[:4]})
    both = load("tfds:both")
    assert sorted(both.test_labels.tolist()) == [0, 0, 1]
    assert both.val_labels is not None
    assert sorted(both.val_labels.tolist()) == [0, 0, 1, 1]
    prepare("LargeLabels", features, {"train": [*rows, {"x": pixels(0), "y": 2**40}], "test": rows})
    assert "has a label 1099511627776; accepted: labels from 0 to 1048575" in refused("tfds:large_labels")
    prepare("NoLabels", features, {"train": rows, "test": unlabelled})
    assert "has 5 test images without a label" in refused("tfds:no_labels")


def test_features_that_could_be_several_things() -> None:
    import tensorflow_datasets as tf_datasets

    f = tf_datasets.features
    image, label = f.Tensor(shape=(4, 4, 1), dtype=np.uint8), f.ClassLabel(num_classes=2)
    row = {"a": pixels(1), "b": pixels(2), "c": 0, "d": 1, "e": 5}
    splits = {"train": [row] * 2, "test": [row] * 2}
    every = {"a": image, "b": image, "c": label, "d": label, "e": np.int64}

    def prepared(name: str, features: str, own: Any = None, **changes: Any) -> None:
        chosen = {n: [{k: r[k] for k in features} for r in rows] for n, rows in (splits | changes).items() if rows}
        prepare(name, {k: every[k] for k in features}, chosen, own)

    prepared("Own", "abcde", ("b", "d"))
    assert load("tfds:own").train_images.max() == 2
    assert load("tfds:own").train_labels.tolist() == [1, 1]
    prepared("OneClass", "ace")
    assert load("tfds:one_class").train_labels.tolist() == [0, 0]
    for name, features, why in (
        (
            "TwoImages",
            "abc",
            "has 2 features that could be an image (Image, or uint8 Tensor of rank 3): a Tensor(shape=",
        ),
        (
            "TwoLabels",
            "acd",
            "has 2 features that could be a label (ClassLabel, or scalar integer that is not an id): a Tensor(shape=",
        ),
        ("NoImage", "ce", "has no feature that is an image (Image, or uint8 Tensor of rank 3): c ClassLabel(shape=()"),
        (
            "NoLabel",
            "a",
            "has no feature that is a label (ClassLabel, or scalar integer that is not an id): a Tensor(shape=(4, 4,",
        ),
    ):
        prepared(name, features)
        data_name = f"tfds:{''.join('_' * (i > 0 and c.isupper()) + c.lower() for i, c in enumerate(name))}"
        assert refused(data_name).startswith(f"data.name: {data_name!r} {why}")
    prepared("OnlyTrain", "ac", test=[])
    assert "has no split for testing, only train; accepted: splits train and test or valid" in refused(
        "tfds:only_train"
    )
    prepared("OnlyTest", "ac", train=[])
    assert "has no split train, only test; accepted: splits train and" in refused("tfds:only_test")


@pytest.mark.parametrize(("name", "own", "chosen"), [("id", None, False), ("imageId", None, False), ("id", "id", True)])
def test_an_id_is_no_label_unless_the_data_set_says_so(name: str, own: str | None, chosen: bool) -> None:
    import tensorflow_datasets as tf_datasets

    f = tf_datasets.features
    several = f.Sequence(f.ClassLabel(num_classes=3))
    features = f.FeaturesDict({"image": f.Image(shape=(5, 6, 3)), "label": several, name: np.int64})
    choose = lambda: tfds.choose_features(DataConfig(name="tfds:x"), features, own and ("image", own))  # noqa: E731
    if chosen:
        assert choose() == ("image", name, None)
    else:
        with pytest.raises(ConfigError, match="'tfds:x' has no feature that is a label"):
            choose()


def test_what_is_not_prepared_is_prepared(tfds_home: Path) -> None:
    import tensorflow_datasets as tf_datasets

    features = {
        "image": tf_datasets.features.Image(shape=(5, 6, 3)),
        "label": tf_datasets.features.ClassLabel(num_classes=2),
    }
    rows = [{"image": png(i), "label": i % 2} for i in range(4)]
    builder("PreparedLater", features, {"train": rows, "test": rows}, known=True)
    seen: list[str] = []
    config = DataConfig(name="tfds:prepared_later", image_size=4)
    assert len(sources.find(config).load(config, seen.append).train_images) == 4
    assert seen[0] == f"tensorflow-datasets downloads and prepares prepared_later/1.0.0 in {tfds_home}"
    seen.clear()
    sources.find(config).load(config, seen.append)
    assert len(seen) == 1
    assert seen[0].startswith("checking ")


def test_a_server_that_does_not_answer_is_asked_once(monkeypatch: pytest.MonkeyPatch, tfds_home: Path) -> None:
    import requests

    def fail(url: str, **_: Any) -> None:
        raise requests.ConnectionError("Name or service not known")

    monkeypatch.setattr(requests, "get", fail)
    heard: list[str] = []
    with pytest.raises(ConfigError, match=r"cannot be prepared \(ConnectionError: Name or service not known\)"):
        load("tfds:cifar10", notify=heard.append)
    assert heard == ["trying https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"]


def test_what_cannot_be_prepared_or_read(tfds_home: Path) -> None:
    import tensorflow_datasets as tf_datasets

    message = refused("tfds:no_such_data_set")
    assert "is not installed and cannot be prepared (DatasetNotFoundError: Dataset no_such_data_set not fo" in message
    features = {
        "image": tf_datasets.features.Image(shape=(5, 6, 3)),
        "label": tf_datasets.features.ClassLabel(num_classes=2),
    }
    rows = [{"image": png(i), "label": i % 2} for i in range(40)]
    prepare("Fine", features, {"train": rows, "test": rows})
    (records,) = tfds_home.glob("fine/1.0.0/fine-train.array_record*")
    content = bytearray(records.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(8)
    records.write_bytes(content)
    assert "that cannot be read: train[" in refused("tfds:fine")
    records.write_bytes(content[:100])
    assert "'tfds:fine' " in refused("tfds:fine")
    info = tfds_home / "fine" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for path in tfds_home.glob("fine/1.0.0/*array_record*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    assert refused("tfds:fine") == (
        "data.name: 'tfds:fine' cannot be read without TensorFlow; accepted: pip install -e \".[tensorflow]\", "
        "or a data set prepared by `tfds build fine --overwrite --file_format=array_record`"
    )


def test_fashion_mnist_that_is_prepared_goes_before_debians(tfds_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorflow_datasets as tf_datasets

    features = {
        "image": tf_datasets.features.Image(shape=(28, 28, 1)),
        "label": tf_datasets.features.ClassLabel(num_classes=10),
    }
    rows = [{"image": png(i, (28, 28), "L"), "label": i} for i in range(10)]
    prepare("FashionMnist", features, {"train": rows, "test": rows}, version="3.0.1")
    data = load("fashion_mnist")
    assert data.train_images.shape == (10, 4, 4, 1)
    np.testing.assert_array_equal(data.train_images[:, 0, 0, 0], data.train_labels)
    (tfds_home / "fashion_mnist" / "3.0.1" / "dataset_info.json").write_text("{")
    monkeypatch.setattr(files, "FASHION_MNIST", tfds_home / "nothing")
    seen: list[str] = []
    config = DataConfig(name="fashion_mnist", image_size=4)
    with pytest.raises(ConfigError, match="'fashion_mnist' is not installed"):  # Debian's
        sources.find(config).load(config, seen.append)
    assert seen[0].startswith(f"fashion_mnist in {tfds_home} cannot be used (")
    assert "\n" not in seen[0]
