"""Clients of a plan, and the same ones in a run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import small_config
from fleets import LARGE_BOX, PAPER, SMALL_PHONE, between_stages, equal_clients, option

from lwfedssl_jax.config import ConfigError, device_classes, resolve
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.costs import fleet
from lwfedssl_jax.experiment import train
from lwfedssl_jax.experiment.active import on_fleet
from lwfedssl_jax.method import stages
from lwfedssl_jax.plan import make
from lwfedssl_jax.plan.clients import Clients, make_clients
from lwfedssl_jax.simulation.setup import Cache, prepare
from lwfedssl_jax.workdir import WorkDir


def test_shares_and_from_which_stage_a_class_is_out() -> None:
    growing = option("progressive", 0.5, 1.0, 1.5, 3.5)
    assert growing.shares == [1, 1, 0.25, 0]
    assert growing.everywhere == 0
    assert growing.left[2] == (3, 0.75, 0.75)
    assert [fleet.stages_text(part.stages, 4) for part in growing.parts] == ["out from 3", "out from 4"]
    assert fleet.stages_text([], 4) == "out"
    assert fleet.stages_text([1, 2, 3, 4], 4) == "yes"
    assert fleet.stages_text([2, 3, 5], 6) == "only 2-3,5"


def test_clients_are_dealt_as_train_deals_them_or_as_given() -> None:
    devices = [SMALL_PHONE, LARGE_BOX]

    def of(*given: str, **changes: Any) -> Clients:
        return make_clients(resolve(small_config(**changes)), devices, given, lambda _: None)

    shared = {"partition__kind": "shared", "partition__examples_per_client": 30, "partition__size_sigma": 1.0}
    for changes in ({}, {"partition__server_share": 0.5}, shared, {"data__name": "digits"}):
        config = resolve(small_config(**changes))
        dealt, trained = of(**changes), prepare(config)
        assert dealt.dealt
        np.testing.assert_array_equal(dealt.sizes, np.where(trained.clients.sizes > 1, trained.clients.sizes, 0))
    assert of("7").sizes.tolist() == [7, 7]
    assert of("7").weights.tolist() == [3, 1]  # four clients, three quarters of them phones
    spread = of("p10=200", "p50=600", "p90=3000")
    assert spread.number == pytest.approx(4)
    assert spread.quantiles == pytest.approx({"p10": 200, "p50": 600, "p90": 3000}, rel=0.01)
    assert (spread.sizes.min(), spread.sizes.max()) == (200, 3000)
    assert of("p10=200 p50=600").quantiles["p90"] == 600
    for given in (["0"], ["1.5"], ["p50=3", "7"], ["p10=5", "p10=6"], ["p10=9", "p90=3"], ["p101=3"], ["p50=0"], [" "]):
        with pytest.raises(ConfigError, match=r"^--examples: .*; accepted: "):
            of(*given)
    for name in ("folder:x", "tfds:cifar10"):
        with pytest.raises(ConfigError, match=rf"^--examples: missing, .* data.name {name}: .*; accepted: a whole"):
            of(data__name=name)
    assert of("7", data__name="folder:x").mean == 7


@pytest.mark.usefixtures("priced")
@pytest.mark.parametrize("fleets", [8, 200])
def test_train_leaves_out_the_clients_that_the_plan_says(fleets: int) -> None:
    """Over random fleets, deadlines, partitions and seeds; both price steps by the same rule."""
    rng, cache, out = np.random.default_rng(0), Cache(), 0
    for _ in range(fleets):
        devices = tuple(
            f"d{i} count={rng.integers(1, 9)} memory_gb={rng.choice([1e-3, 1e-2, 1])} gflops={rng.uniform(0.01, 2)} "
            f"uplink_mbps={rng.uniform(0.1, 3)} downlink_mbps={rng.uniform(0.1, 3)}"
            for i in range(rng.integers(1, 4))
        )
        config = resolve(
            small_config(
                data__synthetic_examples=400,
                strategy__name=str(rng.choice(["layerwise", "progressive", "end_to_end"])),
                partition__kind=str(rng.choice(["dirichlet", "quantity", "shared"])),
                partition__beta=0.3,
                partition__clients=int(rng.integers(4, 60)),
                partition__size_sigma=1.0,
                runtime__seed=int(rng.integers(0, 5)),
                fleet__devices=devices,
                fleet__deadline_seconds=float(rng.choice([0, 0.05, 0.5])),
            )
        )
        classes = device_classes(config)
        planned = make.make_plan(config, make_clients(config, classes, [], lambda _: None))
        name = config.strategy.name, len(stages.stage_depths(config)), False
        (mine,) = (o for o in planned.options if (o.strategy, len(o.left), o.remat) == name)
        run = prepare(config, cache=cache)
        try:
            fleet_of_run = on_fleet(run, lambda _: None, cache).fleet
        except ConfigError:
            assert 1.0 in [left.share for left in mine.left] or min(run.clients.sizes) < 2
            continue
        assert fleet_of_run
        images = np.where(run.clients.sizes > 1, run.clients.sizes, 0)  # simclr learns nothing from one
        for left, can in zip(mine.left, fleet_of_run.can.values(), strict=True):
            assert left.clients == np.count_nonzero(~can)
            assert left.images == pytest.approx((images * ~can).sum() / images.sum())
            out += np.count_nonzero(~can) > 0
    assert out > fleets / 4


@pytest.mark.usefixtures("priced")
def test_a_class_that_cannot_afford_a_stage_takes_no_part_in_it(tmp_path: Path) -> None:
    gb = between_stages()
    devices = (f"phone count=3 memory_gb={gb} gflops=1 uplink_mbps=1 downlink_mbps=1", "box count=1 memory_gb=1")
    config = small_config(strategy__name="progressive", fleet__devices=devices)
    workdir = WorkDir(tmp_path, config)
    summary = train.train(config, workdir)
    rounds = [line for line in workdir.metrics() if "event" not in line]
    assert [(line["clients"], line["cannot_afford"]) for line in rounds] == [(4, 0), (4, 0), (1, 3)]
    phone, box = summary["fleet"]
    assert (phone["clients"], phone["stages"], phone["clients_by_stage"]) == (3, [1, 2], [3, 3, 0])
    assert phone["round_seconds_by_stage"][1] > phone["round_seconds_by_stage"][0] > 0
    assert phone["round_seconds_by_stage"][2] is None
    assert (box["clients"], box["stages"], box["round_seconds_by_stage"]) == (1, [1, 2, 3], [None] * 3)


@pytest.mark.usefixtures("priced")
def test_a_stage_that_nobody_can_afford_is_refused() -> None:
    config = small_config(strategy__name="progressive", fleet__devices=(f"a count=1 memory_gb={between_stages()}",))
    with pytest.raises(ConfigError, match=r"^fleet.devices: no client can take part in stage 3 of 3, .*; accepted: "):
        train.train(config, None)


def test_time_is_unknown_unless_all_classes_with_clients_have_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = DeviceClass("slow", 1, 3.0, 0.01, 80.0, 80.0)
    unknown = DeviceClass("unknown", 1, 3.0)
    costs: Any = option("layerwise", 0.5).ledger

    def seconds(*devices: DeviceClass, clients: Clients | None = None) -> float:
        return make.make_option(PAPER, costs, devices, clients or equal_clients(*devices)).seconds

    assert seconds(LARGE_BOX) > 0
    assert seconds(LARGE_BOX, unknown) == 0
    assert seconds(LARGE_BOX, slow) > 50 * seconds(LARGE_BOX)
    only_box = equal_clients(LARGE_BOX, slow)._replace(classes=np.array([0, 0]))
    assert seconds(LARGE_BOX, slow, clients=only_box) == seconds(LARGE_BOX)


def test_clients_without_images_do_not_make_an_option_fit() -> None:
    peak = option("layerwise", 2.0).ledger
    empty = equal_clients(SMALL_PHONE, LARGE_BOX)._replace(sizes=np.array([5, 5, 5, 0]))
    made = make.make_option(PAPER, peak, [SMALL_PHONE, LARGE_BOX], empty)
    assert made.everywhere == 0
    assert made.left[0].clients == 3
