"""Figures of one run, and of several by strategy or partition, as PNG; the report draws its own (setting_plots.py)."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lwfedssl_jax.analysis import style
from lwfedssl_jax.analysis.style import (
    STYLES,
    TRAFFIC_LABEL,
    mark_stages,
    new_figure,
    panels,
    traffic_by_round,
    use_whole_numbers,
)
from lwfedssl_jax.analysis.wording import MIB, protocol_words
from lwfedssl_jax.config.protocols import NOISE_ONLY, split_protocol

SHOWN_CLIENTS = 200
SHOWN_EPOCHS = 10
NAMED = 30  # largest number of classes or clients that are drawn with their names
LONGEST_NAME = 20  # characters
LONG_LABEL = 36  # characters; two longer ones do not fit beside each other


def plot_clients(
    labels_N: np.ndarray,
    clients: Sequence[np.ndarray],
    workdir: Path,
    class_names: Sequence[str] = (),
    client_names: Sequence[str] = (),
) -> None:
    """Draw ``plots/clients.png``: how many examples of each class the first clients have.

    Args:
      labels_N: of all training examples, -1 for none.
      clients: indices of each client's examples.
      workdir: the run's.
      class_names, client_names: of the first classes and clients; numbers are drawn where there are none, or too many.
    """
    if (labels_N < 0).all():
        labels_N = np.zeros_like(labels_N)
    figure, axes = new_figure("Data of each client")
    image = axes.imshow(_class_counts(labels_N, clients).T, aspect="auto", cmap="cividis", interpolation="nearest")
    figure.colorbar(image, label="examples")
    axes.set(xlabel="client", ylabel="class")
    use_whole_numbers(axes.xaxis, axes.yaxis)
    for axis, names, count in ((axes.yaxis, class_names, labels_N.max() + 1), (axes.xaxis, client_names, len(clients))):
        if names and count <= NAMED:
            shown = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in names[:count]]
            axis.set_ticks(range(len(shown)), shown, rotation=90 if axis is axes.xaxis else 0)
    style.save_figure(figure, workdir / "plots" / "clients.png")


def plot_partitions(labels_N: np.ndarray, populations: Mapping[str, Sequence[np.ndarray]], path: Path) -> None:
    """Draw several partitions of the same data side by side: each client's classes, and how many examples it has.

    Args:
      labels_N: of all training examples.
      populations: each panel's clients (of many the first ones are shown), by its title.
      path: of the picture.
    """
    counts = {title: _class_counts(labels_N, clients) for title, clients in populations.items()}
    shares = {title: 100 * c / np.maximum(c.sum(1, keepdims=True), 1) for title, c in counts.items()}
    largest = max(x.max() for x in shares.values())
    figure, axes = panels(
        2, len(counts), size=(2.2 * len(counts) + 1.2, 3.6), sharex="col", sharey="row", height_ratios=(1, 3)
    )
    for (title, counts_KxC), (top, below) in zip(counts.items(), axes.T, strict=True):
        top.set_title(title)
        top.bar(range(len(counts_KxC)), counts_KxC.sum(1), width=0.8, color="0.4")
        image = below.imshow(
            shares[title].T, aspect="auto", cmap="Blues", interpolation="nearest", vmin=0, vmax=largest
        )
        below.set(xlabel="client")
        use_whole_numbers(below.xaxis, below.yaxis)
    axes[0, 0].set(ylabel="examples")
    axes[1, 0].set(ylabel="class")
    figure.align_ylabels(axes[:, 0])
    figure.colorbar(image, ax=axes, label="share of the client's examples (%)")
    style.save_figure(figure, path)


def plot_metrics(lines: list[dict[str, Any]], workdir: Path) -> None:
    """Draw ``plots/loss.png`` with the ends of stages and, if there are evaluations, ``plots/accuracy.png``.

    Args:
      lines: of ``metrics.jsonl``.
      workdir: the run's.
    """
    rounds = [line for line in lines if "event" not in line]
    figure, axes = new_figure("Training loss")
    trained = [line for line in rounds if line["loss"] is not None]
    axes.plot([line["round"] for line in trained], [line["loss"] for line in trained], color="tab:blue")
    mark_stages(axes, rounds)
    axes.set(ylabel="mean loss per sample")
    style.save_figure(figure, workdir / "plots" / "loss.png")

    own = [line for line in lines if "accuracy" in line and line.get("baseline") != NOISE_ONLY]
    evaluations = [line for line in own if not split_protocol(line["protocol"])[1]]
    if evaluations:
        figure, axes = new_figure("Accuracy against traffic")
        plot_evaluations(axes, evaluations, traffic_by_round(lines))
        longest = max(len(text) for text in axes.get_legend_handles_labels()[1])
        figure.legend(loc="outside lower center", ncols=2 if longest < LONG_LABEL else 1)
        style.save_figure(figure, workdir / "plots" / "accuracy.png")


def plot_pacing(lines: list[dict[str, Any]], threshold: float, path: Path) -> None:
    """Draw the signal of adaptive pacing over the rounds, and the threshold below which a stage ends."""
    rounds = [line for line in lines if "event" not in line]
    figure, axes = new_figure("Adaptive pacing")
    for _, stage in itertools.groupby(rounds, lambda line: line["stage"]):
        known = [line for line in stage if line.get("loss_fall") is not None]
        axes.plot([line["round"] for line in known], [100 * line["loss_fall"] for line in known], **STYLES[0])
    axes.axhline(
        100 * threshold, color="0.3", linestyle="--", label="below it, a stage ends; the last one has the rest"
    )
    mark_stages(axes, rounds)
    axes.set(ylabel="how much the loss would fall\nif the whole run went on at this pace (%)")
    use_whole_numbers(axes.xaxis)
    figure.legend(loc="outside lower center")
    style.save_figure(figure, path)


def plot_evaluations(axes: Any, evaluations: Sequence[dict[str, Any]], traffic: Mapping[int, float]) -> None:
    """Draw the accuracies of one run against traffic (in MiB, by round), with one line per protocol."""
    for marker, protocol in zip("osD^v<>*", dict.fromkeys(line["protocol"] for line in evaluations), strict=False):
        points = [line for line in evaluations if line["protocol"] == protocol]
        points.sort(key=lambda p: int(p["round"]))  # training from scratch is written last
        has_scratch = any("baseline" in p for p in points)
        axes.errorbar(
            [traffic[p["round"]] for p in points],
            [100 * p["accuracy"] for p in points],
            [100 * p.get("std", 0) for p in points],
            marker=marker,
            linestyle="none" if has_scratch else "-",  # training from scratch is not a first step of the training
            capsize=3,
            label=protocol_words(protocol) + (" (at 0: from scratch)" if has_scratch else ""),
        )
    axes.set(xlabel=TRAFFIC_LABEL, ylabel="accuracy (%)")
    axes.grid(alpha=0.3)


def plot_distance(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw the distance between the clients' models over the rounds; rounds without one are left out."""
    rounds = [line for line in lines if "event" not in line]
    known = [line for line in rounds if line["client_distance"] is not None]
    figure, axes = new_figure("Distance between clients' models")
    axes.plot(
        [line["round"] for line in known],
        [line["client_distance"] for line in known],
        **STYLES[0] | {"markersize": 3},
    )
    mark_stages(axes, rounds)
    axes.set(ylabel="distance from their mean\n(L2 norm of trained parameters,\nweighted RMS over clients)")
    axes.set_ylim(bottom=0)
    style.save_figure(figure, path)


