"""Plots and tables of runs, for eyes."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from lwfedssl_jax import fleet
from lwfedssl_jax.fleet import DeviceClass

MIB = 2**20
SHOWN_CLIENTS = 200
SHOWN_EPOCHS = 10
TRAFFIC_LABEL = "a drawn client's mean traffic, summed over rounds (MiB)"

# Okabe and Ito's colours, which colour-blind readers can tell apart; markers also survive a grey print.
STYLES = [
    {"color": color, "marker": marker, "markersize": 5}
    for color, marker in zip(
        ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"), "osD^v<>", strict=True
    )
]


def plot_clients(labels_N: np.ndarray, clients: Sequence[np.ndarray], workdir: Path) -> None:
    """``plots/clients.png``: how many examples of each class each client owns (of many clients the first ones)."""
    if (labels_N < 0).all():
        labels_N = np.zeros_like(labels_N)
    figure, axes = _figure("Who owns what")
    image = axes.imshow(_class_counts(labels_N, clients).T, aspect="auto", cmap="cividis", interpolation="nearest")
    figure.colorbar(image, label="examples")
    axes.set(xlabel="client", ylabel="class")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    _save(figure, workdir / "plots" / "clients.png")


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
    _save(figure, path)


def plot_metrics(lines: list[dict[str, Any]], workdir: Path) -> None:
    """``plots/loss.png`` with stage boundaries and ``plots/accuracy.png`` against traffic, from ``metrics.jsonl``."""
    rounds = [line for line in lines if "event" not in line]
    figure, axes = _figure("Training loss")
    trained = [line for line in rounds if line["loss"] is not None]
    axes.plot([line["round"] for line in trained], [line["loss"] for line in trained], color="tab:blue")
    _mark_stages(axes, rounds)
    axes.set(ylabel="mean loss of a sample")
    _save(figure, workdir / "plots" / "loss.png")

    if not (evaluations := [line for line in lines if line.get("event") == "evaluation"]):
        return
    traffic = traffic_by_round(lines)
    figure, axes = _figure("Accuracy against traffic")
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
    _save(figure, workdir / "plots" / "accuracy.png")


def plot_distance(lines: list[dict[str, Any]], path: Path) -> None:
    """How far the clients' models of a round are apart, over the rounds; rounds without any are left out."""
    rounds = [line for line in lines if "event" not in line]
    known = [line for line in rounds if line["client_distance"] is not None]
    figure, axes = _figure("How far clients' models are apart")
    axes.plot(
        [line["round"] for line in known],
        [line["client_distance"] for line in known],
        **STYLES[0] | {"markersize": 3},
    )
    _mark_stages(axes, rounds)
    axes.set(ylabel="distance from their mean\n(L2 norm of trained parameters,\nweighted RMS over clients)")
    axes.set_ylim(bottom=0)
    _save(figure, path)


def plot_accuracy_against_traffic(
    runs: Mapping[str, Sequence[list[dict[str, Any]]]], protocol: str, path: Path
) -> None:
    """``accuracy_against_traffic`` as a picture."""
    _save(accuracy_against_traffic(runs, protocol), path)


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
    figure, axes = _figure(f"Accuracy against traffic: {protocol_words(protocol)}")
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


def plot_resources(strategies: Mapping[str, dict[str, Any]], local_epochs: int, path: Path) -> None:
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
    _save(figure, path)


