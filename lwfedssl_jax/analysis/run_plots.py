"""Plots and tables of runs, for eyes."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lwfedssl_jax.analysis.style import STYLES, TRAFFIC_LABEL, mark_stages, new_figure, panels, save, traffic_by_round
from lwfedssl_jax.analysis.wording import MIB, protocol_words

SHOWN_CLIENTS = 200
SHOWN_EPOCHS = 10


def plot_clients(labels_N: np.ndarray, clients: Sequence[np.ndarray], workdir: Path) -> None:
    """``plots/clients.png``: how many examples of each class each client owns (of many clients the first ones)."""
    if (labels_N < 0).all():
        labels_N = np.zeros_like(labels_N)
    figure, axes = new_figure("Who owns what")
    image = axes.imshow(_class_counts(labels_N, clients).T, aspect="auto", cmap="cividis", interpolation="nearest")
    figure.colorbar(image, label="examples")
    axes.set(xlabel="client", ylabel="class")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    save(figure, workdir / "plots" / "clients.png")


def plot_partitions(labels_N: np.ndarray, populations: Mapping[str, Sequence[np.ndarray]], path: Path) -> None:
    """Several partitions of the same data beside each other: each client's classes, and how much it owns.

    Args:
      labels_N: of all training examples.
      populations: what each panel shows (of many clients the first ones), by its title.
      path: of the picture.
    """
    counts = {title: _class_counts(labels_N, clients) for title, clients in populations.items()}
    shares = {title: 100 * c / np.maximum(c.sum(1, keepdims=True), 1) for title, c in counts.items()}
    figure, axes = panels(
        2, len(counts), size=(2.2 * len(counts) + 1.2, 3.6), sharex="col", sharey="row", height_ratios=(1, 3)
    )
    for (title, counts_KxC), (top, below) in zip(counts.items(), axes.T, strict=True):
        top.set_title(title)
        top.bar(range(len(counts_KxC)), counts_KxC.sum(1), width=0.8, color="0.4")
        image = below.imshow(
            shares[title].T,
            aspect="auto",
            cmap="Blues",
            interpolation="nearest",
            vmin=0,
            vmax=max(x.max() for x in shares.values()),
        )
        below.set(xlabel="client")
        below.xaxis.get_major_locator().set_params(integer=True)
        below.yaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set(ylabel="examples")
    axes[1, 0].set(ylabel="class")
    figure.align_ylabels(axes[:, 0])
    figure.colorbar(image, ax=axes, label="share of the client's examples (%)")
    save(figure, path)


def plot_metrics(lines: list[dict[str, Any]], workdir: Path) -> None:
    """``plots/loss.png`` with stage boundaries and ``plots/accuracy.png`` against traffic, from ``metrics.jsonl``."""
    rounds = [line for line in lines if "event" not in line]
    figure, axes = new_figure("Training loss")
    trained = [line for line in rounds if line["loss"] is not None]
    axes.plot([line["round"] for line in trained], [line["loss"] for line in trained], color="tab:blue")
    mark_stages(axes, rounds)
    axes.set(ylabel="mean loss of a sample")
    save(figure, workdir / "plots" / "loss.png")

    if not (evaluations := [line for line in lines if line.get("event") == "evaluation"]):
        return
    traffic = traffic_by_round(lines)
    figure, axes = new_figure("Accuracy against traffic")
    for marker, protocol in zip("osD^v<>*", dict.fromkeys(line["protocol"] for line in evaluations), strict=False):
        points = [line for line in evaluations if line["protocol"] == protocol]
        points.sort(key=lambda p: int(p["round"]))  # training from scratch is written last
        x, y = [traffic[p["round"]] for p in points], [100 * p["accuracy"] for p in points]
        label = protocol_words(protocol) + (" (at 0: from scratch)" if any("baseline" in p for p in points) else "")
        line = "none" if any("baseline" in p for p in points) else "-"  # from scratch is no beginning of the training
        spread = [100 * p.get("std", 0) for p in points]
        axes.errorbar(x, y, spread, marker=marker, linestyle=line, capsize=3, label=label)
    axes.set(xlabel=TRAFFIC_LABEL, ylabel="accuracy (%)")
    figure.legend(loc="outside lower center", ncols=2)
    axes.grid(alpha=0.3)
    save(figure, workdir / "plots" / "accuracy.png")


def plot_distance(lines: list[dict[str, Any]], path: Path) -> None:
    """How far the clients' models of a round are apart, over the rounds; rounds without any are left out."""
    rounds = [line for line in lines if "event" not in line]
    known = [line for line in rounds if line["client_distance"] is not None]
    figure, axes = new_figure("How far clients' models are apart")
    axes.plot(
        [line["round"] for line in known],
        [line["client_distance"] for line in known],
        **STYLES[0] | {"markersize": 3},
    )
    mark_stages(axes, rounds)
    axes.set(ylabel="distance from their mean\n(L2 norm of trained parameters,\nweighted RMS over clients)")
    axes.set_ylim(bottom=0)
    save(figure, path)


