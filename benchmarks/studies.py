"""Trains what docs/results.md reports, resumably, and writes that page and its figures.

    python benchmarks/studies.py run [STUDY ...]     # an hour or two on 2 cores; recorded runs are not repeated
    python benchmarks/studies.py report              # docs/results.md from what is recorded

Every run is `train` of a config with overrides, in a work directory of its own under runs/studies; what it
measured becomes a line of docs/results/runs.jsonl. Delete that file to measure everything again.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import ttest_rel

from lwfedssl_jax.analysis import run_plots, style

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "studies"
PAGE, PICTURES = ROOT / "docs" / "results.md", ROOT / "docs" / "results"
RECORDS = PICTURES / "runs.jsonl"
SEEDS = (0, 1, 2)
STRATEGIES = ("layerwise", "progressive", "end_to_end")
# arXiv 2401.11647, fine-tuned accuracy on CIFAR-10 with mocov3, best first.
DEFAULT_ORDER = ("progressive", "end_to_end", "layerwise")
PARTIAL_ORDER = ("progressive", "layerwise", "end_to_end")
PROBE, KNN = "linear_probe_5", "knn"

DIGITS: dict[str, Any] = {
    "model.depth": 4,
    "federation.rounds": 16,
    "evaluation.labels_per_class": (5, 0),
}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "simclr": {},
    "mocov3": {"objective.name": "mocov3", "objective.momentum": 0.9},
}
FASHION: dict[str, Any] = {
    "data.name": "fashion_mnist",
    "data.image_size": 28,
    "model.patch_size": 7,
    "model.depth": 4,
    "partition.clients": 20,
    "federation.clients_per_round": 3,
    "federation.rounds": 4,
    "federation.local_epochs": 1,
    "optimizer.batch_size": 128,
    "optimizer.learning_rate": 0.008,
    "evaluation.labels_per_class": (5, 100),
}


class Study(NamedTuple):
    """A question, and the runs that answer it: overrides of the quick start by the label of a table's row."""

    title: str
    text: str
    settings: dict[str, dict[str, Any]]
    strategies: tuple[str, ...] = STRATEGIES
    base: dict[str, Any] = DIGITS
    protocols: tuple[str, ...] = (PROBE, KNN)
    paper_order: Mapping[str, tuple[str, ...]] = {}


STUDIES = {
    "digits": Study(
        "The strategies on digits",
        "All 1,437 training images, 10 clients, Dirichlet 0.5, by objective.",
        OBJECTIVES,
        paper_order=dict.fromkeys(OBJECTIVES, DEFAULT_ORDER),
    ),
    "layers_per_stage": Study(
        "Layers per stage",
        "SimCLR on digits, by layers per stage.",
        {"1": {}, "2": {"strategy.layers_per_stage": 2}},
        ("layerwise", "progressive"),
    ),
    "depth_dropout": Study(
        "Depth dropout",
        "SimCLR on digits, by the probability that a step skips a layer that an earlier stage has trained.",
        {"0": {}, "0.5": {"additions.depth_dropout": 0.5}},
        ("layerwise", "progressive"),
    ),
    "participation": Study(
        "Partial participation",
        "SimCLR on digits: all of 10 clients in each round, or 25 drawn from 100.",
        {"10 of 10": {}, "25 of 100": {"partition.clients": 100, "federation.clients_per_round": 25}},
        paper_order={"10 of 10": DEFAULT_ORDER, "25 of 100": PARTIAL_ORDER},
    ),
    "beta": Study(
        "Dirichlet beta",
        "SimCLR on digits, by Dirichlet beta; the smaller it is, the more the classes of the clients differ.",
        {"0.1": {"partition.beta": 0.1}, "0.5": {}},
    ),
    "batch_size": Study(
        "Batch size",
        "SimCLR on digits, by batch size; the learning rate scales with it.",
        {"32": {}, "64": {"optimizer.batch_size": 64}},
        ("layerwise", "end_to_end"),
    ),
    "fashion_mnist": Study(
        "Fashion-MNIST",
        "Its 60,000 images split over 20 clients, Dirichlet 0.5, 3 of them drawn in each round, 4 rounds of one local "
        "epoch (at most 12 clients take part), a ViT of width 64 and depth 4, patch 7; by objective.",
        OBJECTIVES,
        base=FASHION,
        paper_order=dict.fromkeys(OBJECTIVES, DEFAULT_ORDER),
    ),
    "fine_tuning": Study(
        "Fine-tuning",
        "The paper's protocol on digits, all labels, 40 epochs.",
        {"mocov3": OBJECTIVES["mocov3"] | {"evaluation.fine_tune_epochs": 40}},
        protocols=("fine_tune",),
        paper_order={"mocov3": DEFAULT_ORDER},
    ),
}


