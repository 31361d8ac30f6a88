"""Sources and partitions."""

import dataclasses
import functools
import gzip
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from lwfedssl_jax.augment import RECIPES, normalise, two_views
from lwfedssl_jax.config import ConfigError, DataConfig, PartitionConfig
from lwfedssl_jax.data import sources
from lwfedssl_jax.data.partition import PARTITIONS, partition, server_examples

LABELS = np.arange(1000) % 10


def digits(size: int = 16) -> sources.Dataset:
    return sources.find(DataConfig()).load(DataConfig(image_size=size))


def test_digits_are_all_there_once_with_a_fixed_split() -> None:
    data = digits()
    assert data.train_images.shape == (1437, 16, 16, 1)
    assert data.test_images.shape == (360, 16, 16, 1)
    assert data.train_images.dtype == np.uint8
    assert data.train_images.max() == 255
    assert np.bincount(data.test_labels).min() >= 34
    every = np.concatenate([digits(8).train_images, digits(8).test_images]).reshape(1797, -1)
    from sklearn.datasets import load_digits

    original = load_digits()
    assert sorted(map(bytes, every)) == sorted(map(bytes, np.round(original.data * 255 / 16).astype(np.uint8)))
    again = digits()
    np.testing.assert_array_equal(data.train_images, again.train_images)


def test_synthetic_has_the_asked_size_and_is_reproducible() -> None:
    config = DataConfig(name="synthetic", image_size=12, synthetic_examples=300, synthetic_classes=4)
    data = sources.find(config).load(config)
    assert data.train_images.shape == (300, 12, 12, 3)
    assert data.test_images.shape == (75, 12, 12, 3)
    assert data.classes == 4
    assert np.bincount(data.train_labels).tolist() == [75] * 4
    np.testing.assert_array_equal(data.train_images, sources.find(config).load(config).train_images)


def test_synthetic_classes_survive_the_views() -> None:
    """A classifier of the plain images still knows most of the augmented ones; of shuffled labels it does not."""
    config = DataConfig(name="synthetic", image_size=16)
    source, data = sources.find(config), sources.find(config).load(config)
    recipe = RECIPES[source.views]
    views = jax.jit(lambda key, x: two_views(key, x, recipe))(jax.random.key(0), jnp.asarray(data.train_images))
    flat = lambda x: np.asarray(x).mean(-1).reshape(len(x), -1)  # noqa: E731
    classifier = KNeighborsClassifier(5).fit(flat(views[0]), data.train_labels)
    accuracy = classifier.score(flat(normalise(jnp.asarray(data.test_images), recipe)), data.test_labels)
    assert accuracy > 0.8
    # ... and they are not so plain that the untransformed pixels alone decide across views.
    assert float(jnp.abs(views[0] - views[1]).mean()) > 0.1


@pytest.mark.parametrize("name", ["cifar", "digits:x", "fashion_mnist:x", "tfds", "tfds:", ""])
def test_unknown_source(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.name: unknown .*accepted: digits, synthetic, fashion_mnist, tfds:NAME"
    ):
        sources.find(DataConfig(name=name))


def test_tfds_that_is_not_prepared() -> None:
    config = DataConfig(name="tfds:no_such_data_set")
    with pytest.raises(ConfigError, match=r"data\.name: 'tfds:no_such_data_set' is not installed"):
        sources.find(config).load(config)


def write_idx(path: Path, values: np.ndarray) -> None:
    sizes = b"".join(n.to_bytes(4, "big") for n in values.shape)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, values.ndim]) + sizes + values.tobytes()))


@pytest.fixture
def fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like the one of Debian's package, with 20 training and 10 test images."""
    for split, n in (("train", 20), ("t10k", 10)):
        images = np.random.default_rng(n).integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{split}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{split}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8) % 10)
    monkeypatch.setattr(sources, "FASHION_MNIST", tmp_path)
    return tmp_path


def load_fashion_mnist(size: int = 28) -> sources.Dataset:
    config = DataConfig(name="fashion_mnist", image_size=size)
    return sources.find(config).load(config)