def plot_accuracy_against_traffic(
    runs: Mapping[str, Sequence[list[dict[str, Any]]]], protocol: str, path: Path
) -> None:
    """``accuracy_against_traffic`` as a picture."""
    save(accuracy_against_traffic(runs, protocol), path)


def accuracy_against_traffic(runs: Mapping[str, Sequence[list[dict[str, Any]]]], protocol: str) -> Any:
    """Accuracy by one protocol against traffic: a line a label, a band of one standard deviation over its runs.

    Args:
      runs: for each label the lines of ``metrics.jsonl`` of its runs, which differ in the seed; what all of
        them have evaluated is shown.
      protocol: such as ``knn`` or ``linear_probe_5``.

    Returns:
      The matplotlib figure.

    Raises:
      ValueError: the protocol has judged the runs of a label at no round that they share.
    """
    figure, axes = new_figure(f"Accuracy against traffic: {protocol_words(protocol)}")
    most = 0
    for style, (label, seeds) in zip(itertools.cycle(STYLES), runs.items(), strict=False):
        accuracies = [
            {line["round"]: 100 * line["accuracy"] for line in lines if line.get("protocol") == protocol}
            for lines in seeds
        ]
        rounds = sorted(set.intersection(*map(set, accuracies)))
        if not rounds:
            raise ValueError(f"{protocol!r} has judged the runs of {label!r} at no round that they share")
        traffic = np.mean([[spent[r] for r in rounds] for spent in map(traffic_by_round, seeds)], 0)
        accuracy_SxR = np.array([[accuracy[r] for r in rounds] for accuracy in accuracies])
        mean, spread = accuracy_SxR.mean(0), accuracy_SxR.std(0, ddof=1 if len(seeds) > 1 else 0)
        axes.plot(traffic, mean, label=label, **style)
        if len(seeds) > 1:
            axes.fill_between(
                traffic, mean - spread, np.minimum(mean + spread, 100), color=style["color"], alpha=0.2, linewidth=0
            )
        most = max(most, len(seeds))
    axes.set(xlabel=TRAFFIC_LABEL, ylabel="accuracy (%)")
    title = "mean ± standard deviation over runs" if most > 1 else None
    figure.legend(loc="outside lower center", ncols=3, title=title)
    axes.grid(alpha=0.3)
    return figure


