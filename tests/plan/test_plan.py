"""The plan: options, shares, the recommendation, and fleets in a run."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL, known_traces, small_config
from rich.console import Console

from lwfedssl_jax import cli
from lwfedssl_jax.config import Config, ConfigError, flat, join_lists, override, to_dict
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.costs import fleet, operations
from lwfedssl_jax.costs import ledger as ledger_module
from lwfedssl_jax.costs.fleet import participation
from lwfedssl_jax.costs.ledger import ledgers_of, make_ledger
from lwfedssl_jax.costs.memory import lower_step
from lwfedssl_jax.experiment import train
from lwfedssl_jax.method import stages
from lwfedssl_jax.plan import make, measured, recommend, show
from lwfedssl_jax.plan.measured import Measured
from lwfedssl_jax.plan.options import Option, each_option, examples_of_a_client, shares_by_stage
from lwfedssl_jax.workdir import WorkDir

FLAGS = [
    word
    for name, value in SMALL.items()
    for word in ("--" + name.replace("_", "-"), *map(str, value if isinstance(value, tuple) else [value]))
]
SMALL_PHONE = DeviceClass("phone", 3, 1.0, 1.0, 8.0, 8.0)
LARGE_BOX = DeviceClass("box", 1, 3.0, 10.0, 80.0, 80.0)


def option(strategy: str, *peaks_gb: float, flops: float = 1e9, traffic: int = 1000, **of: Any) -> Option:
    """An option of one round a stage."""
    rows = [
        {"stage": s, "rounds": 1, "depth": s, "flops_executed": flops, "download_bytes": traffic,
         "upload_bytes": traffic, "peak_memory_bytes": gb * 1e9}
        for s, gb in enumerate(peaks_gb, 1)
    ]  # fmt: skip
    ledger = {
        "per_stage": rows,
        "peak_memory_bytes": max(peaks_gb) * 1e9,
        "total_bytes": 2 * traffic * len(rows),
        "flops_executed": flops * len(rows),
    }
    devices = [SMALL_PHONE, LARGE_BOX]
    parts = [participation(device, rows, 1, 0) for device in devices]
    shares = shares_by_stage(devices, parts, len(rows))
    return Option(strategy, 1, of.get("remat", False), ledger, parts, shares, of.get("measured"))


def chosen(*options: Option, protocol: str = "") -> tuple[Option | None, str]:
    return recommend.recommend(Config(), [SMALL_PHONE, LARGE_BOX], options, protocol)


def test_shares_and_from_which_stage_a_class_is_out() -> None:
    growing = option("progressive", 0.5, 1.0, 1.5, 3.5)
    assert growing.shares == [1, 1, 0.25, 0, 0]
    assert [fleet.stages_text(part.stages, 4) for part in growing.parts] == ["out from 3", "out from 4"]
    assert fleet.stages_text([], 4) == "out"
    assert fleet.stages_text([1, 2, 3, 4], 4) == "yes"
    assert fleet.stages_text([2, 3, 5], 6) == "only 2-3,5"


def test_the_largest_share_decides_then_the_published_order_then_time_then_traffic() -> None:
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
    assert "25 % of the devices, the most that any option reaches, can take part in every stage" in reason
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


def test_examples_of_a_client() -> None:
    assert examples_of_a_client(small_config(), None) == 60 / 4
    assert examples_of_a_client(small_config(partition__server_share=0.5), None) == 30 / 4
    assert examples_of_a_client(small_config(data__name="digits"), None) == 1437 / 4
    assert examples_of_a_client(small_config(partition__kind="shared"), None) == 100
    folder = small_config(data__name="folder:x")
    assert examples_of_a_client(folder, 7) == 7
    with pytest.raises(ConfigError, match=r"^--examples: missing, .* data.name folder:x .*; accepted: "):
        examples_of_a_client(folder, None)


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
    real = ledgers_of

    def cheap(configs: dict[Any, Config], *, memory: bool, **_: Any) -> dict[Any, Any]:
        ledgers = real(configs, memory=False, known=known_traces())
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
    assert growing["classes"][0]["seconds"] < sum(growing["classes"][0]["round_seconds_by_stage"])
    best = found["options"][found["recommended"]]
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
    made = make.make_plan(config, 9000, measured.Results("knn", False, found))
    for width, accuracy, energy in ((74, "60.0", False), (80, "60.0±14.1", False), (120, "60.0±14.1", True)):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(show.table(made, width))
        (line, *_) = (line for line in console.export_text().splitlines() if line.lstrip().startswith("→"))
        assert line.rstrip().endswith(f" {accuracy}")
        assert ("Wh" in line) == energy


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