@pytest.mark.usefixtures("fashion_mnist")
def test_fashion_mnist_is_what_the_idx_files_hold() -> None:
    data = load_fashion_mnist()
    expected = np.random.default_rng(20).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    np.testing.assert_array_equal(data.train_images, expected[..., None])
    assert data.test_images.shape == (10, 28, 28, 1)
    assert data.train_labels.tolist() == [i % 10 for i in range(20)]
    assert (data.train_labels.dtype, data.classes) == (np.int32, 10)
    assert load_fashion_mnist(16).train_images.shape == (20, 16, 16, 1)
    assert RECIPES[sources.find(DataConfig(name="fashion_mnist")).views] is RECIPES["fashion"]


def test_fashion_mnist_that_is_not_installed(fashion_mnist: Path) -> None:
    (fashion_mnist / "t10k-labels-idx1-ubyte.gz").unlink()
    message = r"data\.name: 'fashion_mnist' is not installed \(no .*t10k-labels-idx1-ubyte\.gz\); accepted: Debian's"
    with pytest.raises(ConfigError, match=message) as error:
        load_fashion_mnist()
    assert "tfds:fashion_mnist" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("images-idx3", b"not gzip", "Not a gzipped file"),
        ("images-idx3", gzip.compress(bytes(5000))[:-9], "end-of-stream"),
        ("images-idx3", gzip.compress(bytes([0, 0, 8])), "does not begin like an idx3 file"),
        ("images-idx3", gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 0]) + bytes(20)), "does not begin like an idx3 file"),
        ("labels-idx1", gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 20]) + bytes(19)), "19 bytes for the shape (20,)"),
        ("labels-idx1", gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 20]) + bytes([10] * 20)), "a label 10"),
        ("images-idx3", np.zeros((19, 28, 28), np.uint8), "shape is (19, 28, 28) where there are 20 labels"),
        ("images-idx3", np.zeros((20, 28, 27), np.uint8), "shape is (20, 28, 27)"),
    ],
)
def test_fashion_mnist_that_is_damaged(fashion_mnist: Path, name: str, content: bytes | np.ndarray, why: str) -> None:
    path = fashion_mnist / f"train-{name}-ubyte.gz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_idx(path, content)
    with pytest.raises(ConfigError) as error:
        load_fashion_mnist()
    assert str(error.value).startswith(f"data.name: 'fashion_mnist' cannot be read, {path} is damaged (")
    assert why in str(error.value)
    assert "accepted: the file of Debian's package" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not sources.FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian() -> None:
    data = load_fashion_mnist()
    assert (len(data.train_images), len(data.test_images)) == (60000, 10000)
    assert np.bincount(data.train_labels).tolist() == [6000] * 10
    assert data.train_images.mean() / 255 == pytest.approx(RECIPES["fashion"].mean, abs=1e-3)
    assert data.train_images.std() / 255 == pytest.approx(RECIPES["fashion"].std, abs=1e-3)


PREPARE = """
import sys, numpy as np, tensorflow_datasets as tfds

class TinyImages(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Tensor(shape=(8, 8, 1), dtype=np.uint8)
        features = tfds.features.FeaturesDict({"image": image, sys.argv[1]: tfds.features.ClassLabel(num_classes=3)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        return {"train": self._generate_examples(12), "test": self._generate_examples(6)}

    def _generate_examples(self, n):
        for i in range(n):
            yield i, {"image": np.full((8, 8, 1), i, np.uint8), sys.argv[1]: i % 3}

TinyImages(file_format="array_record").download_and_prepare()
"""
READ = """
from lwfedssl_jax.config import DataConfig
from lwfedssl_jax.data import sources

config = DataConfig(name="tfds:tiny_images", image_size=4)
data = sources.find(config).load(config)
assert data.train_images.shape == (12, 4, 4, 3), data.train_images.shape
assert data.test_images.shape == (6, 4, 4, 3)
assert sorted(data.train_images[:, 3, 0, 2].tolist()) == list(range(12))
assert (data.train_images[:, 0, 0, 0] % 3 == data.train_labels).all()
"""