def accuracy_against_traffic(runs: Mapping[str, Sequence[list[dict[str, Any]]]], protocol: str) -> Any:
    """Draw accuracy by one protocol against traffic: one line per label, in a band of one standard deviation.

    Args:
      runs: by label the lines of ``metrics.jsonl`` of its runs, which differ only in the seed. The rounds that all
        of them have evaluated are shown.
      protocol: such as ``knn`` or ``linear_probe_5``.

    Returns:
      The matplotlib figure.

    Raises:
      ValueError: the runs of a label share no round that the protocol has evaluated.
    """
    figure, axes = new_figure(f"Accuracy against traffic: {protocol_words(protocol)}")
    for look, (label, seeds) in zip(itertools.cycle(STYLES), runs.items(), strict=False):
        accuracies = [
            {
                line["round"]: 100 * line["accuracy"]
                for line in lines
                if line.get("protocol") == protocol and line.get("baseline") != NOISE_ONLY
            }
            for lines in seeds
        ]
        rounds = sorted(set.intersection(*map(set, accuracies)))
        if not rounds:
            raise ValueError(f"the runs of {label!r} share no round that {protocol!r} has evaluated")
        traffic = np.mean([[total[r] for r in rounds] for total in map(traffic_by_round, seeds)], 0)
        accuracy_SxR = np.array([[accuracy[r] for r in rounds] for accuracy in accuracies])
        mean, std = accuracy_SxR.mean(0), accuracy_SxR.std(0, ddof=1 if len(seeds) > 1 else 0)
        axes.plot(traffic, mean, label=label, **look)
        if len(seeds) > 1:
            top = np.minimum(mean + std, 100)
            axes.fill_between(traffic, mean - std, top, color=look["color"], alpha=0.2, linewidth=0)
    axes.set(xlabel=TRAFFIC_LABEL, ylabel="accuracy (%)")
    several = any(len(seeds) > 1 for seeds in runs.values())
    title = "mean ± standard deviation over runs" if several else None
    figure.legend(loc="outside lower center", ncols=3, title=title)
    axes.grid(alpha=0.3)
    return figure