def plot_resources(strategies: Mapping[str, Mapping[str, Any]], local_epochs: int, path: Path) -> None:
    """What a client spends by strategy: over the rounds, and in all for other numbers of local epochs.

    Args:
      strategies: ledgers as ``resources.all_strategies`` gives them; memory is left out where it is None.
      local_epochs: that the ledgers hold for.
      path: of the picture.
    """
    memory = all(ledger["peak_memory_bytes"] is not None for ledger in strategies.values())
    epochs = np.arange(1, max(SHOWN_EPOCHS, local_epochs) + 1)
    figure, axes = panels(2, 2 + memory, size=(3.2 * (2 + memory), 5.6))
    (*_, operations, traffic), (*_, operations_of_e, traffic_of_e) = axes
    for number, (style, (name, ledger)) in enumerate(zip(itertools.cycle(STYLES), strategies.items(), strict=False)):
        rounds = [stage["rounds"] for stage in ledger["per_stage"]]
        line = {**style, "label": name}
        rule = {**style, "linestyle": "--", "markerfacecolor": "none"}
        # Lines may coincide: their markers take turns.
        sparse = {"markevery": (number * (sum(rounds) // 24), max(1, sum(rounds) // 8))}
        in_turn = {"markevery": (number, len(strategies))}

        executed, by_rule = (_cumulative(ledger, key) / 1e9 for key in ("flops_executed", "flops_paper_rule"))
        exchanged = (_cumulative(ledger, "download_bytes") + _cumulative(ledger, "upload_bytes")) / MIB
        operations.plot(executed, **line, **sparse)
        operations.plot(by_rule, **rule, **sparse)
        traffic.plot(exchanged, **line, **sparse)
        operations_of_e.plot(epochs, epochs * executed[-1] / local_epochs, **line, **in_turn)
        operations_of_e.plot(epochs, epochs * by_rule[-1] / local_epochs, **rule, **in_turn)
        traffic_of_e.plot(epochs, np.full(len(epochs), exchanged[-1]), **line, **in_turn)
        if memory:
            peaks = np.repeat([stage["peak_memory_bytes"] / MIB for stage in ledger["per_stage"]], rounds)
            axes[0, 0].plot(range(1, len(peaks) + 1), peaks, drawstyle="steps-mid", **line, **sparse)
            axes[1, 0].plot(epochs, np.full(len(epochs), max(peaks)), **line, **in_turn)

    labels = [("Peak memory of a step", "MiB", "")] * memory + [
        ("Operations a sample", "10⁹ multiply-adds", " so far"),
        ("Traffic both ways", "MiB", " so far"),
    ]
    for (over, of_e), (label, unit, so_far) in zip(axes.T, labels, strict=True):
        over.set(xlabel="round", ylabel=f"{label}{so_far}\n({unit})")
        of_e.set(xlabel="local epochs E", ylabel=f"{label}\n({unit})")
        of_e.axvline(local_epochs, color="0.3", linestyle=":")
        for panel in (over, of_e):
            panel.set_ylim(0, 1.08 * panel.dataLim.y1)
            panel.grid(alpha=0.3)
            panel.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_title("By round", loc="left", fontweight="bold")
    axes[1, 0].set_title("In all, by local epochs", loc="left", fontweight="bold")
    figure.align_ylabels()
    traffic_of_e.plot([], [], color="0.3", linestyle="--", label="by the paper's rule")
    traffic_of_e.plot([], [], color="0.3", linestyle=":", label=f"E = {local_epochs} of this config")
    figure.legend(*traffic_of_e.get_legend_handles_labels(), loc="outside lower center", ncols=3 + 2 * memory)
    save(figure, path)


def _cumulative(ledger: Mapping[str, Any], key: str) -> np.ndarray:
    """What has been spent after each round, beginning with 0: a stage's rounds cost the same."""
    a_round = [np.full(stage["rounds"], stage[key] / stage["rounds"]) for stage in ledger["per_stage"]]
    return np.cumsum(np.concatenate([[0.0], *a_round]))


def _class_counts(labels_N: np.ndarray, clients: Sequence[np.ndarray]) -> np.ndarray:
    """KxC, of the first clients; images without a label (-1) are of no class."""
    shown = range(min(len(clients), SHOWN_CLIENTS))
    # One up, so that the first column is theirs.
    return np.stack([np.bincount(labels_N[clients[i]] + 1, minlength=labels_N.max() + 2)[1:] for i in shown])
