"""One self-contained HTML page on one or several runs, with its figures and tables as files next to it."""

import base64
import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lwfedssl_jax import __version__
from lwfedssl_jax.analysis import setting_plots, tables
from lwfedssl_jax.analysis.headline import headline
from lwfedssl_jax.analysis.results import (
    EVALUATION_FINGERPRINT,
    FINGERPRINT,
    SEED,
    STRATEGY,
    RunRecord,
    find_runs,
    frame,
    sweep_base,
    sweep_name,
)
from lwfedssl_jax.analysis.setting_plots import Curve, Look
from lwfedssl_jax.analysis.settings import Setting, group_by_setting, protocols
from lwfedssl_jax.analysis.statistics import Difference, differences, over_seeds
from lwfedssl_jax.analysis.style import STYLES, save_with_svg, stage_ends
from lwfedssl_jax.analysis.tables import Table
from lwfedssl_jax.analysis.wording import percent, protocol_words
from lwfedssl_jax.config import CONFIG_DIR, SWEEPS, flat, join_lists, load, resolve, to_dict
from lwfedssl_jax.system.files import write_whole

TEMPLATE = Path(__file__).parent / "report.html.j2"
SHOWN_POPULATIONS = 4
IMAGE_PICTURES = {
    "views": "Images of some clients, each followed by two random views as the clients train on.",
    "neighbours": "Test images (left), and the training images whose features are most similar.",
}
FINGERPRINTS = (FINGERPRINT, EVALUATION_FINGERPRINT)
PACING = "When stages ended: the fall of the mean training loss, relative to the loss, and the threshold."
SPENDING = "What a client spends under each strategy: over the rounds, and in total for other numbers of local epochs."
LOCAL_OPTIONS = (  # options that depend on the machine or run; a command line that repeats a run omits them
    "--runtime.seed", "--workdir", "--compilation-cache", "--coordinator", "--processes", "--process",
)  # fmt: skip
BASE = "quickstart"  # the config that command lines start from
MAIN_FIELDS = (  # shown at the top of the page if all runs share them
    "data.name", "partition.kind", "partition.beta", "partition.clients", "federation.clients_per_round", "model.name",
    "model.width", "model.depth", "objective.name", "strategy.name", "federation.rounds", "federation.local_epochs",
)  # fmt: skip

Members = Mapping[str, Sequence[RunRecord]]  # the finished runs of each setting, by its label


class Figure(NamedTuple):
    """A picture as a data URI, with its alternative text and its caption."""

    uri: str
    alt: str
    caption: str


def write_report(directories: Sequence[str | Path], out: Path) -> Path:
    """Write ``report.html``, ``plots/*`` and ``tables/*`` on all runs under the directories.

    Returns:
      The path of the page, which needs no other file and no network.

    Raises:
      ConfigError: a directory does not exist, cannot be read or contains no run; see ``results.find_runs``.
      OSError: something cannot be written.
    """
    import jinja2

    runs = find_runs(directories)
    content = compose(runs, out) | {
        "title": ", ".join(sweep_name(Path(d)) or Path(d).resolve().name for d in directories),
        "commands": list(commands(runs, directories)),
    }
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    out.mkdir(parents=True, exist_ok=True)
    page = out / "report.html"
    write_whole(page, environment.from_string(TEMPLATE.read_text()).render(content).encode())
    return page


