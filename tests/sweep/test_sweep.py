"""Sweeps: what their files make, and that runs that fail, crash or are interrupted take nothing with them."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import ROOT, SMALL, known_traces, small_config
from rich.console import Console

import lwfedssl_jax.cli.sweep as sweep_command
from lwfedssl_jax.cli import main
from lwfedssl_jax.config import ConfigError, available, load, override
from lwfedssl_jax.costs import ledger
from lwfedssl_jax.costs.traffic import client_bytes
from lwfedssl_jax.method.terms import TERMS
from lwfedssl_jax.simulation import setup
from lwfedssl_jax.sweep import Sweep, cores, pool
from lwfedssl_jax.sweep.directory import SweepDirectory
from lwfedssl_jax.sweep.estimate import estimate, evaluations
from lwfedssl_jax.sweep.grid import load_sweep, make_runs
from lwfedssl_jax.sweep.progress import SweepProgress
from lwfedssl_jax.workdir import WorkDir

BASE = small_config()


def test_axes_are_combined_and_labels_say_what_differs() -> None:
    sweep = Sweep(
        BASE,
        product={"strategy.name": ("layerwise", "progressive"), "partition.beta": (0.1,)},
        zip={"optimizer.batch_size": (8, 16), "optimizer.learning_rate": (0.1, 0.05)},
        runs=[{}, {"additions.terms": ("proximal=0.1",)}],
        seeds=(0, 7),
    )
    runs = make_runs(sweep)
    assert len(runs) == 2 * 2 * 2 * 2
    assert len({run.directory for run in runs}) == len({run.config for run in runs}) == 16
    assert [run.seed for run in runs[:4]] == [run.config.runtime.seed for run in runs[:4]] == [0, 7, 0, 7]
    assert runs[0].label == runs[1].label == "batch size 8, learning rate 0.1, layerwise"
    assert runs[2].label == "batch size 8, learning rate 0.1, progressive"
    assert runs[-1].label == "batch size 16, learning rate 0.05, progressive, terms proximal=0.1"
    assert {(r.config.optimizer.batch_size, r.config.optimizer.learning_rate) for r in runs} == {(8, 0.1), (16, 0.05)}
    assert all(run.config.partition.beta == 0.1 for run in runs)
    assert [run.label for run in make_runs(Sweep(BASE, seeds=(3,)))] == ["base"]


def test_a_run_is_found_by_its_digest_when_a_new_axis_changes_its_label(tmp_path: Path) -> None:
    def directory(**axes: Any) -> SweepDirectory:
        file = tmp_path / "mine.py"
        text = "from lwfedssl_jax.config import *\nfrom lwfedssl_jax.sweep import Sweep\n"
        axes_text = {name.replace("__", "."): values for name, values in axes.items()}
        file.write_text(f"{text}sweep = Sweep('quickstart', product={axes_text})\n", encoding="utf-8")
        return SweepDirectory(tmp_path / "sweep", load_sweep(str(file)))

    first = directory(strategy__name=("layerwise", "end_to_end"))
    first.take()
    first.close()
    for run in first.runs:
        (tmp_path / "sweep" / run.directory).mkdir(parents=True)
        for name in ("config.json", "summary.json"):
            (tmp_path / "sweep" / run.directory / name).write_text("{}", encoding="utf-8")
    beta = load("quickstart").partition.beta
    more = directory(strategy__name=("layerwise",), partition__beta=(beta, 0.1))
    assert [more.is_finished(run) for run in more.runs] == [True, False]
    assert more.runs[0].directory == first.runs[0].directory
    assert [run.label for run in more.runs] == [f"beta {beta}", "beta 0.1"]
    assert more.others == [first.runs[1].directory]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (Sweep(BASE, product={"partition.betta": (1,)}), "'betta 1'|partition.betta: no such field"),
        (Sweep(BASE, product={"partition.beta": (0.1, -1.0)}), "run 'beta -1.0', seed 0: partition.beta: -1.0 is out"),
        (
            Sweep(BASE, product={"strategy.name": "layerwise"}),
            "strategy.name: 'layerwise' is not an axis; accepted: a list",
        ),
        (Sweep(BASE, product={"strategy.name": ()}), "strategy.name: .* is not an axis"),
        (Sweep(BASE, product={"runtime.seed": (1, 2)}), r"runtime.seed is an axis of its own; accepted: .*seeds="),
        (
            Sweep(BASE, zip={"partition.beta": (1.0, 2.0), "objective.momentum": (0.9,)}),
            "must all have the same length",
        ),
        (
            Sweep(BASE, product={"partition.beta": (1.0,)}, zip={"partition.beta": (2.0,)}),
            "partition.beta is on two axes",
        ),
        (Sweep(BASE, seeds=()), "seeds: no entries"),
        (Sweep(BASE, seeds=(1, 1)), "seeds: 1 appears twice; accepted: each value once"),
        (Sweep(BASE, runs=[{}, {}]), "are the same; accepted: different runs"),
        (
            Sweep(BASE, product={"objective.name": ("simclr", "dino")}),
            "run 'dino', seed 0: objective.name: unknown 'dino'",
        ),
        (Sweep(BASE, seeds=3), "seeds: 3 is not valid; accepted: a list of whole numbers"),  # type: ignore[arg-type]
        (Sweep(BASE, runs={"partition.beta": 1.0}), "runs: .* is not valid; accepted: a list"),  # type: ignore[arg-type]
        (Sweep(BASE, product=["partition.beta"]), "product: .* is not valid; accepted: "),  # type: ignore[arg-type]
        (Sweep(BASE, product={3: (1,)}), "3 is not a field; accepted: 'section.field'"),  # type: ignore[dict-item]
        (Sweep(7), "base: 7 is not valid; accepted: a config, or its name or file"),  # type: ignore[arg-type]
        (Sweep("quickstrat"), "'quickstrat' is not a config; accepted: .*quickstart"),
    ],
)
def test_what_is_no_sweep_is_refused(sweep: Sweep, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_runs(sweep)


def test_names_and_directories_that_hold_no_sweep_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.py").write_text("from lwfedssl_jax.config import Config\nconfig = Config()\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    for arguments, message in [
        ([], "SWEEP: must be the first argument of sweep, found nothing; accepted: "),
        ([""], "SWEEP: '' is empty"),
        (["--dry-run"], "SWEEP: must be the first argument of sweep, found '--dry-run'"),
        (["quickstart"], "SWEEP: 'quickstart' is a config, not a sweep"),
        (["quickstrat_sweep"], "SWEEP: 'quickstrat_sweep' is not a sweep; accepted: .*quickstart_sweep"),
        (["config.py"], "SWEEP: config.py does not define `sweep`, found NoneType"),
        (["broken.py"], "SWEEP: broken.py does not run (ZeroDivisionError"),
        (["quickstart_sweep", "--jobs", "0"], "--jobs: 0 is out of range; accepted: 1 to"),
        (["quickstart_sweep", "--workdir", "full"], "--workdir: full contains no sweep; accepted: "),
        (["quickstart_sweep", "--workdir", ""], "--workdir: '' is empty"),
    ]:
        assert main(["sweep", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert all(part in error for part in message.split(".*")), error
    assert main(["train", "sweeps/quickstart_sweep"]) == 2
    assert "is a sweep; accepted" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.py", "config.py", "full"]


def test_a_sweep_in_a_subfolder_has_the_folder_in_its_name_and_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "configs" / "sweeps" / "paper" / "small.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        '"""One run."""\n'
        "from lwfedssl_jax.config import Config, override\n"
        "from lwfedssl_jax.sweep import Sweep\n"
        f"sweep = Sweep(override(Config(), {SMALL!r}))\n"
    )
    for name in ("paper/small", "sweeps/paper/small"):
        assert load_sweep(name, tmp_path / "configs").name == "paper/small"
    assert load_sweep(str(file)).name == "small"
    with pytest.raises(ConfigError, match=r"'small' is not a sweep; accepted: paper/small, or the path of a .py"):
        load_sweep("small", tmp_path / "configs")
    assert ("sweeps/paper/small", "One run.") in available(tmp_path / "configs")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep_command, "load_sweep", lambda name, base: load_sweep(name, tmp_path / "configs", base))
    monkeypatch.setattr(sweep_command.Pool, "run", lambda self, runs: None)
    monkeypatch.setattr(sweep_command, "write_and_print_report", lambda directories, out: None)
    assert main(["sweep", "paper/small", "--compilation-cache", "off"]) == 0
    assert (tmp_path / "runs" / "sweeps" / "paper" / "small" / "sweep.json").is_file()


def test_the_quickstarts_sweep_has_three_strategies_a_shallow_control_and_seeds() -> None:
    found = load_sweep("quickstart_sweep")
    assert (found.name, len(found.runs)) == ("quickstart_sweep", 12)
    assert "15 minutes" in found.about
    labels = ("layerwise", "progressive", "end_to_end", "end_to_end, depth 1")  # whose traffic is that of layerwise
    assert {(run.label, run.seed) for run in found.runs} == {(label, seed) for label in labels for seed in (0, 1, 2)}


def test_a_shallow_control_has_the_first_stages_layers_and_the_rounds_or_the_traffic() -> None:
    base = small_config(model__depth=4, federation__rounds=8, strategy__rounds_per_stage=(2, 2, 2, 2))
    base = override(base, {"additions.depth_dropout": 0.2})
    sweep = Sweep(
        base,
        runs=[{"strategy.name": "layerwise", "strategy.layers_per_stage": k} for k in (1, 2)]
        + [{"strategy.name": "layerwise", "strategy.rounds_per_stage": (5, 1, 1, 1)}],
        shallow_control=True,
    )
    configs = {run.label: run.config for run in make_runs(sweep)}
    controls = [config for config in configs.values() if config.strategy.name == "end_to_end"]
    assert {config.model.depth for config in controls} == {1, 2}
    traffic = {label: client_bytes(config) for label, config in configs.items()}
    (layers, *_), shallow = configs, [c for c in controls if c.model.depth == 1 and c.federation.rounds != 8]
    per_round = client_bytes(shallow[0]) / shallow[0].federation.rounds
    assert abs(client_bytes(shallow[0]) - traffic[layers]) <= per_round / 2
    assert [c for c in controls if c.model.depth == 1 and c.federation.rounds == 8]


def test_a_sweep_can_start_from_another_config(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"from lwfedssl_jax.config import Config, override\nconfig = override(Config(), {SMALL!r})\n")
    found = load_sweep("strategies", base=str(file))
    assert found.name == "strategies"
    assert found.default_directory == Path("runs/sweeps/strategies-mine")
    assert {run.config.data.name for run in found.runs} == {"synthetic"}
    with pytest.raises(ConfigError, match=r"SWEEP: base: 'mien' is not a config"):
        load_sweep("strategies", base="mien")


def test_runs_of_a_file_that_holds_more_than_configs_are_known_by_its_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    plain = 'from lwfedssl_jax.sweep import Sweep\nsweep = Sweep("quickstart")\n'
    added = 'from lwfedssl_jax.method.terms import TERMS\nTERMS["nothing"] = lambda local: 0.0\n'
    directories = []
    try:
        for text in (plain, plain + "# a note\n", plain + added, plain + added + "# changed\n"):
            file.write_text(text)
            directories.append(load_sweep(str(file)).runs[0].directory)
    finally:
        TERMS.pop("nothing", None)
    assert directories[0] == directories[1]
    assert len(set(directories)) == 3


def test_an_estimate_counts_the_samples_of_a_run() -> None:
    sweep = Sweep(small_config(federation__clients_per_round=2), product={"federation.dropout": (0.0, 0.5)})
    whole, half = estimate(make_runs(sweep), setup.Cache())
    of_sample = ledger.make_ledger(small_config(), known_traces())["flops_executed"]
    assert whole.operations == pytest.approx(of_sample * 60 * 2 / 4)
    assert half.operations == pytest.approx(whole.operations / 2)
    assert 0 < half.training < 60
    assert half.training == pytest.approx(whole.training / 2)
    assert half.evaluation == pytest.approx(whole.evaluation) != 0
    assert half.compiling == 0 < whole.compiling  # they share programs
    assert half.seconds == half.training + half.evaluation
    runs = make_runs(sweep)
    assert estimate(runs, setup.Cache(), [runs[0].directory])[0].compiling == 0
    stages = setup.prepare(small_config(federation__rounds=7)).stages
    assert evaluations(stages, 0) == 3
    assert evaluations(stages, 2) == 6  # 2, 4, 6 and the last ones, 3, 5, 7


def test_cores_and_gpus_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "available_cores", lambda: [0, 1, 2, 3, 4])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cores.core_slots(1) == [([], {})]
    assert [cores for cores, _ in cores.core_slots(2)] == [[0, 1], [2, 3]]
    assert [cores for cores, _ in cores.core_slots(7)] == [[0], [1], [2], [3], [4], [0], [1]]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert cores.core_slots(1) == [([], {})]
    assert [environment["CUDA_VISIBLE_DEVICES"] for _, environment in cores.core_slots(2)] == ["2", "5"]
    assert all(0.25 < float(e["XLA_PYTHON_CLIENT_MEM_FRACTION"]) < 0.5 for _, e in cores.core_slots(4))


class FakeWorker:
    """A process that does what a test says: it is begun, and then ends its runs or itself."""

    crashes: ClassVar[dict[str, str]] = {}  # by label: when
    units: ClassVar[list[list[str]]] = []

    def __init__(self, number: int, request: dict[str, Any], environment: dict[str, str], events: Any) -> None:
        self.at_work: list[Any] = []
        self.begun: list[Any] = []
        self.group, self.log, self._events, self._ended = None, "log", events, False
        self._ready()

    def _ready(self) -> None:
        self._events.put((self, {"event": "ready", "at_once": True}))

    def give(self, runs: list[Any]) -> None:
        self.at_work, self.begun = list(runs), []
        self.units.append([run.label for run in runs])
        died = {when for run in runs if (when := self.crashes.get(run.label))}
        if "unbegun" not in died:
            for run in runs:
                self._events.put((self, {"event": "started", "run": run.directory}))
        if died:
            self._exit(-9)
            return
        for run in runs:
            self._events.put((self, {"event": "finished", "run": run.directory}))
        self._ready()

    def end(self) -> int:
        self._exit(0)
        return 0

    def _exit(self, code: int) -> None:
        if not self._ended:
            self._ended = True
            self._events.put((self, {"event": "exit", "code": code}))

    def stop(self) -> None:
        pass


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("when", ["unbegun", "begun"])
def test_a_run_that_ends_its_process_is_found_and_no_other_is_lost(
    when: str, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "Worker", FakeWorker)
    monkeypatch.setattr(pool, "core_slots", lambda jobs: [([], {})] * jobs)
    monkeypatch.setattr(FakeWorker, "crashes", {"learning rate 0.2": when})
    monkeypatch.setattr(FakeWorker, "units", [])
    runs = make_runs(Sweep(BASE, product={"optimizer.learning_rate": (0.1, 0.2, 0.3, 0.4)}))
    ended: dict[str, str] = {}

    def hear(run: Any, event: dict[str, Any]) -> None:
        if event["event"] in ("finished", "failed"):
            assert run.label not in ended
            ended[run.label] = event["event"]

    pool.Pool({}, dict.fromkeys((run.directory for run in runs), "same"), jobs, hear).run(runs)
    failed = {label for label, end in ended.items() if end == "failed"}
    assert len(ended) == 4
    assert len(FakeWorker.units[0]) == 4 // jobs
    if when == "begun":
        assert failed == {"learning rate 0.2"}
        assert ["learning rate 0.2"] in FakeWorker.units
    else:
        assert "learning rate 0.2" in failed
        assert len(failed) <= 2  # nobody knows which: the first of a unit is blamed


def test_progress_tells_what_is_left() -> None:
    runs = make_runs(Sweep(BASE, product={"strategy.name": ("layerwise", "progressive")}, seeds=(0, 1)))
    costs = {run.directory: [1.0, 1.0, 2.0] for run in runs}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=100, height=30)
        progress = SweepProgress(console, runs, costs, {runs[0].directory})
        progress.hear(runs[1], {"event": "started"})
        progress.hear(runs[1], {"event": "RoundDone", "line": {"round": 2, "stage": 1}})
        assert progress._left[runs[1].directory] == 2.0
        evaluated = {"event": "Evaluated", "line": {"round": 3, "protocol": "knn", "accuracy": 0.5}}
        progress.hear(runs[2], evaluated)
        scratch = {"round": 0, "baseline": "scratch", "protocol": "knn", "accuracy": 0.1}
        progress.hear(runs[2], {"event": "Evaluated", "line": scratch})
        progress.hear(runs[2], {"event": "finished"})
        progress.hear(runs[3], {"event": "failed", "why": "no [disk]"})
        console.print(progress._table())
        text = console.file.getvalue()
        for part in ("2 finished, 1 running, 1 failed, about", "stage 1, round 2/3", "knn 50.0 %", "no [disk]"):
            assert part in text


SWEEP = """
import os, sys
from lwfedssl_jax.config import Config, override
from lwfedssl_jax.method.objectives import OBJECTIVES
from lwfedssl_jax.sweep import Sweep