def plot_plan(devices: Sequence[DeviceClass], options: Sequence[Any], protocol: str, path: Path) -> None:
    """What options ask of a fleet: memory and the share that can take part, stage by stage; what they reached.

    Args:
      devices: the fleet's classes.
      options: of ``plan.Plan``; of each strategy the one with fewest layers a stage is drawn over the stages.
      protocol: by which accuracies were measured; empty where none is known.
      path: of the picture.
    """
    size, unit = (1e9, "GB") if max(option.ledger["total_bytes"] for option in options) >= 5e8 else (1e6, "MB")
    figure, axes = panels(2 if protocol else 1, 2, size=(9, 8 if protocol else 4.4))
    memory, share, *reached = axes.flat
    styles = dict(zip(dict.fromkeys(option.strategy for option in options), itertools.cycle(STYLES), strict=False))
    drawn = {(option.strategy, option.remat): option for option in reversed(options)}
    for number, ((strategy, remat), option) in enumerate(reversed(drawn.items())):
        rows = option.ledger["per_stage"]
        depth = [0, *(row["depth"] for row in rows)]
        style = styles[strategy] | ({"linestyle": "--", "markerfacecolor": "none"} if remat else {})
        for panel, values in (
            (memory, [row["peak_memory_bytes"] / 1e9 for row in rows]),
            (share, [100 * x for x in option.shares[:-1]]),
        ):
            label = f"{strategy}{', remat' if remat else ''}"
            x, y = np.repeat(depth, 2)[1:-1], np.repeat(values, 2)
            panel.plot(x, y, **style, label=label, markevery=(number % max(1, len(x) // 2), max(1, len(x) // 4)))
    for device in devices:
        memory.axhline(device.memory_gb, color="0.3", linewidth=1, linestyle=":")
        memory.annotate(
            f"{device.name} {device.memory_gb:g} GB",
            (1, device.memory_gb), (-2, 2), xycoords=("axes fraction", "data"), textcoords="offset points",
            ha="right", fontsize=8, bbox={"facecolor": "white", "alpha": 0.7, "pad": 0.5, "linewidth": 0},
        )  # fmt: skip
    memory.set(yscale="log", ylabel="peak memory of a step (GB)")
    share.set(ylabel="devices that can take part (%)", ylim=(-4, 104))
    for panel in (memory, share):
        panel.set(xlabel="layers of the encoder so far, by stage")
        panel.xaxis.get_major_locator().set_params(integer=True)
    for panel, label, of in zip(
        reached,
        ("devices that can take part throughout (%)", f"traffic of a device ({unit})"),
        (lambda o: 100 * o.everywhere, lambda o: o.ledger["total_bytes"] / size),
        strict=False,
    ):
        for option in options:
            if option.measured:
                style = styles[option.strategy] | {"linestyle": "none"}
                style |= {"markerfacecolor": "none"} if option.remat else {}
                point = of(option), 100 * option.measured.accuracy
                std = None if np.isnan(option.measured.std) else 100 * option.measured.std
                panel.errorbar(*point, std, capsize=3, **style)
                panel.annotate(str(option.layers_per_stage), point, (5, 3), textcoords="offset points", fontsize=8)
        panel.set(xlabel=label, ylabel=f"accuracy by {protocol_words(protocol)} (%)")
        panel.set_xlim(0, 1.08 * panel.dataLim.x1 or 1)
    for panel in (memory, share, *reached):
        panel.grid(alpha=0.3)
    title = "numbers: layers a stage" if protocol else None
    figure.legend(*memory.get_legend_handles_labels(), loc="outside lower center", ncols=3, title=title)
    _save(figure, path)


def traffic_by_round(lines: list[dict[str, Any]]) -> dict[int, float]:
    """After each round of ``metrics.jsonl``, what a drawn client exchanges a round, both directions, summed, in MiB.

    It is what each client has exchanged where all are drawn and report in every round.
    """
    traffic, total = {0: 0.0}, 0.0
    for line in lines:
        if "event" not in line:
            drawn = line["clients"] + line["dropped"]
            total += (line["download_bytes"] + line["upload_bytes"]) / max(drawn, 1) / MIB
            traffic[line["round"]] = total
    return traffic


def summary_tables(summary: dict[str, Any]) -> Group:
    """A finished run as two tables: accuracies against the untrained encoder, costs against the other strategies.

    Below them who of a fleet took part. Fine-tuning stands against training from scratch, which is fine-tuning the
    untrained encoder.
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
        accuracy.add_row(protocol_words(protocol), untrained, _percent(result), _settings(result))
    tables = [accuracy] if summary["evaluation"] else []
    tables.append(resource_table(summary["strategies"], summary["strategy"]))
    if "fleet" not in summary:
        return Group(*tables)
    return Group(*tables, escape(fleet.tell(summary["fleet"], len(summary["resources"]["per_stage"]))))


def resource_table(strategies: dict[str, Any], chosen: str = "") -> Table:
    """What each strategy costs one client over the whole run, and beside it the ratio to end_to_end."""
    table = Table(title="What one client spends over the whole run (x: against the first column)")
    table.add_column("")
    for name in strategies:
        table.add_column(f"[bold]{name}[/]" if name == chosen else name, justify="right")
    for label, key, unit, scale in (
        ("traffic, both directions", "total_bytes", "MiB", MIB),
        ("traffic, worst case", "worst_case_total_bytes", "MiB", MIB),
        ("multiply-adds a sample, paper's rule", "flops_paper_rule", "G", 1e9),
        ("multiply-adds a sample, executed", "flops_executed", "G", 1e9),
        ("besides: multiply-adds of the server", "server_flops_executed", "G", 1e9),
        ("kept on a client between rounds", "client_state_bytes", "MiB", MIB),
        ("peak memory of a training step", "peak_memory_bytes", "MiB", MIB),
    ):
        values = [ledger[key] for ledger in strategies.values()]
        if None not in values and any(values):
            table.add_row(label, *[f"{v / scale:,.4g} {unit} ({v / values[0]:.2f}x)" for v in values])
    return table


def protocol_words(protocol: str) -> str:
    """A protocol's name for a reader."""
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


def _cumulative(ledger: dict[str, Any], key: str) -> np.ndarray:
    """What has been spent after each round, beginning with 0: a stage's rounds cost the same."""
    a_round = [np.full(stage["rounds"], stage[key] / stage["rounds"]) for stage in ledger["per_stage"]]
    return np.cumsum(np.concatenate([[0.0], *a_round]))


def _class_counts(labels_N: np.ndarray, clients: Sequence[np.ndarray]) -> np.ndarray:
    """KxC, of the first clients; images without a label (-1) are of no class."""
    shown = range(min(len(clients), SHOWN_CLIENTS))
    # One up, so that the first column is theirs.
    return np.stack([np.bincount(labels_N[clients[i]] + 1, minlength=labels_N.max() + 2)[1:] for i in shown])


def stage_ends(rounds: Sequence[dict[str, Any]]) -> list[float]:
    """Where between two rounds (their lines of ``metrics.jsonl``) a new stage begins."""
    return [a["round"] + 0.5 for a, b in itertools.pairwise(rounds) if a["stage"] != b["stage"]]


def _mark_stages(axes: Any, rounds: list[dict[str, Any]]) -> None:
    for end in stage_ends(rounds):
        axes.axvline(end, color="0.7", linestyle=":")
    axes.set(xlabel="round (dotted: a new stage)")


def _figure(title: str) -> tuple[Any, Any]:
    figure, axes = panels(1, 1, size=(6, 4))
    axes[0, 0].set_title(title)
    return figure, axes[0, 0]


def panels(rows: int, columns: int, size: tuple[float, float], **layout: Any) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes as an array of rows and columns."""
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **layout)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
