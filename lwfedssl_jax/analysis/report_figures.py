"""The figures of the report, as pictures inside the page and as files next to it."""

import base64
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lwfedssl_jax.analysis import setting_plots, tables
from lwfedssl_jax.analysis.device_plots import plot_ratios
from lwfedssl_jax.analysis.device_tables import measured_lines
from lwfedssl_jax.analysis.effects import by_data, grid_of
from lwfedssl_jax.analysis.privacy_plots import epsilons, plot_epsilon
from lwfedssl_jax.analysis.results import SEED, STRATEGY, RunRecord
from lwfedssl_jax.analysis.setting_plots import Curve, Look
from lwfedssl_jax.analysis.settings import Setting
from lwfedssl_jax.analysis.statistics import over_seeds
from lwfedssl_jax.analysis.style import STYLES, save_with_svg, stage_ends
from lwfedssl_jax.analysis.wording import percent, protocol_words

IMAGE_PICTURES = {
    "views": "Images of some clients, each followed by two random views as the clients train on.",
    "neighbours": "Test images (left), and the training images whose features are most similar.",
}
PACING = "When stages ended: the fall of the mean training loss, relative to the loss, and the threshold."
SPENDING = "What a client spends under each strategy: over the rounds, and in total for other numbers of local epochs."

Members = Mapping[str, Sequence[RunRecord]]  # the finished runs of each setting, by its label


class Figure(NamedTuple):
    """A picture as a data URI, with its alternative text and its caption."""

    uri: str
    alt: str
    caption: str


def grids(runs: pd.DataFrame, settings: Sequence[Setting], names: Sequence[str], out: Path) -> Iterator[Figure]:
    """Heat maps of mean accuracies by the first protocol: of settings on the same data that are a grid of two."""
    for number, members in enumerate(by_data(settings) if names else (), 1):
        if not (factors := grid_of(members)):
            continue
        mean = 100 * over_seeds(runs)[(f"accuracy.{names[0]}", "mean")]
        rows, columns = factors
        table = pd.DataFrame(index=rows.levels, columns=columns.levels, dtype=float)
        for s in members:
            table.iloc[rows.of[s.label], columns.of[s.label]] = mean[s.label]
        words = f"{protocol_words(names[0])}, accuracy (%)"
        figure = setting_plots.plot_grid(table, (rows.name, columns.name), words)
        svg = save_with_svg(figure, out / "plots", f"accuracy_grid_{number}")
        numbers = "; ".join(f"{s.label}: {mean[s.label]:.1f} %" for s in members)
        caption = f"Mean accuracy over seeds by {protocol_words(names[0])}, by {rows.name} and {columns.name}."
        yield Figure(_uri("svg+xml", svg), f"{caption} {numbers}", caption)


def costs_figure(runs: pd.DataFrame, settings: Sequence[Setting], protocol: str, out: Path) -> Figure:
    """Accuracy by a protocol against what it costs."""
    figure = setting_plots.plot_costs(runs, settings, protocol, tables.baselines(runs, settings))
    svg = save_with_svg(figure, out / "plots", f"accuracy_against_costs_{protocol}")
    mean = over_seeds(runs)[(f"accuracy.{protocol}", "mean")]
    numbers = "; ".join(f"{s.label}: {percent(mean[s.label])}" for s in settings)
    return Figure(
        _uri("svg+xml", svg),
        f"Accuracy by {protocol_words(protocol)} against traffic, operations and memory. {numbers}",
        f"Accuracy by {protocol_words(protocol)} against what it costs a client over the whole run. Large symbols: "
        "mean ± standard deviation over seeds; small symbols to their right: every run. Settings that cost the same "
        "stand side by side.",
    )


def epsilon_figures(runs: pd.DataFrame, settings: Sequence[Setting], names: Sequence[str], out: Path) -> list[Figure]:
    """Accuracy by each protocol against epsilon, if there are several."""
    found = []
    for protocol in names if len(epsilons(runs)) > 1 else ():
        svg = save_with_svg(
            plot_epsilon(runs, settings, protocol), out / "plots", f"accuracy_against_epsilon_{protocol}"
        )
        caption = (
            f"Accuracy by {protocol_words(protocol)} against epsilon, mean ± standard deviation over seeds; of several "
            "clips, the one with the highest mean. What is above the noise alone was learnt."
        )
        found.append(Figure(_uri("svg+xml", svg), caption, caption))
    return found


def device_figures(members: Members, out: Path) -> list[Figure]:
    """What was measured on the devices of each setting's first run over what was predicted, by stage."""
    found = []
    for number, (label, (first, *_)) in enumerate(members.items(), 1):
        if lines := measured_lines(first.path):
            svg = save_with_svg(plot_ratios(lines), out / "plots", f"devices_{number}")
            caption = (
                f"Measured over predicted, by stage{f', of {label}' * (len(members) > 1)}: the median over devices and "
                "rounds, with its range. The time is predicted from the ledger's operations and the device's speed in "
                "the rounds before."
            )
            found.append(Figure(_uri("svg+xml", svg), caption, caption))
    return found


def first_curves(runs: Sequence[RunRecord], out: Path) -> Iterator[Figure]:
    """Learning curves where no run is finished: each run that has started is a setting of its own."""
    started = [run for run in runs if run.lines]
    settings = [Setting(run.path.name, str(run.config.get(STRATEGY, "")), "", {}) for run in started]
    members = {s.label: [run] for s, run in zip(settings, started, strict=True)}
    names = list(
        dict.fromkeys(p for run in started for line in run.lines if "accuracy" in line and (p := line["protocol"]))
    )
    return curve_figures(members, settings, names, out)