class Spending(NamedTuple):
    """One line of a strategy: what a client spends of a resource.

    Attributes:
      by_round: the amount at each round from ``first_round`` on.
      total: the amount for the whole run with the config's number of local epochs.
      grows: whether the total is proportional to the local epochs; otherwise they do not change it.
      form: how the line differs from others of its strategy.
    """

    by_round: np.ndarray
    total: float
    grows: bool
    first_round: int = 0
    form: Mapping[str, Any] = {}


def plot_resources(strategies: Mapping[str, Mapping[str, Any]], local_epochs: int, path: Path) -> None:
    """Draw what a client spends by strategy: over the rounds, and in total for other numbers of local epochs.

    Args:
      strategies: ledgers as ``costs.ledger.all_strategies`` returns them; memory is left out if it is None.
      local_epochs: those of the ledgers.
      path: of the picture.
    """
    resources = [
        (_operations, "Operations per sample{}\n(10⁹ multiply-adds)"),
        (_traffic, "Traffic both ways{}\n(MiB)"),
    ]
    if all(ledger["peak_memory_bytes"] is not None for ledger in strategies.values()):
        resources = [(_peak_memory, "Peak memory of a step\n(MiB)"), *resources]
    figure, axes = panels(2, len(resources), size=(3.2 * len(resources), 5.6))
    for (upper, lower), (spending_of, label) in zip(axes.T, resources, strict=True):
        spending = {name: spending_of(ledger) for name, ledger in strategies.items()}
        plot_by_round(upper, spending)
        plot_by_epochs(lower, spending, local_epochs)
        upper.set(xlabel="round", ylabel=label.format(" so far"))
        lower.set(xlabel="local epochs E", ylabel=label.format(""))
        for panel in (upper, lower):
            panel.set_ylim(0, 1.08 * panel.dataLim.y1)
            panel.grid(alpha=0.3)
            use_whole_numbers(panel.xaxis)
    axes[0, 0].set_title("By round", loc="left", fontweight="bold")
    axes[1, 0].set_title("In total, by local epochs", loc="left", fontweight="bold")
    figure.align_ylabels()
    last = axes[1, -1]  # its lines are those of the legend
    last.plot([], [], color="0.3", linestyle="--", label="by the paper's rule")
    last.plot([], [], color="0.3", linestyle=":", label=f"E = {local_epochs} of this config")
    figure.legend(*last.get_legend_handles_labels(), loc="outside lower center", ncols=2 * len(resources) - 1)
    style.save_figure(figure, path)


