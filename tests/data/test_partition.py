"""How images are distributed over clients, and what the server holds."""

import dataclasses
import tracemalloc
from typing import Any

import numpy as np
import pytest
from conftest import small_config

from lwfedssl_jax.config import ConfigError, PartitionConfig
from lwfedssl_jax.data.partition import PARTITIONS, partition, server_examples
from lwfedssl_jax.method.checks import check_method
from lwfedssl_jax.simulation import cohort, setup

LABELS = np.arange(1000) % 10


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
        PartitionConfig(kind="iid", clients=300, size_sigma=2.0),
        PartitionConfig(kind="quantity", clients=7, beta=0.5),
        PartitionConfig(kind="quantity", clients=800, beta=0.01),
        PartitionConfig(kind="quantity", clients=50, beta=0.01, allow_empty=True),
        PartitionConfig(kind="shards", clients=7),
        PartitionConfig(kind="shards", clients=500),
        PartitionConfig(kind="shards", clients=800, allow_empty=True),
        PartitionConfig(kind="shards", clients=7, shards_per_client=2**31 - 1, allow_empty=True),
        PartitionConfig(kind="iid", clients=50, size_sigma=1e30, allow_empty=True),
        PartitionConfig(kind="dirichlet", clients=50, beta=1e-6, allow_empty=True),
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


def test_shards_are_pieces_of_the_sorted_classes() -> None:
    clients = partition(PartitionConfig(kind="shards", clients=50, shards_per_client=2), LABELS, seed=0)
    assert clients.sizes.tolist() == [20] * 50
    classes = [len(np.unique(LABELS[c])) for c in clients]
    assert set(classes) == {1, 2}  # 100 shards of ten classes with 100 examples each
    assert classes.count(2) > 30
    (all_classes,) = partition(PartitionConfig(kind="shards", clients=1, shards_per_client=7), LABELS, seed=0)
    assert len(all_classes) == 1000


def test_quantity_has_the_sizes_of_a_dirichlet_and_the_classes_of_all() -> None:
    """A share has variance (1/K)(1 - 1/K) / (K beta + 1)."""
    config = PartitionConfig(kind="quantity", clients=5, beta=0.5, allow_empty=True)
    shares = np.array([partition(config, LABELS, seed=s).sizes / 1000 for s in range(200)])
    assert shares.var(axis=0).mean() == pytest.approx(0.2 * 0.8 / 3.5, rel=0.2)
    largest = max(partition(config, LABELS, seed=0), key=len)
    assert np.bincount(LABELS[largest]).min() > 0.5 * len(largest) / 10


def test_iid_sizes_may_be_log_normal() -> None:
    labels = np.zeros(200_000, int)
    sizes = partition(PartitionConfig(clients=1000, size_sigma=0.5), labels, seed=0).sizes
    assert np.std(np.log(sizes)) == pytest.approx(0.5, rel=0.1)
    assert np.ptp(partition(PartitionConfig(clients=1000), labels, seed=0).sizes) == 0