def test_tfds_reads_what_is_prepared_on_disk(tmp_path: Path) -> None:
    """In processes of their own: tensorflow-datasets fixes its folder when it is imported."""
    for label, message in (("label", ""), ("species", "'tfds:tiny_images' has no feature 'label'")):
        environment = os.environ | {"TFDS_DATA_DIR": str(tmp_path / label)}
        run = functools.partial(subprocess.run, env=environment, capture_output=True, text=True)
        run([sys.executable, "-c", PREPARE, label], check=True)
        done = run([sys.executable, "-c", READ])
        assert message in done.stderr
        assert done.returncode == (1 if message else 0), done.stderr


@pytest.mark.parametrize(
    "config",
    [
        PartitionConfig(kind="iid", clients=7),
        PartitionConfig(kind="iid", clients=1000),
        PartitionConfig(kind="dirichlet", clients=7, beta=0.5),
        PartitionConfig(kind="dirichlet", clients=100, beta=0.01),
        PartitionConfig(kind="dirichlet", clients=1000, beta=0.1),
        PartitionConfig(kind="dirichlet", clients=50, beta=0.01, allow_empty=True),
        PartitionConfig(kind="iid", clients=1500, allow_empty=True),
    ],
)
def test_every_example_is_on_exactly_one_client(config: PartitionConfig) -> None:
    clients = partition(config, LABELS, seed=3)
    assert len(clients) == config.clients
    assert sorted(np.concatenate(clients).tolist()) == list(range(1000))
    if not config.allow_empty:
        assert min(map(len, clients)) >= 1
    again, other = partition(config, LABELS, seed=3), partition(config, LABELS, seed=4)
    assert all(np.array_equal(a, b) for a, b in zip(clients, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(clients, other, strict=True))


def test_shared_clients_draw_their_own_examples_and_may_outnumber_them() -> None:
    config = PartitionConfig(kind="shared", clients=5000, examples_per_client=20, size_sigma=0.5)
    clients = partition(config, LABELS, seed=3)
    assert len(clients) == 5000
    assert np.median(clients.sizes) == 20
    assert np.std(np.log(clients.sizes)) == pytest.approx(0.5, rel=0.05)
    for i in (0, 77, 4999):
        assert len(set(clients[i].tolist())) == clients.sizes[i]
        np.testing.assert_array_equal(clients[i], partition(config, LABELS, seed=3)[i])
        assert set(clients[i].tolist()) != set(partition(config, LABELS, seed=4)[i].tolist())
    counts = np.bincount(np.concatenate([clients[i] for i in range(1000)]), minlength=1000)
    assert 0.5 < counts.mean() / counts.std() / np.sqrt(counts.mean()) < 2  # as if drawn uniformly
    with pytest.raises(IndexError):
        clients[5000]


def test_shared_clients_of_more_examples_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"partition\.examples_per_client: 1001 .*accepted: 1 to 1000"):
        partition(PartitionConfig(kind="shared", examples_per_client=1001), LABELS, seed=0)