def crash(online, target, mask, temperature):
    if getattr(sys.modules["__main__"].__spec__, "name", "") == "lwfedssl_jax.sweep.worker":
        os._exit(7)
    return online.sum()

OBJECTIVES["crash"] = OBJECTIVES["simclr"]._replace(loss=crash, loss_with_negatives=None)
runs = [{}, {"objective.name": "crash"}, {"optimizer.learning_rate": 3e38}, {"optimizer.learning_rate": 0.05}]
sweep = Sweep(override(Config(), BASE), runs=runs, seeds=(0,))
"""


def test_a_sweep_survives_interruption_and_its_runs(tmp_path: Path) -> None:
    """Interrupted after the first run and continued, with runs that crash and that end in NaN."""
    small = SMALL | {
        "model.depth": 2,
        "federation.rounds": 2,
        "objective.name": "simclr",
        "strategy.name": "end_to_end",
    }
    (tmp_path / "mine.py").write_text(f"BASE = {small!r}\n{SWEEP}")
    command = [sys.executable, str(ROOT / "run.py"), "sweep", "mine.py", "--workdir", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def start() -> "subprocess.Popen[str]":
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes)

    first = start()
    assert first.stderr is not None
    assert first.stderr.readline() == "tracing\n"
    assert first.stderr.readline() == "4 waiting\n"
    assert "1 finished" in first.stderr.readline()
    first.send_signal(signal.SIGINT)
    _, rest = first.communicate(timeout=120)
    assert first.returncode == 130
    assert rest.splitlines()[-1].startswith("interrupted; the same command continues")
    mine = load_sweep(str(tmp_path / "mine.py"))
    runs = mine.runs
    finished = tmp_path / "out" / runs[0].directory
    before = (finished / "summary.json").stat().st_mtime_ns

    second = start()
    out, error = second.communicate(timeout=300)
    assert second.returncode == 1, error
    assert "out/report.html" in out
    assert error.splitlines()[-1].startswith("error: 2 of 4 runs failed; the same command repeats them: ")
    assert "its process ended with exit code 7; see out/logs/worker0.log" in error
    assert (finished / "summary.json").stat().st_mtime_ns == before
    written = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [run["directory"] for run in written["runs"]] == [run.directory for run in runs]
    assert set(written["failed"]) == {runs[1].directory, runs[2].directory}
    assert "no client's update is finite in round 1" in written["failed"][runs[2].directory]
    directory = SweepDirectory(tmp_path / "out", mine)
    assert [directory.is_finished(run) for run in runs] == [True, False, False, True]
    for run in (runs[0], runs[3]):
        summary = WorkDir(tmp_path / "out" / run.directory, run.config, run.code).summary
        assert summary is not None
        assert summary["rounds"] == 2
    page = (tmp_path / "out" / "report.html").read_text()
    assert "learning rate 0.05" in page
    assert "exit code 7" in page
    assert "python run.py sweep out/sweep.py --workdir out" in page
    again = load_sweep(str(tmp_path / "out" / "sweep.py")).runs
    assert [run.directory for run in again] == [run.directory for run in runs]