def plot_by_round(axes: Any, spending: Mapping[str, Sequence[Spending]]) -> None:
    """Draw each strategy's lines over the rounds. As lines may coincide, their markers take turns."""
    for number, (look, (name, lines)) in enumerate(zip(itertools.cycle(STYLES), spending.items(), strict=False)):
        for line in lines:
            rounds = range(line.first_round, line.first_round + len(line.by_round))
            markers = (number * (rounds[-1] // 24), max(1, rounds[-1] // 8))
            axes.plot(rounds, line.by_round, **{**look, **line.form}, label=name, markevery=markers)


def plot_by_epochs(axes: Any, spending: Mapping[str, Sequence[Spending]], local_epochs: int) -> None:
    """Draw each strategy's totals over the local epochs, with a dotted line at those of the config."""
    epochs = np.arange(1, max(SHOWN_EPOCHS, local_epochs) + 1)
    for number, (look, (name, lines)) in enumerate(zip(itertools.cycle(STYLES), spending.items(), strict=False)):
        for line in lines:
            totals = epochs * line.total / local_epochs if line.grows else np.full(len(epochs), line.total)
            axes.plot(epochs, totals, **{**look, **line.form}, label=name, markevery=(number, len(spending)))
    axes.axvline(local_epochs, color="0.3", linestyle=":")


def _operations(ledger: Mapping[str, Any]) -> list[Spending]:
    """Multiply-adds per sample in 10⁹: as executed, and by the paper's rule."""
    executed, rule = (_cumulative(ledger, key) / 1e9 for key in ("flops_executed", "flops_paper_rule"))
    dashed = {"linestyle": "--", "markerfacecolor": "none"}
    return [Spending(executed, executed[-1], True), Spending(rule, rule[-1], True, form=dashed)]


def _traffic(ledger: Mapping[str, Any]) -> list[Spending]:
    """Traffic in MiB, both directions."""
    exchanged = (_cumulative(ledger, "download_bytes") + _cumulative(ledger, "upload_bytes")) / MIB
    return [Spending(exchanged, exchanged[-1], False)]


def _peak_memory(ledger: Mapping[str, Any]) -> list[Spending]:
    """Peak memory in MiB of a step in each round; the total is the largest."""
    rounds = [stage["rounds"] for stage in ledger["per_stage"]]
    peaks = np.repeat([stage["peak_memory_bytes"] / MIB for stage in ledger["per_stage"]], rounds)
    return [Spending(peaks, max(peaks), False, first_round=1, form={"drawstyle": "steps-mid"})]


def _cumulative(ledger: Mapping[str, Any], key: str) -> np.ndarray:
    """The amount spent up to each round, from 0 on; the rounds of a stage cost the same."""
    stages = [np.full(stage["rounds"], stage[key] / stage["rounds"]) for stage in ledger["per_stage"]]
    return np.cumsum(np.concatenate([[0.0], *stages]))


def _class_counts(labels_N: np.ndarray, clients: Sequence[np.ndarray]) -> np.ndarray:
    """KxC counts of examples of the first clients; images without a label (-1) are of no class."""
    shown = range(min(len(clients), SHOWN_CLIENTS))
    # One is added to all labels, so that images without a label fill the first column, which is dropped.
    return np.stack([np.bincount(labels_N[clients[i]] + 1, minlength=labels_N.max() + 2)[1:] for i in shown])
