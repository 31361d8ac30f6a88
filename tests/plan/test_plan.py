"""The plan: options, shares, the recommendation, and fleets in a run."""

import copy
import html as html_module
import io
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import SMALL, known_traces, small_config
from rich.console import Console

from lwfedssl_jax import cli
from lwfedssl_jax.cli.options import TrainOptions, parse
from lwfedssl_jax.config import Config, ConfigError, device_classes, flat, join_lists, load, override, resolve, to_dict
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.costs import fleet, operations, stored
from lwfedssl_jax.costs import ledger as ledger_module
from lwfedssl_jax.costs.ledger import ledgers_of, make_ledger
from lwfedssl_jax.costs.memory import lower_step
from lwfedssl_jax.experiment import train
from lwfedssl_jax.experiment.active import on_fleet
from lwfedssl_jax.method import stages
from lwfedssl_jax.method.programs import ledger_config
from lwfedssl_jax.plan import make, measured, recommend, show
from lwfedssl_jax.plan.clients import Clients, make_clients
from lwfedssl_jax.plan.frontier import frontier
from lwfedssl_jax.plan.measured import Measured
from lwfedssl_jax.plan.options import Option, each_option
from lwfedssl_jax.plan.published import closest, unlike
from lwfedssl_jax.simulation.setup import Cache, prepare
from lwfedssl_jax.workdir import WorkDir

