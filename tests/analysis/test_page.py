"""The page: what it says, that it stands alone, and what a real browser makes of it."""

import html
import json
import re
import shlex
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from runs import SEEDS, write_run

from lwfedssl_jax import cli
from lwfedssl_jax.analysis import report, results, setting_plots, tables
from lwfedssl_jax.analysis.settings import group_by_setting
from lwfedssl_jax.cli.options import TrainOptions, parse
from lwfedssl_jax.config import resolve, to_dict

EVIL = "<script>document.title='broken'</script>"


class Content(HTMLParser):
    """Tables by caption as rows of cells, images, and whatever a page may load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.images: list[dict[str, str | None]] = []
        self.loaded: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self._rows: list[list[str]] = []
        self._caption = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attributes)
        self.loaded += [named[k] or "" for k in ("src", "href", "srcset", "data", "action") if k in named]
        if tag == "img":
            self.images.append(named)
        elif tag == "table":
            self._rows, self._caption = [], ""
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
            assert tag == "td" or named["scope"] in ("row", "col")

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            assert self._caption
            self.tables[self._caption] = self._rows
        self.tags.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.text += data
        within = [tag for tag in self.tags if tag.strip("/") in ("caption", "td", "th")][-1:]
        if within == ["caption"]:
            self._caption += data.strip()
        elif within and not within[0].startswith("/"):
            self._rows[-1][-1] += data


def picture(run: Path) -> None:
    (run / "plots").mkdir()
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(run / "plots" / "clients.png")


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine finished runs, one that is not, and one whose data set has an evil name."""
    top = tmp_path_factory.mktemp("page")
    for strategy, accuracies in SEEDS.items():
        for seed, accuracy in enumerate(accuracies):
            run = top / "runs" / f"{strategy}-{seed}"
            changes: dict[str, Any] = {"strategy__name": strategy, "runtime__seed": seed}
            write_run(run, {"linear_probe_5": accuracy, "knn": accuracy}, data__name=f"npz:{EVIL}", **changes)
            picture(run)
    write_run(top / "runs" / "stopped", data__name=f"npz:{EVIL}", runtime__seed=7)
    return top