def test_natural_clients_are_the_data_sets_own() -> None:
    owner = np.repeat(np.arange(40), np.arange(5, 45))[:1000]
    owner = np.random.default_rng(0).permutation(owner)
    n = len(owner)
    clients = partition(PartitionConfig(kind="natural", clients=40), LABELS[:n], 3, owner)
    assert all((owner[c] == i).all() for i, c in enumerate(clients))
    assert sorted(np.concatenate(clients).tolist()) == list(range(n))
    config = PartitionConfig(kind="natural", clients=10)
    some = [partition(config, LABELS[:n], seed, owner) for seed in (3, 3, 4)]
    drawn = [[int(owner[c[0]]) for c in of_seed] for of_seed in some]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10
    assert all((np.sort(c) == np.flatnonzero(owner == i)).all() for i, c in zip(drawn[0], some[0], strict=True))
    shared = dataclasses.replace(config, server_share=0.1)
    held = server_examples(shared, LABELS[:n], 3)
    assert not set(held) & set(np.concatenate(partition(shared, LABELS[:n], 3, owner)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PartitionConfig(kind="natural", clients=4), "partition.clients: 4 is more than the data set's own 3 clients"),
        (
            PartitionConfig(kind="shards", clients=400, shards_per_client=3),
            "partition.shards_per_client: 3 for each of",
        ),
        (PartitionConfig(kind="quantity", clients=1001), "partition.clients: 1001 clients are more than the 1000"),
    ],
)
def test_more_clients_or_shards_than_there_are(config: PartitionConfig, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        partition(config, LABELS, 0, LABELS % 3)
    assert str(error.value).startswith(message)
    assert "; accepted: 1 to " in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [("beta", 1e-320, "at least 1e-06"), ("size_sigma", 1e30, "at least 0 and at most 10")],
)
def test_skews_that_no_float_can_hold(field: str, value: float, accepted: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_method(small_config(**{f"partition__{field}": value}))
    assert str(error.value) == f"partition.{field}: {value} is out of range; accepted: {accepted}"


def test_natural_without_clients() -> None:
    with pytest.raises(ConfigError, match=r"partition\.kind: natural needs .*; accepted here: iid, dirichlet, shards,"):
        partition(PartitionConfig(kind="natural"), LABELS, seed=0)


def test_more_clients_than_examples() -> None:
    with pytest.raises(ConfigError, match=r"partition\.clients: 1500 clients are more than the 1000 examples"):
        partition(PartitionConfig(clients=1500), LABELS, seed=0)


KINDS = [
    PartitionConfig(kind="iid", clients=7),
    PartitionConfig(kind="iid", clients=850),
    PartitionConfig(kind="iid", clients=1500, allow_empty=True),
    PartitionConfig(kind="dirichlet", clients=7, beta=0.5),
    PartitionConfig(kind="dirichlet", clients=800, beta=0.1),
    PartitionConfig(kind="dirichlet", clients=50, beta=0.01, allow_empty=True),
    PartitionConfig(kind="shared", clients=400, examples_per_client=20, size_sigma=0.5),
    PartitionConfig(kind="iid", clients=7, size_sigma=1.0),
    PartitionConfig(kind="shards", clients=60, shards_per_client=3),
    PartitionConfig(kind="quantity", clients=30, beta=0.3),
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
            "partition.clients: 501 clients are more than the 500 examples apart from the server's 500; accepted: 1",
        ),
        (
            {"server_share": 0.5, "kind": "shared", "examples_per_client": 501},
            "partition.examples_per_client: 501 is more than the data set has apart from the server's 500; accepted: 1",
        ),
    ],
)
def test_bad_server_share(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        partition(PartitionConfig(**changes), LABELS, seed=0)
    assert str(error.value).startswith(message)


def test_partition_initial_weights_and_training_are_seeded_apart() -> None:
    """``runtime.seed`` seeds what has no seed of its own."""

    def made(**changes: int) -> tuple[bytes, bytes, bytes]:
        run = setup.prepare(small_config(**{f"runtime__{name}": seed for name, seed in changes.items()}))
        clients = np.concatenate([np.sort(run.clients[i]) for i in range(len(run.clients))])
        weights = np.asarray(setup.initial_params(run)["encoder"]["blocks"]["fc1"]["kernel"])
        work = cohort.pack_cohort(run, [0], 1)
        assert work
        return clients.tobytes(), weights.tobytes(), next(work.calls)[0].examples.tobytes()

    zero, one = made(seed=0), made(seed=1)
    assert all(a != b for a, b in zip(zero, one, strict=True))
    mixed = made(seed=1, partition_seed=0, init_seed=0)
    assert mixed[:2] == zero[:2]
    assert mixed[2] != zero[2]
    assert made(seed=1, partition_seed=1, init_seed=1) == one
    assert made(seed=0, init_seed=1)[:2] == (zero[0], one[1])
