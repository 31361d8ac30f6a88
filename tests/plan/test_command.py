"""The command `plan`, its table and its page."""

import html as html_module
import io
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import small_config
from fleets import FLAGS, FLEET, between_stages
from rich.console import Console

from lwfedssl_jax import cli
from lwfedssl_jax.cli.options import TrainOptions, parse
from lwfedssl_jax.config import device_classes, override, resolve
from lwfedssl_jax.method import stages
from lwfedssl_jax.plan import make, measured, show
from lwfedssl_jax.plan.clients import make_clients
from lwfedssl_jax.plan.measured import Measured


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


@pytest.mark.usefixtures("priced")
def test_where_nothing_fits_there_is_a_page_too(tmp_path: Path) -> None:
    for memory in (["--memory-gb", "1e-5"], ["--memory-gb", "100", "--baseline-gb", "101"]):
        command = ["plan", "quickstart", *FLAGS, *memory, "--out", str(tmp_path), "--plot"]
        assert cli.main([*command, str(tmp_path / "plan.png")]) == 0
        html = (tmp_path / "plan.html").read_text()
        assert 'class="choice none"' in html
        assert "No class can take part in every stage of any option." in html
    assert "a process needs (baseline_gb): device 101 of 100 GB" in html


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