@pytest.fixture(scope="module")
def written(top: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return report.write_report([top], tmp_path_factory.mktemp("out"))


def test_the_page_says_what_the_numbers_say(written: Path) -> None:
    content = Content(written.read_text())
    text = " ".join(content.text.split())
    assert "1 of 10 runs is not finished and not included in any mean: stopped: unfinished after 2 of 4 rounds" in text
    # end_to_end and progressive both reach 83.0 on average
    assert re.search(
        r"has the highest accuracy: 83.0 ± \d.\d % \(linear probe, 5 labels per class; mean of 3 seeds; ", text
    )
    assert "layerwise is 7.0 points below end_to_end (95 % CI -2.0 to 16.0, adjusted p = 0.34, 3 seeds)" in text
    settings = next(rows for caption, rows in content.tables.items() if caption.startswith("Accuracy: mean"))
    shown = [dict(zip(settings[0], row, strict=True)) for row in settings[1:]]
    assert [row["setting"] for row in shown] == [*SEEDS, "untrained"]
    assert [row["linear probe, 5 labels per class (%)"] for row in shown][1:3] == ["76.0 ± 0.0", "83.0 ± 3.0"]
    assert [row["peak memory (MiB)"] for row in shown] == ["16.00", "4.00 (0.25x)", "8.00 (0.50x)", "-"]
    markdown = (written.parent / "tables" / "settings.md").read_text().splitlines()
    assert [[c.strip() for c in line.strip("|").split("|")] for line in markdown[2:]] == settings[1:]
    assert content.tables["Only fields in which settings differ"] == [
        ["setting", "strategy.name"], *([name, name] for name in SEEDS),
    ]  # fmt: skip


def test_the_page_stands_alone_and_values_are_inert(written: Path) -> None:
    content = Content(written.read_text())
    assert all(link.startswith("data:") for link in content.loaded)
    assert "script" not in content.tags
    assert EVIL in content.text
    assert "url(" not in written.read_text()
    assert all(len(image["alt"] or "") > 20 for image in content.images)
    assert sum((image["src"] or "").startswith("data:image/png") for image in content.images) == 3  # who owns what
    names = {p.stem for p in (written.parent / "plots").iterdir()}
    assert {"accuracy_against_costs_knn", "accuracy_over_rounds_knn", "loss_over_rounds"} <= names
    for name in names:
        assert (written.parent / "plots" / f"{name}.svg").read_text().startswith("<?xml")
        assert (written.parent / "plots" / f"{name}.png").stat().st_size > 5000
    files = {p.name for p in (written.parent / "tables").iterdir()}
    assert files == {f"{t}.{s}" for t in ("settings", "resources", "significance") for s in ("csv", "md", "tex")} | {
        "runs.csv"
    }


def test_one_run_and_one_that_is_not_finished_have_pages_too(tmp_path: Path) -> None:
    write_run(tmp_path / "one", {"knn": 0.75})
    write_run(tmp_path / "stopped")
    one = Content(report.write_report([tmp_path / "one"], tmp_path / "one").read_text())
    assert any(rows[0][0] == "strategy" and len(rows) == 4 for rows in one.tables.values())
    reached = "layerwise reached 75.0 % (kNN; 1 seed, ± 12.5 over draws of labels; untrained: 25.0 %), for 0.25x the "
    assert reached in " ".join(one.text.split())
    assert "chance" not in one.text
    assert (tmp_path / "one" / "report.html").is_file()
    stopped = Content(report.write_report([tmp_path / "stopped"], tmp_path / "stopped").read_text())
    assert "unfinished after 2 of 4 rounds" in stopped.text
    assert len(stopped.images) == 1  # its loss so far


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("metrics.jsonl", '"stage": 1', '"stag": 1'),
        ("metrics.jsonl", '"accuracy": 0.75', '"accuracy": null'),
        ("metrics.jsonl", '"loss": 3.0', '"loss": "x"'),
        ("metrics.jsonl", '"round": 2', '"round": null'),
        ("config.json", '"vit_tiny"', '{"a": 1}'),
        ("config.json", '"cpu: one"', '{"a": 1}'),
        ("config.json", '{"jax": "0.10.2"}', "[1]"),
        ("summary.json", '"total_bytes": 10485760', '"total_bytes": [1]'),
        ("summary.json", '"peak_memory_bytes"', '"peak"'),
        ("summary.json", '"untrained"', '"unknown"'),
        ("summary.json", '"rounds": 4', '"rounds": 4, "fleet": [{"name": "phone"}]'),
        ("config.json", '"config_file": ""', '"config_file": "0", "command": "x"'),
    ],
)
def test_whatever_is_damaged_there_is_a_page(file: str, old: str, new: str, tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"knn": 0.75})
    damaged = tmp_path / "run" / file
    assert old in damaged.read_text()
    damaged.write_text(damaged.read_text().replace(old, new))
    assert "unfinished" not in report.write_report([tmp_path], tmp_path).read_text()


def test_the_command_that_repeats_a_run_makes_its_config(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"partition__kind": "iid", "additions__terms": ("proximal=0.1", "alignment=1.0")}
    config = write_run(tmp_path / "run", {"knn": 0.75}, runtime__remat=True, runtime__seed=3, **changes)
    (line, again) = report.commands(results.find_runs([tmp_path]), [tmp_path])
    words = shlex.split(line)
    assert words[:3] == ["python", "run.py", "train"]
    assert to_dict(resolve(parse(TrainOptions, words[3:]).config)) == config
    assert again == f"python run.py report {tmp_path}"