def test_a_million_clients_cost_a_few_integers_each() -> None:
    tracemalloc.start()
    clients = partition(PartitionConfig(kind="shared", clients=10**6, size_sigma=1.0), LABELS, seed=0)
    many = partition(PartitionConfig(kind="iid", clients=10**6, allow_empty=True), LABELS, seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(clients) == len(many) == 10**6
    assert peak < 50e6
    assert sum(len(many[i]) for i in range(0, 10**6, 1000)) == many.sizes[::1000].sum()


def test_beta_sets_the_skew() -> None:
    """Mean share of a client's largest class: near 1 for tiny beta, near 0.1 for large."""

    def largest_share(beta: float) -> float:
        clients = partition(PartitionConfig(kind="dirichlet", clients=10, beta=beta), LABELS, seed=0)
        return float(np.mean([np.bincount(LABELS[c], minlength=10).max() / len(c) for c in clients]))

    assert largest_share(0.05) > 0.5 > largest_share(1.0) > largest_share(100.0)
    assert largest_share(100.0) < 0.15


def test_beta_gives_the_shares_of_a_dirichlet() -> None:
    """A class's share on one client has variance (1/K)(1 - 1/K) / (K beta + 1)."""
    config = PartitionConfig(kind="dirichlet", clients=5, beta=0.5, allow_empty=True)
    labels = np.zeros(2000, int)
    shares = [len(partition(config, labels, seed=s)[0]) / 2000 for s in range(400)]
    assert np.mean(shares) == pytest.approx(0.2, abs=0.04)
    assert np.var(shares) == pytest.approx(0.2 * 0.8 / 3.5, rel=0.2)


def test_more_clients_than_examples() -> None:
    with pytest.raises(ConfigError, match=r"partition\.clients: 1500 clients cannot share 1000 examples"):
        partition(PartitionConfig(clients=1500), LABELS, seed=0)


KINDS = [
    PartitionConfig(kind="iid", clients=7),
    PartitionConfig(kind="iid", clients=850),
    PartitionConfig(kind="iid", clients=1500, allow_empty=True),
    PartitionConfig(kind="dirichlet", clients=7, beta=0.5),
    PartitionConfig(kind="dirichlet", clients=800, beta=0.1),
    PartitionConfig(kind="dirichlet", clients=50, beta=0.01, allow_empty=True),
    PartitionConfig(kind="shared", clients=400, examples_per_client=20, size_sigma=0.5),
]


@pytest.mark.parametrize("config", KINDS, ids=lambda c: f"{c.kind}-{c.clients}")
def test_the_server_and_the_clients_own_everything_once(config: PartitionConfig) -> None:
    config = dataclasses.replace(config, server_share=0.15)
    server, clients = server_examples(config, LABELS, seed=3), partition(config, LABELS, seed=3)
    assert server.tolist() == sorted(set(server.tolist()))
    assert len(server) == 150
    assert len(clients) == config.clients
    assert [len(c) for c in clients] == clients.sizes.tolist()
    owned = np.concatenate(clients).tolist()
    assert set(owned) == set(range(1000)) - set(server.tolist())
    if config.kind != "shared":
        assert len(owned) == 850
    np.testing.assert_array_equal(server, server_examples(config, LABELS, seed=3))
    assert server.tolist() != server_examples(config, LABELS, seed=4).tolist()


@pytest.mark.parametrize("config", KINDS, ids=lambda c: f"{c.kind}-{c.clients}")
def test_without_a_share_the_server_holds_nothing_and_changes_nothing(config: PartitionConfig) -> None:
    assert server_examples(config, LABELS, seed=3).tolist() == []
    expected = PARTITIONS[config.kind](config, LABELS, 3)
    assert all(np.array_equal(a, b) for a, b in zip(partition(config, LABELS, seed=3), expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server_share": 1.0}, "partition.server_share: 1.0 gives the server 1000 of 1000 examples; accepted: 0, or"),
        ({"server_share": 0.9999, "allow_empty": True}, "partition.server_share: 0.9999 gives the server 1000 of"),
        ({"server_share": 0.001}, "partition.server_share: 0.001 gives the server 1 of 1000 examples; accepted: 0, or"),
        ({"server_share": 1e-9, "kind": "shared"}, "partition.server_share: 1e-09 gives the server 0 of 1000"),
        (
            {"server_share": 0.5, "clients": 501},
            "partition.clients: 501 clients cannot share 500 examples besides the server's 500; accepted: 1 to 500, or",
        ),
        (
            {"server_share": 0.5, "kind": "shared", "examples_per_client": 501},
            "partition.examples_per_client: 501 is more than the data set has besides the server's 500; accepted: 1 to",
        ),
    ],
)
def test_bad_server_share(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        partition(PartitionConfig(**changes), LABELS, seed=0)
    assert str(error.value).startswith(message)
