"""Writes docs/results.md from the records of the studies (studies.py)."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import studies
from scipy.stats import t as student
from studies import (
    CLAIMS,
    LAYERWISE,
    PROBE,
    PROGRESSIVE,
    SHALLOW,
    STUDIES,
    WHOLE,
    Question,
    Study,
    recorded,
    runs_of,
    words,
)

from lwfedssl_jax.analysis import run_plots, statistics, style
from lwfedssl_jax.analysis.equal_cost import accuracy_at, common_cost, cost_curve
from lwfedssl_jax.analysis.results import all_results
from lwfedssl_jax.analysis.statistics import CHANCE, Difference
from lwfedssl_jax.analysis.wording import MIB, protocol_words
from lwfedssl_jax.config import digest, load, override, resolve
from lwfedssl_jax.data import sources
from lwfedssl_jax.data.partition import partition


class Setting(NamedTuple):
    """What the runs of one setting measured, by seed."""

    label: str
    summaries: dict[int, dict[str, Any]]
    metrics: dict[int, list[dict[str, Any]]]

    def accuracy(self, protocol: str) -> dict[int, float]:
        """In [0, 1], by seed."""
        found = {seed: all_results(summary) for seed, summary in self.summaries.items()}
        return {seed: results[protocol]["accuracy"] for seed, results in found.items() if protocol in results}

    def curve(self, seed: int, protocol: str) -> tuple[np.ndarray, np.ndarray]:
        """Traffic in bytes of a drawn client, and accuracies, of each evaluation."""
        return cost_curve("traffic", protocol, self.metrics[seed], self.summaries[seed])


def settings_of(name: str) -> dict[str, Setting]:
    """The settings of a study that have been run for all of its seeds, by label."""
    found: dict[str, Setting] = {}
    complete: dict[str, bool] = {}
    records = recorded()
    for sweep_run in runs_of(name):
        setting = found.setdefault(sweep_run.label, Setting(sweep_run.label, {}, {}))
        line = records.get(digest(sweep_run.config))
        complete[sweep_run.label] = complete.get(sweep_run.label, True) and line is not None
        if line:
            setting.summaries[sweep_run.seed], setting.metrics[sweep_run.seed] = line["summary"], line["metrics"]
    return {label: setting for label, setting in found.items() if complete[label]}


def shown_settings(name: str) -> dict[str, Setting]:
    """The settings of a study's table, with those of the study digits that it is compared with, for its seeds."""
    seeds = {sweep_run.seed for sweep_run in runs_of(name)}
    others = settings_of("digits") if STUDIES[name].beside else {}

    def with_seeds(setting: Setting) -> Setting:
        by_seed = ({s: x for s, x in values.items() if s in seeds} for values in setting[1:])
        return Setting(setting.label, *by_seed)

    return {b: with_seeds(others[b]) for b in STUDIES[name].beside if b in others} | settings_of(name)


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation over seeds, in %."""
    percent = 100 * np.array([value for value in values if not np.isnan(value)])
    return f"{percent.mean():.1f} ± {percent.std(ddof=1):.1f}" if len(percent) else ""


def table(study: Study, settings: Mapping[str, Setting]) -> Iterator[str]:
    """Accuracies and costs, one line per setting."""
    heads = ["setting", *[protocol_words(p) for p in study.protocols], "traffic (MiB)", "multiply-adds (G)"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    first = next(iter(settings.values()))
    for what, kind in (("untrained", "untrained"), ("from scratch, without pre-training", "scratch")):
        baselines = [summary["baselines"].get(kind, {}) for summary in first.summaries.values()]
        cells = [spread(b[p]["accuracy"] for b in baselines if p in b) for p in study.protocols]
        if any(cells):
            yield f"| {what} | " + " | ".join(cells) + " | 0 | 0 |"
    for setting in settings.values():
        traffic = np.mean([list(style.traffic_by_round(lines).values())[-1] for lines in setting.metrics.values()])
        operations = next(iter(setting.summaries.values()))["resources"]["flops_executed"] / 1e9
        cells = [spread(setting.accuracy(p).values()) for p in study.protocols]
        yield f"| {words(setting.label)} | " + " | ".join([*cells, f"{traffic:.1f}", f"{operations:.3f}"]) + " |"


def equal_traffic(study: Study, settings: Mapping[str, Setting]) -> Iterator[str]:
    """Accuracies at the traffic of the cheapest setting with evaluations during the run, read off the curves."""
    protocol = study.protocols[0]
    curves = {
        label: [setting.curve(seed, protocol) for seed in setting.summaries]
        for label, setting in settings.items()
        if "every 0" not in label  # which have evaluations at the ends of stages only
    }
    cost = common_cost([curve for of_setting in curves.values() for curve in of_setting])
    if len(curves) < 2 or np.isnan(cost):
        return
    two = "; the table below compares two at a time, at the traffic of the cheaper one"
    yield (
        f"All at {cost / MIB:.1f} MiB per drawn client, the traffic of the cheapest, by {protocol_words(protocol)} "
        f"(linear between evaluations{two * any(question.at == 'traffic' for question in study.questions)}): "
        + "; ".join(
            f"{words(label)} {spread(accuracy_at(cost, curve) for curve in of_setting)}"
            for label, of_setting in curves.items()
        )
        + "."
    )


def answer(question: Question, settings: Mapping[str, Setting]) -> tuple[Question, Difference] | None:
    """Compare the two settings of a question over their common seeds; None if runs of one are missing.

    At equal traffic, the question comes back with the traffic of each pair, their mean over seeds.
    """
    if question.better not in settings or question.worse not in settings:
        return None
    better, worse, p = settings[question.better], settings[question.worse], question.protocol
    if question.at != "traffic":
        return question, statistics.compare(p, better.label, worse.label, better.accuracy(p), worse.accuracy(p))
    costs: list[float] = []
    values: tuple[dict[int, float], dict[int, float]] = {}, {}
    for seed in better.summaries:
        curves = [setting.curve(seed, p) for setting in (better, worse)]
        cost = common_cost(curves)
        costs.append(cost)
        for found, curve in zip(values, curves, strict=True):
            found[seed] = accuracy_at(cost, curve)
    at = f"traffic ({np.mean(costs) / MIB:.1f} MiB)"
    return question._replace(at=at), statistics.compare(p, better.label, worse.label, *values)


def smallest_significant(difference: Difference, comparisons: int) -> float:
    """The mean difference from which a comparison with this spread would be significant, by Bonferroni's factor.

    Args:
      difference: of the comparison.
      comparisons: number of tests in the family.
    """
    freedom = difference.seeds - 1
    standard_error = (difference.high - difference.low) / 2 / student.ppf(0.975, freedom)
    return float(standard_error * student.ppf(1 - CHANCE / (2 * comparisons), freedom))


def verdict(difference: Difference) -> str:
    """Supported, contradicted or not distinguishable, by the adjusted p."""
    if np.isnan(difference.p_holm) or difference.p_holm >= CHANCE:
        return "not distinguishable"
    return "supported" if difference.mean > 0 else "contradicted"


def answers(study: Study, settings: Mapping[str, Setting]) -> list[tuple[Question, Difference]]:
    """The questions that the runs answer; their p-values are adjusted as one family."""
    asked = [found for question in study.questions if (found := answer(question, settings))]
    adjusted = statistics.adjust([difference for _, difference in asked])
    return [(question, difference) for (question, _), difference in zip(asked, adjusted, strict=True)]


def verdicts(found: list[tuple[Question, Difference]]) -> Iterator[str]:
    """A line per question."""
    least = "least difference that would count"
    heads = ("claim", "of", "by", "at equal", "points (95 % interval)", "adjusted p", least, "verdict")
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for question, d in found:
        cells = (
            f"{words(question.better)} above {words(question.worse)}",
            question.claim,
            protocol_words(question.protocol),
            question.at,
            f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})",
            f"{d.p_holm:.2g}",
            f"{100 * smallest_significant(d, len(found)):.1f}",
            f"**{verdict(d)}**",
        )
        yield f"| {' | '.join(cells)} |"


def figures() -> None:
    """The pictures of docs/results.md: accuracy against traffic, and how beta deals out images."""
    for name in ("digits", "fashion_mnist", "pictures"):
        settings = settings_of(name)
        drawn = {
            label: [*settings[label].metrics.values()]
            for label in (LAYERWISE, PROGRESSIVE, WHOLE, SHALLOW)
            if label in settings
        }
        if len(drawn) > 1:
            figure = run_plots.accuracy_against_traffic(drawn, PROBE)
            style.save_figure(figure, studies.PICTURES / f"accuracy_against_traffic_{name}.png")
    config = resolve(override(load("quickstart"), {"partition.kind": "dirichlet"}))
    labels = sources.find(config.data).load(config.data).train_labels
    shares = {}
    for beta in (0.1, 0.5, 5.0, 100.0):
        changed = resolve(override(config, {"partition.beta": beta}))
        shares[f"beta = {beta:g}"] = partition(changed.partition, labels, 0)
    run_plots.plot_partitions(labels, shares, studies.PICTURES / "who_owns_what.png")


INTRODUCTION = """# What we measured