def test_the_command_that_repeats_a_run_of_ones_own_file_is_the_one_that_was_given(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"knn": 0.75}, runtime__seed=3)
    file = tmp_path / "run" / "config.json"
    given = ["my config.py", "--partition.beta", "0.1", "--runtime.seed", "3", "--workdir", "run"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"config_file": "0123", "command": given}))
    line = next(report.commands(results.find_runs([tmp_path]), [tmp_path]))
    assert line == "python run.py train 'my config.py' --partition.beta 0.1 --runtime.seed 3 --workdir run"


def test_the_command_that_repeats_a_sweep_has_its_place(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"name": "strategies", "base": "mine.py", "runs": []}))
    first, _ = report.commands([], [tmp_path])
    assert first == f"python run.py sweep strategies --base mine.py --workdir {tmp_path}"


def test_who_of_a_fleet_takes_part_is_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"knn": 0.75})
    file = tmp_path / "run" / "summary.json"
    summary = json.loads(file.read_text())
    summary["resources"]["per_stage"] = [{"rounds": 3}, {"rounds": 1}]
    summary["fleet"] = [
        {"name": name, "clients": n, "stages": stages, "clients_by_stage": by_stage, "round_seconds_by_stage": seconds}
        for name, n, stages, by_stage, seconds in [
            ("phone", 4, [1], [4, 0], [9, None]),
            ("box", 2, [1, 2], [1, 2], [None, None]),
            ("tablet", 0, [], [0, 0], [None, None]),
        ]
    ]
    file.write_text(json.dumps(summary))
    content = Content(report.write_report([tmp_path], tmp_path).read_text())
    _, *rows = next(rows for caption, rows in content.tables.items() if caption.startswith("By device class"))
    assert rows == [
        ["layerwise", "phone", "4", "out from stage 2", "75", "9"],
        ["layerwise", "box", "2", "in all stages, not all of them", "62", "-"],
        ["layerwise", "tablet", "0", "none is dealt to it", "-", "-"],
    ]
    assert (tmp_path / "tables" / "fleet.csv").is_file()