def compose(runs: Sequence[RunRecord], out: Path) -> dict[str, Any]:
    """Make the content for the template, and write its figures and tables under ``out``."""
    results = frame(runs)
    finished, settings = group_by_setting(results)
    names = protocols(results)
    by_path = {str(run.path): run for run in runs}
    members = {s.label: [by_path[p] for p in finished.loc[finished["setting"] == s.label, "path"]] for s in settings}
    compared = {p: differences(finished, settings, p) for p in names} if len(settings) > 1 else {}
    shown = _tables(finished, settings, members, [d for found in compared.values() for d in found])
    for table in filter(None, shown.values()):
        tables.write(table, out / "tables")
    (out / "tables").mkdir(parents=True, exist_ok=True)
    results.to_csv(out / "tables" / "runs.csv", index=False)
    populations = list(_populations(runs))
    return {
        "version": __version__,
        "runs": runs,
        "faults": [run for run in runs if run.fault],
        "repeated": int(results["finished"].sum()) - len(finished),
        "seeds": sorted({str(run.config[SEED]) for run in runs if SEED in run.config}, key=lambda s: (len(s), s)),
        "settings": settings,
        "protocols": [protocol_words(p) for p in names],
        "headline": list(headline(finished, settings, names, compared)),
        "tables": {name: table and table.words for name, table in shown.items()},
        "differences": {protocol_words(p): list(map(str, found)) for p, found in compared.items()},
        "costs": [_costs_figure(finished, settings, p, out) for p in names] if len(finished) > 1 else [],
        "curves": list(_curve_figures(members, settings, names, out) if settings else _first_curves(runs, out)),
        "pacing": _pacing_figure(members),
        "share_panel": len(settings) <= len(STYLES),
        "spending": _spending_figure(members),
        "pictures": _image_figures(members),
        "populations": populations[:SHOWN_POPULATIONS],
        "more_populations": len(populations[SHOWN_POPULATIONS:]),
        "differing": list(settings[0].values) if settings else [],
        "shared": (shared := _shared_fields(runs)),
        "main_fields": {
            field: shared[field] for field in MAIN_FIELDS if field in shared and _has_effect(field, shared)
        },
        "devices": list(dict.fromkeys(str(run.about.get("device", "unknown device")) for run in runs if run.about)),
        "versions": list(dict.fromkeys(version for run in runs for version in _versions(run))),
    }


def _tables(
    runs: pd.DataFrame, settings: Sequence[Setting], members: Members, compared: Sequence[Difference]
) -> dict[str, Table | None]:
    """Make the tables of the page by name; None for a table without content."""
    first_summaries = {label: runs[0].summary for label, runs in members.items()}
    ledgers = first_summaries[settings[0].label]["strategies"] if len(settings) == 1 else None
    return {
        "settings": tables.settings_table(runs, settings) if settings else None,
        "resources": tables.resources_table(runs, settings, ledgers) if settings else None,
        "significance": tables.differences_table(compared) if compared else None,
        "label_free": tables.label_free_table(runs, settings) if settings else None,
        "fleet": tables.fleet_table(first_summaries),
    }


def _versions(run: RunRecord) -> list[str]:
    versions = run.about.get("versions")
    return [f"{name} {version}" for name, version in versions.items()] if isinstance(versions, dict) else []


def _shared_fields(runs: Sequence[RunRecord]) -> dict[str, str]:
    """The config fields that have one value in all runs, except for the seed."""
    configs = [run.config for run in runs if run.config]
    first = configs[0] if configs else {}
    shared = {f: v for f, v in first.items() if f != SEED and all(config.get(f) == v for config in configs)}
    return {field: str(value) for field, value in join_lists(shared).items()}


def _has_effect(field: str, config: Mapping[str, Any]) -> bool:
    """Return whether a field has an effect: for example, beta has one for two kinds of partition only."""
    if field == "partition.beta":
        return config.get("partition.kind") in ("dirichlet", "quantity")
    return field != "federation.clients_per_round" or config[field] != "0"


def _costs_figure(runs: pd.DataFrame, settings: Sequence[Setting], protocol: str, out: Path) -> Figure:
    figure = setting_plots.plot_costs(runs, settings, protocol, tables.baselines(runs, settings))
    svg = save_with_svg(figure, out / "plots", f"accuracy_against_costs_{protocol}")
    mean = over_seeds(runs)[(f"accuracy.{protocol}", "mean")]
    numbers = "; ".join(f"{s.label}: {percent(mean[s.label])}" for s in settings)
    return Figure(
        _uri("svg+xml", svg),
        f"Accuracy by {protocol_words(protocol)} against traffic, operations and memory. {numbers}",
        f"Accuracy by {protocol_words(protocol)} against what it costs a client over the whole run. Large symbols: "
        "mean ± standard deviation over seeds; small symbols to their right: every run. Where settings coincide, one "
        "symbol is drawn around the other.",
    )