`python benchmarks/studies.py run` trains the runs and [records](results/runs.jsonl) them, and
`python benchmarks/studies.py report` writes this page from the records; no number is typed in by hand. Each study is a
sweep that anybody can run: `python run.py sweep studies/digits`.

The settings are small, so that several seeds of every run fit on 2 CPU cores; the paper trains ViT-Tiny for 180 rounds
on COCO's images, and its accuracies are fine-tuned. An encoder of a single layer, trained end to end, stands beside the
strategies as a control: where it is as good as four layers, a data set cannot tell strategies apart that differ in how
they train the later ones.

All accuracies are means ± standard deviations over seeds, in %. Traffic is what a drawn client has exchanged over all
rounds, in both directions, as measured; multiply-adds are those executed per sample. A **verdict** is *supported* or
*contradicted* if the differences, paired by seed, are significant (p < 0.05 by a t-test, adjusted by Holm's method for
all questions of the study), otherwise *not distinguishable*. The least difference that would count is the smallest
that would be significant with this spread and Bonferroni's factor (Holm's can accept slightly less): about half of the
true differences of that size would be found. Intervals are not adjusted.

At equal traffic, the accuracy of the dearer run is read off its evaluations during training, where both have had the
traffic of the cheaper one.

All runs are from one machine. Another processor rounds differently, and over a whole run these differences grow to the
size of a change of seed. On another machine, expect values within the spreads, not equal ones."""


def write_page() -> None:
    """Write docs/results.md; a study with missing runs says so."""
    studies.PICTURES.mkdir(parents=True, exist_ok=True)
    figures()
    versions = sorted(
        {f"{name} {line['versions'][name]}" for line in recorded().values() for name in ("jax", "python")}
    )
    lines = [INTRODUCTION, "", *summary_lines()]
    for name, study in STUDIES.items():
        settings, sweep_runs = shown_settings(name), runs_of(name)
        seeds = sorted({sweep_run.seed for sweep_run in sweep_runs})
        lines += ["", f"## {study.title}", "", f"{study.text} Seeds {', '.join(map(str, seeds))}.", ""]
        missing = {sweep_run.label for sweep_run in sweep_runs} - set(settings)
        if missing:
            lines += [f"Not run for all seeds yet: {'; '.join(map(words, sorted(missing)))}.", ""]
        if not settings:
            continue
        picture = f"accuracy_against_traffic_{name}.png"
        lines += (
            [f"![accuracy against traffic](results/{picture})", ""] if (studies.PICTURES / picture).is_file() else []
        )
        lines += [*table(study, settings), "", *equal_traffic(study, settings)]
        if found := answers(study, settings):
            lines += ["", *verdicts(found)]
    lines += ["", "## How Dirichlet's beta deals out digits", "", "![who owns what](results/who_owns_what.png)", ""]
    lines += ["Versions: " + ", ".join(versions) + ".", ""]
    studies.PAGE.write_text("\n".join(lines))


def summary_lines() -> Iterator[str]:
    """How many questions of each kind have which verdict, over all studies."""
    found = [pair for name, study in STUDIES.items() for pair in answers(study, shown_settings(name))]
    yield "| verdicts of the studies below | " + " | ".join(CLAIMS) + " |"
    yield "|---|" + "---|" * len(CLAIMS)
    for word in ("supported", "contradicted", "not distinguishable"):
        counts = [sum(verdict(d) == word and q.claim == claim for q, d in found) for claim in CLAIMS]
        yield f"| {word} | " + " | ".join(map(str, counts)) + " |"