FLAGS = [
    word
    for name, value in SMALL.items()
    for word in ("--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else [value]))
]
SMALL_PHONE = DeviceClass("phone", 3, 1.0, 1.0, 8.0, 8.0)
LARGE_BOX = DeviceClass("box", 1, 3.0, 10.0, 80.0, 80.0)
PAPER = resolve(load("paper/vit_tiny_mocov3"))


def equal_clients(*devices: DeviceClass, examples: float = 1) -> Clients:
    """One client for each device, all with as many images."""
    counts = [device.count for device in devices]
    number = sum(counts)
    return Clients(np.full(number, examples), np.repeat(np.arange(len(devices)), counts), np.ones(number), True)


def option(strategy: str, *peaks_gb: float, flops: float = 1e9, traffic: int = 1000, **of: Any) -> Option:
    """An option of one round a stage."""
    rows = [
        {"stage": s, "rounds": 1, "depth": s, "flops_executed": flops, "download_bytes": traffic,
         "upload_bytes": traffic, "frozen_bytes": 0, "peak_memory_bytes": gb * 1e9}
        for s, gb in enumerate(peaks_gb, 1)
    ]  # fmt: skip
    ledger: Any = {
        "per_stage": rows,
        "peak_memory_bytes": max(peaks_gb) * 1e9,
        "total_bytes": 2 * traffic * len(rows),
        "flops_executed": flops * len(rows),
    }
    layers, devices = of.get("layers", 1), [SMALL_PHONE, LARGE_BOX]
    fields = {"strategy.name": strategy, "strategy.layers_per_stage": layers, "runtime.remat": of.get("remat", False)}
    made = make.make_option(override(PAPER, fields), ledger, devices, equal_clients(*devices))
    published = closest(PAPER).accuracy(strategy, layers)
    return made._replace(measured=of.get("measured"), published=published)


def advise(*options: Option, protocol: str = "", **more: Any) -> recommend.Recommendation:
    devices = [SMALL_PHONE, LARGE_BOX]
    return recommend.recommend(Config(), devices, options, protocol, closest(PAPER), dealt=True, **more)


def chosen(*options: Option, protocol: str = "", **more: Any) -> tuple[Option | None, str]:
    found = advise(*options, protocol=protocol, **more)
    return found.option, found.reason


def test_shares_and_from_which_stage_a_class_is_out() -> None:
    growing = option("progressive", 0.5, 1.0, 1.5, 3.5)
    assert growing.shares == [1, 1, 0.25, 0]
    assert growing.everywhere == 0
    assert growing.left[2] == (3, 0.75, 0.75)
    assert [fleet.stages_text(part.stages, 4) for part in growing.parts] == ["out from 3", "out from 4"]
    assert fleet.stages_text([], 4) == "out"
    assert fleet.stages_text([1, 2, 3, 4], 4) == "yes"
    assert fleet.stages_text([2, 3, 5], 6) == "only 2-3,5"


def test_the_largest_share_decides_then_the_published_accuracy_then_time_then_traffic() -> None:
    layerwise, growing = option("layerwise", 0.9, 0.9), option("progressive", 0.5, 1.5)
    whole = option("end_to_end", 1.0)
    assert chosen(whole, layerwise, growing)[0] is whole
    assert chosen(layerwise, growing)[0] is layerwise
    slow, dear, good = (option("progressive", 0.5, 0.6, **x) for x in ({"flops": 2e9}, {"traffic": 2000}, {}))
    assert chosen(whole, layerwise, slow, dear, good)[0] is good
    assert chosen(slow, dear)[0] is dear
    best, reason = chosen(option("layerwise", 2.0), growing)
    assert best
    assert best.strategy == "progressive"
    assert "25 % of the clients, the most that any option reaches, can take part in every stage" in reason
    assert "Left out: stage 1: none; stage 2: 3 clients with 75 % of the images." in reason
    assert (
        "phone: every option needs 1.5 GB or more (progressive, 1 layer per stage), 0.5 GB above what it has" in reason
    )


def test_measured_accuracy_goes_before_the_published_order() -> None:
    whole, growing = option("end_to_end", 0.9), option("progressive", 0.5, 0.9)
    layerwise = option("layerwise", 0.5, 0.5, measured=Measured(dict.fromkeys(range(3), 0.9)))
    excluding = option("end_to_end", 2.0, measured=Measured({0: 0.99}))
    best, reason = chosen(whole, growing, layerwise, excluding, protocol="knn")
    assert best is layerwise
    assert "highest measured accuracy, 90.0 % (kNN, mean of 3 seeds)" in reason
    best, reason = chosen(whole, growing, excluding, protocol="knn")
    assert best is growing
    assert "none of them is in the results by kNN" in reason


def test_what_is_not_shown_to_be_better_is_said() -> None:
    def reached(strategy: str, *accuracies: float) -> Option:
        return option(strategy, 0.5, measured=Measured(dict(enumerate(accuracies))))

    best, near = reached("progressive", 0.80, 0.84, 0.85), reached("end_to_end", 0.81, 0.82, 0.85)
    far, once = reached("layerwise", 0.70, 0.74, 0.76), reached("other", 0.79)
    found, reason = chosen(far, near, best, protocol="knn")
    assert found is best
    assert "It is not shown to be better than end_to_end (+0.3 points, adjusted p = 0.74)." in reason
    assert "not shown to be better than other (+1.0 points, 1 common seed: no test)" in chosen(best, once)[1]
    assert "not shown" not in chosen(best, far)[1]
    assert "not shown" not in chosen(best, best._replace(remat=True))[1]
    assert "not shown to be better than end_to_end" in chosen(best, best._replace(strategy="end_to_end"))[1]
    elsewhere = option("other", 0.5, measured=Measured({7: 0.1}))
    assert (
        "better than end_to_end (+0.3 points, adjusted p = 0.74); other (no common seed: no test)."
        in (chosen(best, near, elsewhere)[1])
    )
    shared = option("other", 0.5, measured=Measured({0: 0.82, 1: 0.861, 2: 0.87, 3: 0.1}))
    assert "not shown to be better than other (-2.0 points, adjusted p = " in chosen(best, shared)[1]


def test_where_nothing_fits_the_nearest_is_said() -> None:
    best, reason = chosen(option("end_to_end", 8.0), option("layerwise", 4.0, 4.5))
    assert best is None
    assert reason.startswith("No class can take part in every stage of any option.")
    assert "phone: every option needs 4.5 GB or more (layerwise, 1 layer per stage), 3.5 GB above" in reason
    assert "optimizer.batch_size 256" in reason  # of 512; the box has two thirds of what it needs


def test_options_are_distinct() -> None:
    found, refused = each_option(small_config(model__depth=4, federation__rounds=3))
    each = [("end_to_end", 4), *((name, 2) for name in ("layerwise", "progressive"))]
    assert set(found) == {(name, k, remat) for name, k in each for remat in (False, True)}
    assert set(refused) == {f"{name}, 1 layer per stage" for name in ("layerwise", "progressive")}
    assert all((c.strategy.name, c.strategy.layers_per_stage, c.runtime.remat) == key for key, c in found.items())


def test_options_together_are_priced_as_each_alone() -> None:
    found, _ = each_option(small_config(model__depth=2))
    assert ledgers_of(found, memory=False) == {key: make_ledger(config) for key, config in found.items()}


def test_what_options_share_is_traced_once() -> None:
    found, _ = each_option(small_config(model__depth=2))
    known: dict[Any, Any] = {}
    steps = [lower_step(c, part, known)[0] for c in found.values() for part in operations.stage_parts(c)]
    assert len(steps) == 2 * (1 + 2 + 2)
    assert len({step.as_text() for step in steps}) == len(known) == 2 * 3  # layer 1, layer 2, both; remat or not


def test_published_accuracies_rank_options_and_the_settings_that_differ_are_named() -> None:
    table = closest(PAPER)
    assert table.accuracy("progressive", 6) == 0.6572
    assert table.accuracy("progressive", 5) == table.accuracy("progressive", 4) == 0.647
    assert table.accuracy("layerwise", 2) > table.accuracy("end_to_end", 12) > table.accuracy("layerwise", 1)
    assert table.accuracy("a_users_own", 1) is None
    assert unlike(PAPER, table) == ["data.name tfds:cifar10 (published: COCO's images)"]
    drawn = closest(override(PAPER, {"partition.clients": 40, "federation.clients_per_round": 9}))
    assert "25 of 100 clients per round" in drawn.setting
    assert drawn.accuracy("end_to_end", 12) == 0.7185
    assert drawn.accuracy("layerwise", 6) == pytest.approx(0.8433 + 0.8658 - 0.8343)
    assert "25 % drop out" in closest(override(PAPER, {"federation.dropout": 0.2})).setting
    assert "ResNet-18" in closest(resolve(load("paper/resnet18_mocov3_layerwise"))).setting
    quick = resolve(load("quickstart"))
    assert "partition.kind dirichlet (published: iid)" in unlike(quick, closest(quick))
    assert "strategy.first_stage_share 0.72 (published: even stages)" in unlike(quick, closest(quick))


def test_the_most_layers_that_fit_win_and_the_next_steps_are_named() -> None:
    """As with the paper's config and 4 GB: progressive with 6 layers and remat, without remat layerwise with 4."""
    layerwise = [option("layerwise", 0.1 * k, 0.1 * k, layers=k, flops=k * 1e9) for k in (1, 4, 6)]
    growing = [
        option("progressive", 0.6, 2, layers=6),
        option("progressive", 0.6, 0.9, layers=6, remat=True, flops=9e9),
    ]
    found = advise(*layerwise, *growing)
    assert found.option is growing[1]
    assert found.reason.startswith("progressive, 6 layers per stage, with runtime.remat: all clients")
    assert "highest published accuracy, 65.7 % (arXiv 2401.11647, on other data)" in found.reason
    assert "Without runtime.remat, the choice is layerwise, 6 layers per stage, 100 % of the clients." in found.reason
    assert found.up is None
    assert found.down is layerwise[2]
    words = recommend.step_words(layerwise[2], growing[1], [SMALL_PHONE, LARGE_BOX])
    assert words.startswith("layerwise, 6 layers per stage: -1.1 points of published accuracy; time ")
    assert "the same traffic per device; peak memory 0.6 GB instead of 0.9 GB" in words
    assert advise(*layerwise, *growing, aim="cheapest").option is layerwise[0]
    assert advise(*layerwise, growing[0], aim="accuracy").option is growing[0]
    assert advise(*layerwise, growing[0]).option is layerwise[2]
    up = advise(*layerwise, growing[0]).up
    assert up is growing[0]
    assert "25 % instead of 100 % of the clients throughout (none of phone)" in recommend.step_words(
        up, layerwise[2], [SMALL_PHONE, LARGE_BOX]
    )
    worse = option("layerwise", 0.7, 0.7, layers=6, flops=9e9)
    assert worse not in frontier([*layerwise, worse])
    assert layerwise[2] in frontier([*layerwise, worse])


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


def row(config: Config, accuracy: float, **changes: Any) -> dict[str, Any]:
    fields = join_lists(flat(to_dict(config)))
    scores = {"accuracy.knn": accuracy, "accuracy.linear_probe_all": accuracy + 0.1, "accuracy.fine_tune": math.nan}
    return fields | scores | {"finished": True} | {name.replace("__", "."): v for name, v in changes.items()}


def test_accuracies_are_means_over_runs_that_are_like_the_config() -> None:
    config = small_config()
    rows = [
        row(config, 0.5),
        row(config, 0.7, runtime__seed=1, runtime__remat=True),
        row(config, 0.1, finished=False),
        row(config, 0.1, partition__beta=9.0),
        row(config, 0.1, fleet__devices="phone count=1 memory_gb=1"),
        row(config, 0.6, strategy__name="end_to_end"),
        row(config, 0.1, strategy__pacing="adaptive"),
    ]
    layers, whole = ((0, 1, 1), (1, 2, 1), (2, 3, 1)), ((0, 3, 3),)  # with the rounds of each stage
    found = {layers: Measured({0: 0.5, 1: 0.7}), whole: Measured({0: 0.6})}
    assert found[layers].accuracy == pytest.approx(0.6)
    assert found[layers].std == pytest.approx(math.sqrt(0.02))
    assert math.isnan(found[whole].std)
    both = {(stages, remat): measured for stages, measured in found.items() for remat in (False, True)}
    assert measured.measured_accuracies(config, rows, "knn") == ("knn", False, both)
    assert measured.measured_accuracies(config, rows, None).protocol == "knn"  # as a report leads
    on_fleet = small_config(fleet__devices=("phone count=1 memory_gb=1",))
    assert measured.measured_accuracies(on_fleet, rows, "knn") == ("knn", True, {(layers, False): Measured({0: 0.1})})
    hurried = row(config, 0.9, fleet__devices=rows[4]["fleet.devices"], fleet__deadline_seconds=60.0)
    assert measured.measured_accuracies(on_fleet, [*rows, hurried], "knn").found == {
        (layers, False): Measured({0: 0.1})
    }
    assert measured.measured_accuracies(on_fleet, [rows[0], hurried], "knn")[1] is False
    before_fleets = row(config, 0.5, fleet__devices=math.nan, fleet__deadline_seconds=math.nan)
    assert measured.measured_accuracies(config, [before_fleets], "knn").found[layers, False] == Measured({0: 0.5})
    other = row(config, 0.5) | {"data.fingerprint": "22"}
    assert measured.measured_accuracies(config, [*rows, other], "knn").found
    rows[0] |= {"data.fingerprint": "11"}
    with pytest.raises(
        ConfigError, match=r"^--results: 5 runs .* trained on 2 different data sets .* '22'\); accepted"
    ):
        measured.measured_accuracies(config, [*rows, other], "knn")
    with pytest.raises(
        ConfigError, match=r"^--protocol: fine_tune has evaluated none .*; accepted: knn, linear_probe_all"
    ):
        measured.measured_accuracies(config, rows, "fine_tune")
    with pytest.raises(ConfigError, match=r"none like this config: partition.beta is 9.0 there, 0.5 here; accepted: "):
        measured.measured_accuracies(config, rows[3:4], None)


FLEET = "name,count,memory_gb,gflops,uplink_mbps,downlink_mbps,watts\nphone,3,{},0.5,1,1,2\nbox,1,1,5,10,10,30\n"


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step needs a thousand bytes a trainable parameter; nothing is compiled for it."""
    made: dict[Any, Any] = {}

    def make_known(config: Config) -> Any:
        key = override(ledger_config(config), {"partition.clients": 1})
        if key not in made:
            made[key] = make_ledger(config, known_traces())
        return copy.deepcopy(made[key])

    def cheap(configs: dict[Any, Config], *, memory: bool, **_: Any) -> dict[Any, Any]:
        ledgers = {name: make_known(config) for name, config in configs.items()}
        for ledger in ledgers.values():
            for row in ledger["per_stage"]:
                row["peak_memory_bytes"] = 1000 * row["trainable_parameters"]
            ledger["peak_memory_bytes"] = max(row["peak_memory_bytes"] for row in ledger["per_stage"])
        return ledgers

    monkeypatch.setattr(make, "ledgers_of", cheap)
    monkeypatch.setattr(ledger_module, "ledgers_of", cheap)


def between_stages() -> float:
    """GB that suffice for the first two of progressive's three stages."""
    ledger = make_ledger(small_config(strategy__name="progressive"), known_traces())
    _, second, third = (row["trainable_parameters"] for row in ledger["per_stage"])
    return float(second + third) / 2e6


@pytest.mark.usefixtures("priced")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fleet.csv").write_text(FLEET.format(between_stages()))
    command = ["plan", "quickstart", *FLAGS, "--devices", str(tmp_path / "fleet.csv")]
    assert cli.main([*command, "--json", "--plot", str(tmp_path / "plan.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (tmp_path / "plan.png").stat().st_size > 5000
    options = {(o["strategy"], o["layers_per_stage"], o["remat"]): o for o in found["options"]}
    assert len(options) == 6
    growing = options["progressive", 1, False]
    assert growing["share_by_stage"] == [1, 1, 0.25]
    assert [c["says"] for c in growing["classes"]] == ["out from 3", "yes"]
    phone, box = growing["classes"]
    assert phone["seconds"] < sum(phone["round_seconds_by_stage"])
    assert growing["seconds"] > box["seconds"] > 0  # rounds of the first stages are as long as the phones need
    frozen = options["layerwise", 1, False]["per_stage"][-1]["frozen_bytes"]
    assert frozen > 0
    assert options["layerwise", 1, False]["traffic_bytes"] == frozen + sum(
        row["download_bytes"] + row["upload_bytes"] for row in options["layerwise", 1, False]["per_stage"]
    )
    (best,) = (option for option in found["options"] if found["recommended"].items() <= option.items())
    assert found["clients"]["dealt_as_train_deals_them"]
    assert growing["left_out_by_stage"][2]["clients"] == 3
    assert best["share_every_stage"] == max(o["share_every_stage"] for o in found["options"])
    assert found["reason"].startswith(best["strategy"])
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "out ≥3" in out
    assert "→ " + best["strategy"] in out
    assert len(out.splitlines()) <= 40


@pytest.mark.usefixtures("priced")
def test_the_table_fits_the_screen() -> None:
    """Three classes, and accuracies with their spread where there is room for it."""
    devices = tuple(f"class{i} count={i} memory_gb=4 gflops=5 uplink_mbps=1 downlink_mbps=9 watts=3" for i in (1, 2, 3))
    config = small_config(fleet__devices=devices)
    reached = Measured({0: 0.5, 1: 0.7})
    names = ("layerwise", "progressive")
    found = {
        (stages.stages_of(override(config, {"strategy.name": name})), remat): reached
        for name in names
        for remat in (False, True)
    }
    dealt = make_clients(config, device_classes(config), ["9000"], lambda _: None)
    made = make.make_plan(config, dealt, measured.Results("knn", False, found))
    for width, accuracy, energy in ((77, "60.0", False), (82, "60.0±14.1", False), (120, "60.0±14.1", True)):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(show.table(made, width))
        (line, *_) = (line for line in console.export_text().splitlines() if line.lstrip().startswith("→"))
        assert line.rstrip().endswith(f" {accuracy}")
        assert (" / " in line) == energy


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


def test_a_ledger_is_kept_until_something_changes_that_it_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, compiled = resolve(small_config(model__depth=1)), list[str]()
    monkeypatch.setattr(stored.devices, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(ledger_module, "peak_memory", lambda programs, notify: {p.as_text(): 7 for p in programs})

    def cost(config: Config) -> Any:
        compiled.clear()
        return ledgers_of({"it": config}, memory=True, notify=compiled.append, known=known_traces())["it"]

    first = cost(config)
    assert first["peak_memory_bytes"] == 7
    assert compiled
    assert cost(override(config, {"runtime.seed": 5, "evaluation.neighbours": 3})) == first
    assert not compiled
    (file,) = (tmp_path / "ledgers").iterdir()
    cost(override(config, {"optimizer.batch_size": 3}))
    assert compiled
    file.write_text("{")  # damaged
    assert cost(config) == first
    assert compiled
    monkeypatch.setattr(stored, "code_digest", lambda: "another version")
    cost(config)
    assert compiled
    monkeypatch.setitem(stored.STRATEGIES, "mine", lambda layers, k: [(0, layers)])
    assert stored.ledger_file(config) is None  # a user's code may change without a trace
    monkeypatch.setattr(stored.devices, "cache_folder", lambda: None)
    assert stored.read(config) is None


@pytest.mark.usefixtures("priced")
def test_the_page_stands_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fleet.csv").write_text(FLEET.format(between_stages()))
    out = tmp_path / "plan"
    command = ["plan", "quickstart", *FLAGS, "--devices", str(tmp_path / "fleet.csv"), "--out", str(out)]
    assert cli.main(command) == 0
    assert "plan.html" in capsys.readouterr().out
    html = (out / "plan.html").read_text()
    plain = json.loads((out / "plan.json").read_text())
    assert html.count('class="chosen"') == 1
    assert html.count("<tr") == 1 + len(plain["options"])
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org", "")
    for words in ("phone", "can take part in every stage", "It was not measured on these devices", "partition.kind"):
        assert words in html
    shown = re.search(r"<pre>(.*?)</pre>", html, re.DOTALL)
    assert shown
    again, train_it = html_module.unescape(shown[1]).split("\n\n")
    assert shlex.split(again) == ["python", "run.py", *command]
    assert plain["recommended"]["strategy"] in train_it
    parsed = parse(TrainOptions, shlex.split(train_it)[3:])
    assert [device.name for device in device_classes(resolve(parsed.config))] == ["phone", "box"]


def test_options_that_contradict_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for words, named in (
        (["--accuracy-first", "--cheapest"], "--cheapest"),
        (["--out", str(tmp_path / "file" / "x")], "--out"),
        (["--examples", "p10=3", "p90"], "--examples"),
    ):
        assert cli.main(["plan", "quickstart", *FLAGS, "--memory-gb", "1", *words]) == 2
        assert capsys.readouterr().err.startswith(f"error: {named}: ")


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


def test_measured_and_published_accuracies_are_not_subtracted() -> None:
    measured = option("end_to_end", 2.0, measured=Measured({0: 0.81}))
    found = advise(option("layerwise", 0.5), measured, protocol="knn")
    assert found.option
    assert (found.option.strategy, found.up, found.down) == ("layerwise", None, None)


def test_without_a_deadline_no_class_is_too_slow() -> None:
    phone_fits, box_only = option("layerwise", 0.5), option("progressive", 2.0)
    _, reason = chosen(phone_fits, box_only, aim="accuracy")
    assert "deadline" not in reason
    assert "phone: it could take part throughout in layerwise" in reason


@pytest.mark.usefixtures("priced")
def test_where_nothing_fits_there_is_a_page_too(tmp_path: Path) -> None:
    command = ["plan", "quickstart", *FLAGS, "--memory-gb", "1e-5", "--out", str(tmp_path), "--plot"]
    assert cli.main([*command, str(tmp_path / "plan.png")]) == 0
    html = (tmp_path / "plan.html").read_text()
    assert 'class="choice none"' in html
    assert "No class can take part in every stage of any option." in html


@pytest.mark.usefixtures("priced")
def test_the_command_of_the_page_leaves_out_what_the_option_does_not_have(tmp_path: Path) -> None:
    """Depth dropout and listed rounds of the plan's config may not fit the recommended strategy."""
    command = ["quickstart", *FLAGS, "--federation.rounds", "6", "--strategy.rounds-per-stage", "3", "2", "1"]
    command += ["--additions.depth-dropout", "0.5", "--memory-gb", "1", "--out", str(tmp_path), "--cheapest"]
    assert cli.main(["plan", *command]) == 0
    plain = json.loads((tmp_path / "plan.json").read_text())
    shown = re.search(r"<pre>(.*?)</pre>", (tmp_path / "plan.html").read_text(), re.DOTALL)
    assert shown
    _, train_it = html_module.unescape(shown[1]).split("\n\n")
    trained = resolve(parse(TrainOptions, shlex.split(train_it)[3:]).config)
    stages.stages_of(trained)
    assert trained.strategy.name == plain["recommended"]["strategy"]