def _first_curves(runs: Sequence[RunRecord], out: Path) -> Iterator[Figure]:
    """Learning curves where no run is finished: each run that has started is a setting of its own."""
    started = [run for run in runs if run.lines]
    settings = [Setting(run.path.name, str(run.config.get(STRATEGY, "")), "", {}) for run in started]
    members = {s.label: [run] for s, run in zip(settings, started, strict=True)}
    names = list(
        dict.fromkeys(p for run in started for line in run.lines if "accuracy" in line and (p := line["protocol"]))
    )
    return _curve_figures(members, settings, names, out)


def _curve_figures(members: Members, settings: Sequence[Setting], names: Sequence[str], out: Path) -> Iterator[Figure]:
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


def _spending_figure(members: Members) -> Figure | None:
    """The picture of costs by strategy of the first run, if there is only one setting."""
    if len(members) != 1:
        return None
    ((first, *_),) = members.values()
    return _picture(first.path / "plots" / "resources.png", SPENDING, SPENDING)


def _image_figures(members: Members) -> list[Figure]:
    """The pictures of the data and of the encoder's neighbours of the first run, if there is only one setting."""
    if len(members) != 1:
        return []
    ((first, *_),) = members.values()
    found = [_picture(first.path / "plots" / f"{name}.png", text, text) for name, text in IMAGE_PICTURES.items()]
    return [figure for figure in found if figure]


def _pacing_figure(members: Members) -> Figure | None:
    """The picture of adaptive pacing of the first run, if there is only one setting and it was paced."""
    if len(members) != 1:
        return None
    ((first, *_),) = members.values()
    return _picture(first.path / "plots" / "pacing.png", PACING, PACING)


def _populations(runs: Sequence[RunRecord]) -> Iterator[Figure]:
    """The picture of each client's data, of the first run of each data set, partition and seed."""
    seen = set()
    for run in runs:
        key = str([(f, v) for f, v in run.config.items() if f.startswith(("data.", "partition.")) or f == SEED])
        if key in seen:
            continue
        config = run.config
        words = [str(config.get(f, "")) for f in ("data.name", "partition.kind")]
        words += [f"beta {config.get('partition.beta')}"] * _has_effect("partition.beta", config)
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


def commands(runs: Sequence[RunRecord], directories: Sequence[str | Path]) -> Iterator[str]:
    """Command lines that repeat the runs and write the page."""
    for directory in filter(sweep_name, map(Path, directories)):
        words, base = [sweep_name(directory)], sweep_base(directory)
        if not (CONFIG_DIR / SWEEPS / f"{words[0]}.py").is_file():
            words = [str(directory / "sweep.py"), "--workdir", str(directory)]
        yield f"python run.py sweep {shlex.join([*words, *(['--base', base] if base else [])])}"
    seeds_by_command: dict[str, list[str]] = {}
    for run in runs:
        if run.about and not run.label:
            arguments = _given_arguments(run) if run.about.get("config_file") else _arguments(run.config)
            seeds_by_command.setdefault(f"python run.py train {arguments}", []).append(str(run.config.get(SEED)))
    for command, seeds in seeds_by_command.items():
        more = f"  # and {', '.join(seeds[1:])}" if len(seeds) > 1 else ""
        yield f"{command} --runtime.seed {seeds[0]}{more}"
    yield f"python run.py report {shlex.join(map(str, directories))}"


def _given_arguments(run: RunRecord) -> str:
    """The user's own config file with the options that were given, except for ``LOCAL_OPTIONS``."""
    words = run.about.get("command")
    if not (isinstance(words, list) and words and all(isinstance(word, str) for word in words)):
        return "YOUR_CONFIG.py"
    given: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in LOCAL_OPTIONS:
            next(rest, None)
        elif word.partition("=")[0] not in LOCAL_OPTIONS:
            given.append(word)
    return shlex.join(given)


def _arguments(config: Mapping[str, Any]) -> str:
    """The quick start with the options that turn it into this config, except for the seed."""
    base = flat(to_dict(resolve(load(BASE))))
    given = {k: v for k, v in config.items() if k not in (SEED, *FINGERPRINTS) and base.get(k) != v}
    changes = {k: v if isinstance(v, list) else [v] for k, v in given.items()}
    return " ".join([BASE, *(f"--{k.replace('_', '-')} {shlex.join(map(str, v))}" for k, v in changes.items())])