def runs(study: Study) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Yield ``(row, strategy, seed, overrides)`` of every run of a study."""
    for seed, (row, changes), strategy in itertools.product(SEEDS, study.settings.items(), study.strategies):
        yield row, strategy, seed, study.base | {"strategy.name": strategy, "runtime.seed": seed} | changes


def recorded() -> dict[str, dict[str, Any]]:
    """The finished runs of all studies, by their overrides."""
    lines = RECORDS.read_text().splitlines() if RECORDS.is_file() else []
    return {key(record["overrides"]): record for record in map(json.loads, lines)}


def key(overrides: dict[str, Any]) -> str:
    return json.dumps(overrides, sort_keys=True)


def config_of(overrides: dict[str, Any]) -> Any:
    from lwfedssl_jax.config import load, override, resolve

    # The recorded runs had even stages; the quick start's first stage has got more since.
    return resolve(override(load("quickstart"), {"strategy.first_stage_share": 0.0} | overrides))


def run(names: list[str]) -> None:
    """Train and record the runs that are missing, and print one line per run."""
    from lwfedssl_jax.experiment import train
    from lwfedssl_jax.system import devices
    from lwfedssl_jax.workdir import WorkDir
    from lwfedssl_jax.workdir.directory import default_workdir

    devices.set_up_cpu()
    devices.set_up_cache(None)
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name in names:
        for row, strategy, seed, overrides in runs(STUDIES[name]):
            if key(overrides) in recorded():
                continue
            config, began = config_of(overrides), time.monotonic()
            workdir = WorkDir(RUNS / default_workdir("quickstart", config).name, config)
            summary = train.train(config, workdir)
            record = {
                "overrides": overrides,
                "versions": json.loads((workdir.path / "config.json").read_text())["versions"],
                "summary": summary,
                "metrics": workdir.metrics(),
            }
            written = RECORDS.read_text() if RECORDS.is_file() else ""
            part = RECORDS.with_suffix(".part")
            part.write_text(written + json.dumps(record) + "\n")
            part.replace(RECORDS)
            accuracy = {p: round(100 * r["accuracy"], 1) for p, r in summary["evaluation"].items()}
            print(f"{name}, {row}, {strategy}, seed {seed}: {accuracy}, {time.monotonic() - began:.0f} s", flush=True)


class Cell(NamedTuple):
    """What the seeds of one setting and strategy gave."""

    row: str
    strategy: str
    summaries: list[dict[str, Any]]
    metrics: list[list[dict[str, Any]]]

    def accuracy(self, protocol: str) -> np.ndarray:
        """In %, by seed."""
        return np.array([100 * summary["evaluation"][protocol]["accuracy"] for summary in self.summaries])


def cells(study: Study) -> list[Cell]:
    """Finished runs of a study, in the order of its table; settings with a missing seed are left out."""
    found: dict[tuple[str, str], Cell] = {}
    records = recorded()
    for row, strategy, _, overrides in runs(study):
        cell = found.setdefault((row, strategy), Cell(row, strategy, [], []))
        if record := records.get(key(overrides)):
            cell.summaries.append(record["summary"])
            cell.metrics.append(record["metrics"])
    order = itertools.product(study.settings, study.strategies)
    return [found[key] for key in order if len(found[key].summaries) == len(SEEDS)]


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation over seeds."""
    return f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"