def curve_figures(members: Members, settings: Sequence[Setting], names: Sequence[str], out: Path) -> Iterator[Figure]:
    """Loss, and accuracy by each protocol, over the rounds; one setting has all protocols in one figure."""
    looks = setting_plots.choose_looks(settings)
    one_objective = len({s.values.get("objective.name") for s in settings}) == 1
    loss = [_curve(members[label], look, "") for label, look in looks.items()]
    yield from _curve_figure(loss, out, "loss_over_rounds", "Training loss", "mean loss per sample", one_objective)
    if len(settings) == 1:
        (runs,), (look,) = members.values(), looks.values()
        curves = [_curve(runs, look._replace(name=protocol_words(p)), p) for p in names]
        drawn = zip((c for c in curves if c), itertools.cycle(STYLES), strict=False)
        styled = [curve._replace(style=style) for curve, style in drawn]
        yield from _curve_figure(styled, out, "accuracy_over_rounds", "Accuracy", "accuracy (%)", True)
        return
    for p in names:
        what, ylabel = f"Accuracy by {protocol_words(p)}", f"{protocol_words(p)}\naccuracy (%)"
        accuracies = [_curve(members[label], look, p) for label, look in looks.items()]
        yield from _curve_figure(accuracies, out, f"accuracy_over_rounds_{p}", what, ylabel, True)


def _curve(runs: Sequence[RunRecord], look: Look, protocol: str) -> Curve | None:
    """The learning curve of a setting by a protocol, or of its loss for ""; None if it has fewer than two points."""
    seeds = [_values_by_round(run, protocol) for run in runs]
    if len(set.intersection(*map(set, seeds))) < 2:
        return None
    rounds = [line for line in runs[0].lines if "event" not in line]
    return Curve(look.name, look.panel, look.line, seeds, tuple(stage_ends(rounds)))


def _curve_figure(
    curves: Sequence[Curve | None], out: Path, file: str, what: str, ylabel: str, share_y: bool
) -> Iterator[Figure]:
    drawn = [c for c in curves if c]
    if not drawn:
        return
    svg = save_with_svg(setting_plots.plot_curves(drawn, ylabel, share_y=share_y), out / "plots", file)
    ends = "; ".join(f"{', '.join(filter(None, (c.panel, c.label)))}: {_last_mean(c)}" for c in drawn)
    several = any(len(c.seeds) > 1 for c in drawn)
    caption = f"{what} over the rounds{': mean ± standard deviation over seeds' * several}."
    yield Figure(_uri("svg+xml", svg), f"{what} over the rounds. After the last one: {ends}", caption)


def _values_by_round(run: RunRecord, protocol: str) -> dict[int, float]:
    """A run's accuracy in % by a protocol at each round, or its loss for ""."""
    if not protocol:
        return {line["round"]: line["loss"] for line in run.lines if line.get("loss") is not None}
    lines = [line for line in run.lines if line.get("protocol") == protocol and "baseline" not in line]
    return {line["round"]: 100 * line["accuracy"] for line in lines}


def _last_mean(curve: Curve) -> str:
    last = max(set.intersection(*map(set, curve.seeds)))
    return f"{sum(seed[last] for seed in curve.seeds) / len(curve.seeds):.3g}"


def spending_figure(members: Members) -> Figure | None:
    """The picture of costs by strategy of the first run, if there is only one setting."""
    if len(members) != 1:
        return None
    ((first, *_),) = members.values()
    return _picture(first.path / "plots" / "resources.png", SPENDING, SPENDING)


def image_figures(members: Members) -> list[Figure]:
    """The pictures of the data and of the encoder's neighbours of the first run, if there is only one setting."""
    if len(members) != 1:
        return []
    ((first, *_),) = members.values()
    found = [_picture(first.path / "plots" / f"{name}.png", text, text) for name, text in IMAGE_PICTURES.items()]
    return [figure for figure in found if figure]


def pacing_figure(members: Members) -> Figure | None:
    """The picture of adaptive pacing of the first run, if there is only one setting and it was paced."""
    if len(members) != 1:
        return None
    ((first, *_),) = members.values()
    return _picture(first.path / "plots" / "pacing.png", PACING, PACING)


def populations(runs: Sequence[RunRecord]) -> Iterator[Figure]:
    """The picture of each client's data, of the first run of each data set, partition and seed."""
    seen = set()
    for run in runs:
        key = str([(f, v) for f, v in run.config.items() if f.startswith(("data.", "partition.")) or f == SEED])
        if key in seen:
            continue
        config = run.config
        words = [str(config.get(f, "")) for f in ("data.name", "partition.kind")]
        words += [f"beta {config.get('partition.beta')}"] * has_effect("partition.beta", config)
        words += [f"{config.get('partition.clients')} clients", f"seed {config.get(SEED)}"]
        text = f"Examples of each class on each client: {', '.join(words)}"
        if picture := _picture(run.path / "plots" / "clients.png", text, f"{text}."):
            seen.add(key)
            yield picture


def _picture(file: Path, alt: str, caption: str) -> Figure | None:
    try:
        return Figure(_uri("png", file.read_bytes()), alt, caption)
    except OSError:
        return None


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def has_effect(field: str, config: Mapping[str, Any]) -> bool:
    """Return whether a field has an effect: for example, beta has one for two kinds of partition only."""
    if field == "partition.beta":
        return config.get("partition.kind") in ("dirichlet", "quantity")
    return field != "federation.clients_per_round" or config[field] != "0"