def test_the_command_prints_the_table_and_the_pages_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    top = tmp_path / "top"
    write_run(top / "whole", {"knn": 0.76})
    write_run(top / "stopped")
    assert cli.main(["report", str(top), "--out", str(tmp_path / "new" / "out")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"layerwise .* 76.0 .* 10.00 \(0.25x\) ", out)
    assert "left out: stopped: unfinished after 2 of 4 rounds" in out
    assert out.splitlines()[-1] == str(tmp_path / "new" / "out" / "report.html")
    (tmp_path / "file").touch()
    for arguments, message in (
        ([], "DIR: must be the first argument of report"),
        ([str(tmp_path / "none")], "is not a directory"),
        ([str(tmp_path / "new")], "contains no run"),
        ([str(top), "--out", str(tmp_path / "file")], "--out: "),
        ([str(top), "--aut", "x"], "--aut: unknown option"),
        ([""], "is empty"),
    ):
        assert cli.main(["report", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert "accepted" in line


def test_many_settings_are_told_apart(tmp_path: Path) -> None:
    for strategy in SEEDS:
        for beta in (0.1, 0.5, 1.0):
            changes: dict[str, Any] = {"strategy__name": strategy, "partition__beta": beta}
            write_run(tmp_path / f"{strategy}-{beta}", {"knn": 0.5}, **changes)
    _, settings = group_by_setting(results.load_results(tmp_path))
    looks = setting_plots.choose_looks(settings)
    assert len({(look.style["color"], look.style["marker"]) for look in looks.values()}) == 9
    assert {look.panel for look in looks.values()} == {"beta 0.1", "beta 0.5", "beta 1"}
    assert all(look.line == look.style for look in looks.values())  # in all figures alike
    assert len({look.line["color"] for look in looks.values() if look.panel == "beta 1"}) == 3
    alike = [s._replace(label=str(i), strategy="layerwise", rest=str(i)) for i, s in enumerate(settings * 5)]
    many = setting_plots.choose_looks(alike).values()
    assert len({(look.style["color"], look.style["marker"]) for look in many}) == 45
    assert len({look.panel for look in many}) == 7


def test_costs_are_drawn_where_they_belong(top: Path) -> None:
    runs, settings = group_by_setting(results.load_results(top))
    untrained = tables.baselines(runs, settings)
    figure = setting_plots.plot_costs(runs, settings, "linear_probe_5", untrained)
    traffic, operations, memory = figure.axes
    for panel, costs in ((traffic, (40, 10, 20)), (operations, (3, 0.75, 1.5)), (memory, (16, 4, 8))):
        means = [container.lines[0].get_xydata()[0] for container in panel.containers]
        assert np.array(means) == pytest.approx(np.array([costs, (83, 76, 83)]).T)
        seeds = [line.get_ydata() for line in panel.lines if len(line.get_ydata()) == 3]
        assert np.array(seeds) == pytest.approx(100 * np.array(list(SEEDS.values())))
        low, high = panel.get_ylim()
        assert low < 25 < 87 < high
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*SEEDS, "untrained"]


BROWSER = shutil.which("chromium")
needs_browser = pytest.mark.skipif(not BROWSER, reason="chromium is not installed: apt-get install chromium")
OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--proxy-server=127.0.0.1:9",
]  # fmt: skip
PROBE = """<script>parent.postMessage(JSON.stringify({
  images: [...document.images].map(i => i.naturalWidth), title: document.title,
  width: document.documentElement.scrollWidth, inner: innerWidth,
  requests: performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:")).length,
  tables: [...document.querySelectorAll("table")].map(
    t => [...t.querySelectorAll("tbody tr")].map(r => [...r.cells].map(c => c.textContent))),
}), "*")</script></body>"""
# No browser's window is as narrow as a telephone; a frame may be.
FRAME = """<iframe src="probed.html" style="border: 0; width: WIDTHpx; height: 900px"></iframe>
<script>addEventListener("message", e => {
  document.body.append(Object.assign(document.createElement("pre"), {id: "heard", textContent: e.data}));
})</script>"""


def browse(file: Path, profile: Path, *options: str) -> str:
    assert BROWSER
    command = [BROWSER, *OPTIONS, f"--user-data-dir={profile}", *options, file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@needs_browser
@pytest.mark.parametrize("width", [1100, 420])
def test_in_a_browser(width: int, written: Path, tmp_path: Path) -> None:
    text = written.read_text()
    all_shown = re.sub("<meta http-equiv=[^>]*>", "", text).replace("<details>", "<details open>")
    (tmp_path / "probed.html").write_text(all_shown.replace("</body>", PROBE))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    size = f"--window-size={width + 100},1000"
    dom = browse(frame, tmp_path / "profile", "--dump-dom", size, "--virtual-time-budget=4000")
    (heard,) = re.findall('<pre id="heard">(.*?)</pre>', dom, re.DOTALL)
    said = json.loads(html.unescape(heard))
    assert said["inner"] == width
    assert said["width"] <= width
    assert said["requests"] == 0
    assert said["title"] != "broken"
    content = Content(text)
    assert len(said["images"]) == len(content.images) >= 7
    assert min(said["images"]) > 0
    assert said["tables"] == [rows[1:] for rows in content.tables.values()]


@needs_browser
def test_on_paper_and_on_screen(written: Path, tmp_path: Path) -> None:
    shot, paper = tmp_path / "shot.png", tmp_path / "paper.pdf"
    browse(written, tmp_path / "profile", f"--screenshot={shot}", "--window-size=1100,2400")
    pixels = np.asarray(Image.open(shot).convert("RGB"))
    assert pixels.shape == (2400, 1100, 3)
    for color in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):  # three strategies are to be seen
        assert (pixels == color).all(-1).sum() > 100
    browse(written, tmp_path / "profile", f"--print-to-pdf={paper}")
    assert paper.read_bytes().startswith(b"%PDF")