def table(study: Study, found: list[Cell]) -> list[str]:
    """Accuracies and costs, one line per setting and strategy."""
    names = {PROBE: "linear probe, 5 labels per class (%)", KNN: "kNN (%)", "fine_tune": "fine-tuning (%)"}
    head = ["setting", "strategy", *[names[p] for p in study.protocols]]
    head += ["measured traffic per drawn client over all rounds (MiB)", "executed multiply-adds per sample (G)"]
    if "fine_tune" in study.protocols:
        head.insert(3, "from scratch (%)")
        head.insert(4, "mean per-class accuracy / precision / recall / F1 (%)")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for cell in found:
        row = [cell.row, cell.strategy, *[spread(cell.accuracy(p)) for p in study.protocols]]
        if "fine_tune" in study.protocols:
            scratch = [100 * s["baselines"]["scratch"]["fine_tune"]["accuracy"] for s in cell.summaries]
            row.append(spread(np.array(scratch)))
            scores = ("mean_per_class_accuracy", "precision", "recall", "f1")
            means = [np.mean([100 * s["evaluation"]["fine_tune"][k] for s in cell.summaries]) for k in scores]
            row.append(" / ".join(f"{mean:.1f}" for mean in means))
        traffic = np.mean([list(style.traffic_by_round(lines).values())[-1] for lines in cell.metrics])
        operations = cell.summaries[0]["resources"]["flops_executed"] / 1e9
        skipped = [line["layers_skipped"] for lines in cell.metrics for line in lines if "layers_skipped" in line]
        measured = f" (skipped: {np.mean(skipped):.3f})" if skipped else ""
        row += [f"{traffic:.1f}", f"{operations:.3f}{measured}"]
        lines.append("| " + " | ".join(row) + " |")
    return lines


def untrained(found: list[Cell], protocols: Sequence[str]) -> str:
    """The same protocols on the encoders before training, over all seeds."""
    values = {
        p: np.array([100 * s["baselines"]["untrained"][p]["accuracy"] for s in found[0].summaries])
        for p in protocols
        if p in found[0].summaries[0]["baselines"]["untrained"]
    }
    return "Untrained: " + ", ".join(f"{p} {spread(v)}" for p, v in values.items()) + "." if values else ""


def verdicts(study: Study, found: list[Cell]) -> list[str]:
    """How each step of the paper's order came out: differences paired over seeds, with a paired t-test."""
    lines = []
    for row, order in study.paper_order.items():
        by_strategy = {cell.strategy: cell for cell in found if cell.row == row}
        for better, worse in itertools.pairwise(order):
            if better not in by_strategy or worse not in by_strategy:
                continue
            for protocol in study.protocols:
                difference = by_strategy[better].accuracy(protocol) - by_strategy[worse].accuracy(protocol)
                p = ttest_rel(by_strategy[better].accuracy(protocol), by_strategy[worse].accuracy(protocol)).pvalue
                word = (
                    "yes in every seed"
                    if difference.min() > 0
                    else "no in every seed"
                    if difference.max() < 0
                    else "seeds differ"
                )
                lines.append(
                    f"* {row}: is {better} above {worse} by {protocol}? **{word}** "
                    f"({difference.mean():+.1f} ± {difference.std(ddof=1):.1f} points, p = {p:.2g})"
                )
    return lines


