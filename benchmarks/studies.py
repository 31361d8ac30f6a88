"""Trains the studies of docs/results.md, resumably, and writes that page and its figures.

    python benchmarks/studies.py run [STUDY ...]     # three to four hours on 2 cores; recorded runs are not repeated
    python benchmarks/studies.py record [STUDY ...]  # the finished runs of sweeps under runs/studies
    python benchmarks/studies.py report              # docs/results.md from what is recorded

Each study is the sweep configs/sweeps/studies/STUDY.py in runs/studies/STUDY; what its finished runs measured becomes
lines of docs/results/runs.jsonl. Delete that file and runs/studies to measure everything again. Fashion-MNIST must be
there (docs/guides/data.md), and scikit-image for the patches of its pictures.
"""

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pacing

from lwfedssl_jax.config import digest
from lwfedssl_jax.sweep.grid import SweepRun, load_sweep
from lwfedssl_jax.system.files import write_whole

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "studies"
PAGE, PICTURES = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
RECORDS = PICTURES / "runs.jsonl"
KEPT = ("round", "stage", "loss", "clients", "dropped", "download_bytes", "upload_bytes", "layers_skipped", "event",
        "protocol", "accuracy", "baseline")  # fmt: skip
PROBE, KNN, TUNED = "linear_probe_5", "knn", "fine_tune_5"
LAYERWISE, PROGRESSIVE, WHOLE, SHALLOW = "layerwise", "progressive", "end_to_end", "end_to_end, depth 1"
PAPER, SAVING, DEPTH = "the paper's order", "more accurate for the same traffic", "later layers pay"
CLAIMS = (PAPER, SAVING, DEPTH)
WORDS = {
    ", rounds 44, every 0": ", 44 rounds",
    ", rounds 30, every 0": ", 30 rounds",
    ", momentum 0.9": "",
    "depth 1": "1 layer",
    "first stage share 0.0": "even stages",
}


class Question(NamedTuple):
    """Whether one setting is more accurate than another.

    Attributes:
      better, worse: labels of settings, in the order that is claimed.
      protocol: of the accuracies.
      claim: the order of the paper's accuracies; its point, more accuracy for the same traffic; or its
        premise, that later layers are worth their cost.
      at: equal rounds or equal traffic.
    """

    better: str
    worse: str
    protocol: str
    claim: str = PAPER
    at: str = "rounds"


class Study(NamedTuple):
    """A page's section: a sweep, what it is about, and the questions of one family of tests."""

    title: str
    text: str
    protocols: tuple[str, ...]
    questions: tuple[Question, ...]
    beside: tuple[str, ...] = ()  # settings of the study digits that belong to its table


def main_questions(suffix: str, *protocols: str) -> tuple[Question, ...]:
    """The questions of the main comparison, by each protocol at equal rounds, and by the first at equal traffic."""
    lw, pg, e2e, one = (label + suffix for label in (LAYERWISE, PROGRESSIVE, WHOLE, SHALLOW))
    asked = [Question(pg, e2e, p) for p in protocols] + [Question(e2e, lw, p) for p in protocols]
    asked += [Question(strategy, e2e, protocols[0], SAVING, "traffic") for strategy in (lw, pg)]
    asked += [Question(e2e, one, protocols[0], DEPTH), Question(lw, one, protocols[0], DEPTH, "traffic")]
    return tuple(asked)


MOCOV3 = ", mocov3, momentum 0.9"
STUDIES = {
    "digits": Study(
        "Digits",
        "1,437 images, 10 clients, Dirichlet 0.5, a ViT of width 64 and depth 4, 16 rounds of 3 local epochs; the "
        "first stage has 10 rounds, the others 2 each. SimCLR, and MoCo-v3 where it says so. Settings with more rounds "
        "have the traffic of end_to_end.",
        (PROBE, "linear_probe_20", "linear_probe_all", KNN, TUNED),
        (
            *main_questions("", PROBE, TUNED),
            *main_questions(MOCOV3, PROBE, TUNED),
            Question("layerwise, rounds 44, every 0", WHOLE, PROBE, SAVING, "traffic, to the end"),
        ),
    ),
    "fashion_mnist": Study(
        "Fashion-MNIST, and from there to digits",
        "10 clients of 500 images, a ViT of width 64 and depth 4, patch 7, 48 rounds of one local epoch, SimCLR; the "
        "first stage has 30 rounds, the others 6 each, or all 12. The encoder is evaluated on Fashion-MNIST's test "
        "images, and on digits, on which it was not trained.",
        (PROBE, "linear_probe_20", TUNED, f"{PROBE}@digits", f"{TUNED}@digits"),
        (
            *main_questions("", PROBE, TUNED),
            Question(PROGRESSIVE, WHOLE, f"{PROBE}@digits"),
            Question(WHOLE, LAYERWISE, f"{PROBE}@digits"),
        ),
    ),
    "pictures": Study(
        "Patches of pictures",
        "2,400 patches of 32x32 from 16 of scikit-image's pictures, 10 clients, iid, a ViT of width 64 and depth 4, "
        "patch 8, 24 rounds of 2 local epochs, SimCLR; all stages have 6 rounds. A class is a picture; test patches "
        "are from another part of it.",
        (PROBE, "linear_probe_20", KNN),
        main_questions("", PROBE),
    ),
    "participation": Study(
        "25 of 100 clients per round",
        "Fashion-MNIST: 100 clients of 250 images, 25 drawn in each of 48 rounds, 2 local epochs of batch 64, SimCLR; "
        "all stages have 12 rounds, 96 steps for a client that is drawn in all of them. In the paper's Table 7 "
        "(CIFAR-10, fine-tuned), layerwise is then far above end_to_end.",
        (PROBE, "linear_probe_20"),
        (
            Question(PROGRESSIVE, LAYERWISE, PROBE),
            Question(LAYERWISE, WHOLE, PROBE),
            Question(PROGRESSIVE, WHOLE, PROBE),
        ),
    ),
    "variations": Study(
        "Layers per stage, depth dropout, beta, batch size",
        "The study on digits with one change each (SimCLR). The first three rows are that study's, with its first "
        "seeds.",
        (PROBE, KNN, TUNED),
        (
            Question("layerwise, layers per stage 2", LAYERWISE, PROBE),
            Question("progressive, layers per stage 2", PROGRESSIVE, PROBE),
            Question("layerwise, depth dropout 0.5", LAYERWISE, PROBE),
            Question("progressive, depth dropout 0.5", PROGRESSIVE, PROBE),
            Question("progressive, beta 0.1", "end_to_end, beta 0.1", PROBE),
            Question("end_to_end, beta 0.1", "layerwise, beta 0.1", PROBE),
        ),
        (LAYERWISE, PROGRESSIVE, WHOLE),
    ),
}


