"""Plots and tables of runs, for eyes."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

MIB = 2**20
SHOWN_CLIENTS = 200


def plot_clients(labels_N: np.ndarray, clients: Sequence[np.ndarray], workdir: Path) -> None:
    """``plots/clients.png``: how many examples of each class each client owns (of many clients the first ones)."""
    shown = range(min(len(clients), SHOWN_CLIENTS))
    counts_KxC = np.stack([np.bincount(labels_N[clients[i]], minlength=labels_N.max() + 1) for i in shown])
    figure, axes = _figure("Who owns what")
    image = axes.imshow(counts_KxC.T, aspect="auto", cmap="cividis", interpolation="nearest")
    figure.colorbar(image, label="examples")
    axes.set(xlabel="client", ylabel="class")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    _save(figure, workdir, "clients")


def plot_metrics(lines: list[dict[str, Any]], workdir: Path) -> None:
    """``plots/loss.png`` with stage boundaries and ``plots/accuracy.png`` against traffic, from ``metrics.jsonl``."""
    rounds = [line for line in lines if "event" not in line]
    figure, axes = _figure("Training loss")
    trained = [line for line in rounds if line["loss"] is not None]
    axes.plot([line["round"] for line in trained], [line["loss"] for line in trained], color="tab:blue")
    for before, after in itertools.pairwise(rounds):
        if before["stage"] != after["stage"]:
            axes.axvline(before["round"] + 0.5, color="0.7", linestyle=":")
    axes.set(xlabel="round (dotted: a new stage)", ylabel="mean loss of a sample")
    _save(figure, workdir, "loss")

    # All that was exchanged so far, over the clients drawn each round.
    sent = np.cumsum([line["download_bytes"] + line["upload_bytes"] for line in rounds])
    drawn = rounds[0]["clients"] + rounds[0]["dropped"]
    traffic = {0: 0.0} | {line["round"]: total / drawn / MIB for line, total in zip(rounds, sent, strict=True)}
    figure, axes = _figure("Accuracy against traffic")
    evaluations = [line for line in lines if line.get("event") == "evaluation"]
    for marker, protocol in zip("osD^v<>*", dict.fromkeys(line["protocol"] for line in evaluations), strict=False):
        points = [line for line in evaluations if line["protocol"] == protocol]
        points.sort(key=lambda p: int(p["round"]))  # training from scratch is written last
        x, y = [traffic[p["round"]] for p in points], [100 * p["accuracy"] for p in points]
        label = _words(protocol) + (" (at 0: from scratch)" if any("baseline" in p for p in points) else "")
        axes.errorbar(x, y, [100 * p.get("std", 0) for p in points], marker=marker, capsize=3, label=label)
    axes.set(xlabel="traffic of a client drawn every round, both directions (MiB)", ylabel="accuracy (%)")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    _save(figure, workdir, "accuracy")


def summary_tables(summary: dict[str, Any]) -> Group:
    """A finished run as two tables: accuracies against the untrained encoder, costs against the other strategies.

    Fine-tuning stands against training from scratch, which is fine-tuning the untrained encoder.
    """
    accuracy = Table(title=f"Encoder after {summary['rounds']} rounds of {summary['strategy']}")
    accuracy.add_column("protocol")
    accuracy.add_column("untrained %", justify="right")
    accuracy.add_column("trained %", justify="right")
    accuracy.add_column("settings")
    for protocol, result in summary["evaluation"].items():
        baselines = summary["baselines"]
        if protocol in baselines["untrained"]:
            untrained = _percent(baselines["untrained"][protocol])
        else:
            untrained = f"{_percent(baselines['scratch'][protocol])} (scratch)"
        accuracy.add_row(_words(protocol), untrained, _percent(result), _settings(result))
    return Group(accuracy, resource_table(summary["strategies"], summary["strategy"]))


def resource_table(strategies: dict[str, Any], chosen: str = "") -> Table:
    """What each strategy costs one client over the whole run, and beside it the ratio to end_to_end."""
    table = Table(title="What one client spends over the whole run (x: against end_to_end)")
    table.add_column("")
    for name in strategies:
        table.add_column(f"[bold]{name}[/]" if name == chosen else name, justify="right")
    for label, key, unit, scale in (
        ("traffic, both directions", "total_bytes", "MiB", MIB),
        ("traffic, worst case", "worst_case_total_bytes", "MiB", MIB),
        ("multiply-adds a sample, paper's rule", "flops_paper_rule", "G", 1e9),
        ("multiply-adds a sample, executed", "flops_executed", "G", 1e9),
        ("peak memory of a training step", "peak_memory_bytes", "MiB", MIB),
    ):
        values = [ledger[key] for ledger in strategies.values()]
        if None not in values:
            table.add_row(label, *[f"{v / scale:,.4g} {unit} ({v / values[0]:.2f}x)" for v in values])
    return table


def _words(protocol: str) -> str:
    if protocol == "fine_tune":
        return "fine-tuning"
    kind, _, labels = protocol.rpartition("_")
    return f"linear probe, {labels} labels{'' if labels == 'all' else ' a class'}" if kind else "kNN"


def _settings(result: dict[str, Any]) -> str:
    if "epochs" in result:
        return f"{result['epochs']} epochs of AdamW at {result['learning_rate']}, {result['views']}"
    if "neighbours" in result:
        return f"k = {result['neighbours']}, {result['classifier']}"
    draws = f"mean of {result['draws']} draws, " if result["draws"] > 1 else ""
    return f"{draws}{result['classifier']}"


def _percent(result: dict[str, Any]) -> str:
    spread = f" ± {100 * result['std']:.1f}" if result.get("draws", 1) > 1 else ""
    return f"{100 * result['accuracy']:.1f}{spread}"


def _figure(title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    return figure, axes


def _save(figure: Any, workdir: Path, name: str) -> None:
    (workdir / "plots").mkdir(exist_ok=True)
    figure.savefig(workdir / "plots" / f"{name}.png", dpi=120)