def figures() -> None:
    """The pictures of docs/results.md: three of the first study's runs, and how beta deals out its images."""
    from lwfedssl_jax.config import override, resolve
    from lwfedssl_jax.data import sources
    from lwfedssl_jax.data.partition import partition

    config = config_of(DIGITS)
    first = [cell for cell in cells(STUDIES["digits"]) if cell.row == "simclr"]
    if first:
        by_strategy = {cell.strategy: cell.metrics for cell in sorted(first, key=lambda cell: cell.strategy)}
        style.save_figure(
            run_plots.accuracy_against_traffic(by_strategy, KNN), PICTURES / "accuracy_against_traffic.png"
        )
        summary = first[0].summaries[0]
        run_plots.plot_resources(summary["strategies"], config.federation.local_epochs, PICTURES / "resources.png")
        run_plots.plot_distance(first[0].metrics[0], PICTURES / "client_distance.png")
    labels = sources.find(config.data).load(config.data).train_labels
    shares = {}
    for beta in (0.1, 0.5, 5.0, 100.0):
        changed = resolve(override(config, {"partition.beta": beta}))
        shares[f"beta = {beta:g}"] = partition(changed.partition, labels, 0)
    run_plots.plot_partitions(labels, shares, PICTURES / "who_owns_what.png")


def write_page() -> None:
    """Write docs/results.md; a study with missing runs says so."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    figures()
    versions = sorted({f"{name} {r['versions'][name]}" for r in recorded().values() for name in ("jax", "python")})
    lines = [
        "# What we measured",
        "",
        "`python benchmarks/studies.py run` trains the runs and [records](results/runs.jsonl) them, and",
        "`python benchmarks/studies.py report` writes this page from the records; no number is typed in by hand. All",
        "accuracies are mean ± standard deviation over seeds " + ", ".join(map(str, SEEDS)) + ".",
        "",
        "The studies on digits share a setting: the quick start's (10 clients, Dirichlet 0.5, SimCLR, batch 32, 3",
        "local epochs) with a ViT of width 64 and depth 4, and 16 rounds. The setting is small, so that three seeds of",
        "every run fit on 2 CPU cores; at other sizes the order of the strategies may differ. Below a table, each line",
        "asks whether the paper's order holds here. That order comes from its fine-tuned accuracies on CIFAR-10.",
        "With three seeds, the same sign in every seed is weak evidence: the p-value is that of a paired t-test,",
        "without correction for the number of comparisons.",
        "",
        "All stages had equally many rounds: four on digits, one on Fashion-MNIST. That starves layerwise's first",
        "stage: [with more rounds for it](guides/stages.md), layerwise gains more than ten points on digits. So these",
        "figures say little about the paper's order.",
        "",
        "All runs are from one machine. Another processor rounds differently, and over a whole run these differences",
        "grow to the size of a change of seed. On another machine, expect values within the spreads, not equal ones.",
        "The runs were made before the random streams of a seed changed ([changelog](about/changelog.md)): today a",
        "seed draws other partitions and batches.",
        "",
        "![accuracy against traffic](results/accuracy_against_traffic.png)",
        "![what a client spends](results/resources.png)",
        "![distance between clients](results/client_distance.png)",
        "![who owns what](results/who_owns_what.png)",
    ]
    for name, study in STUDIES.items():
        found = cells(study)
        lines += ["", f"## {study.title}", "", f"{study.text} `benchmarks/studies.py run {name}`", ""]
        whole = len(study.settings) * len(study.strategies)
        if len(found) < whole:
            lines += [f"{whole - len(found)} of {whole} cells have not been run for all seeds.", ""]
        if not found:
            continue
        lines += [*table(study, found), "", untrained(found, study.protocols)]
        lines += ["", *verdicts(study, found)] if study.paper_order else []
    lines += ["", "Versions: " + ", ".join(versions) + ".", ""]
    PAGE.write_text("\n".join(line for line, before in zip(lines, ["x", *lines], strict=False) if line or before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("studies", nargs="*", choices=[[], *STUDIES], default=[])
    options = parser.parse_args()
    if options.command == "run":
        run(options.studies or list(STUDIES))
    elif not RECORDS.is_file():
        parser.error(f"{RECORDS.relative_to(ROOT)}: there is none; accepted: first `run`")
    else:
        write_page()


if __name__ == "__main__":
    main()