def run(names: Iterable[str], jobs: int) -> None:
    """Run the sweeps, and record their runs that are finished, also if one is interrupted."""
    RUNS.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name == "pictures" and not (file := RUNS / "pictures.npz").exists():
            pacing.write_patches(file)
        command = [sys.executable, "run.py", "sweep", f"studies/{name}", "--workdir", str(RUNS / name)]
        try:
            subprocess.run([*command, "--jobs", str(jobs)], cwd=ROOT, check=True)
        finally:
            record([name])


def record(names: Iterable[str]) -> None:
    """Write a line for each finished run of studies; lines of runs that no study has any more are dropped."""
    lines = recorded()
    for name in names:
        for sweep_run in runs_of(name):
            path = RUNS / name / sweep_run.directory
            if (path / "summary.json").is_file():
                metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
                summary = json.loads((path / "summary.json").read_text())
                lines[digest(sweep_run.config)] = {
                    "study": name,
                    "config": digest(sweep_run.config),
                    "label": sweep_run.label,
                    "seed": sweep_run.seed,
                    "versions": json.loads((path / "config.json").read_text())["versions"],
                    "summary": slim(summary),
                    "metrics": [{key: line[key] for key in KEPT if key in line} for line in metrics],
                }
    asked = {digest(sweep_run.config) for name in STUDIES for sweep_run in runs_of(name)}
    written = (json.dumps(line) + "\n" for key, line in lines.items() if key in asked)
    write_whole(RECORDS, "".join(written).encode())


def slim(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the page needs of a run's summary."""

    def accuracies(by_protocol: Mapping[str, Any]) -> dict[str, Any]:
        return {protocol: {"accuracy": result["accuracy"]} for protocol, result in by_protocol.items()}

    stages = summary["resources"]["per_stage"]
    return {
        "evaluation": accuracies(summary["evaluation"]),
        "transfer": {name: accuracies(found) for name, found in summary.get("transfer", {}).items()},
        "baselines": {name: accuracies(found) for name, found in summary["baselines"].items()},
        "resources": {
            "flops_executed": summary["resources"]["flops_executed"],
            "per_stage": [{key: stage[key] for key in ("stage", "rounds", "flops_executed")} for stage in stages],
        },
    }


def words(label: str) -> str:
    """A setting's label as the page has it."""
    for text, shorter in WORDS.items():
        label = label.replace(text, shorter)
    return label


@functools.cache
def runs_of(name: str) -> list[SweepRun]:
    return load_sweep(f"studies/{name}").runs


def recorded() -> dict[str, dict[str, Any]]:
    """The recorded runs by the digest of their configs."""
    lines = RECORDS.read_text().splitlines() if RECORDS.is_file() else []
    return {line["config"]: line for line in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "record", "report"))
    parser.add_argument("studies", nargs="*", choices=[[], *STUDIES], default=[])
    parser.add_argument("--jobs", type=int, default=2, help="processes that train at the same time")
    options = parser.parse_args()
    names = options.studies or list(STUDIES)
    if options.command == "run":
        run(names, options.jobs)
    elif options.command == "record":
        record(names)
    elif not RECORDS.is_file():
        parser.error(f"{RECORDS.relative_to(ROOT)}: there is none; accepted: first `run`")
    else:
        import studies_page  # which imports this module

        studies_page.write_page()


if __name__ == "__main__":
    main()
