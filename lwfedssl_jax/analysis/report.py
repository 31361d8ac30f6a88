"""One self-contained HTML page about one or several runs, with its figures and tables as files beside it."""

import base64
import itertools
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lwfedssl_jax import __version__
from lwfedssl_jax.analysis import setting_plots, tables
from lwfedssl_jax.analysis.headline import headline
from lwfedssl_jax.analysis.results import SEED, STRATEGY, RunRecord, find_runs, frame, sweep_name
from lwfedssl_jax.analysis.settings import Setting, group_by_setting, protocols
from lwfedssl_jax.analysis.statistics import differences, over_seeds
from lwfedssl_jax.analysis.style import STYLES, stage_ends
from lwfedssl_jax.analysis.wording import protocol_words
from lwfedssl_jax.config import CONFIG_DIR, SWEEPS, load, resolve, to_dict

if TYPE_CHECKING:
    import pandas as pd


TEMPLATE = Path(__file__).parent / "report.html.j2"
SHOWN_POPULATIONS = 4
SPENDING = "What a client spends under each strategy: over the rounds, and in all for other numbers of local epochs."
OF_A_PLACE = (  # options that do not belong to the line that repeats a run
    "--runtime.seed", "--workdir", "--compilation-cache", "--coordinator", "--processes", "--process",
)  # fmt: skip
BASE = "quickstart"  # of the command lines that would repeat runs
SAID = (  # what a page says at its top of what all its runs share
    "data.name", "partition.kind", "partition.beta", "partition.clients", "federation.clients_per_round", "model.name",
    "model.width", "model.depth", "objective.name", "strategy.name", "federation.rounds", "federation.local_epochs",
)  # fmt: skip


class Figure(NamedTuple):
    """A picture as a data URI, its text for who cannot see it, and what stands below."""

    uri: str
    alt: str
    caption: str


def write_report(directories: Sequence[str | Path], out: Path) -> Path:
    """Write ``report.html``, ``plots/*`` and ``tables/*`` about all runs under the directories.

    Returns:
      The page, which needs no other file and no network.

    Raises:
      ConfigError: a directory does not exist, cannot be read or holds no run; see ``results.find_runs``.
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
    part = out / ".report.html.new"
    part.write_text(environment.from_string(TEMPLATE.read_text()).render(content))
    return part.replace(out / "report.html")


def compose(runs: Sequence[RunRecord], out: Path) -> dict[str, Any]:
    """What the template shows; figures and tables are written on the way."""
    results = frame(runs)
    finished, settings = group_by_setting(results)
    names = protocols(results)
    by_path = {str(run.path): run for run in runs}
    members = {s.label: [by_path[p] for p in finished.loc[finished["setting"] == s.label, "path"]] for s in settings}
    found = {p: differences(finished, settings, p) for p in names} if len(settings) > 1 else {}
    of_one = members[settings[0].label][0].summary["strategies"] if len(settings) == 1 else None
    shown = {
        "settings": tables.settings_table(finished, settings) if settings else None,
        "resources": tables.resources_table(finished, settings, of_one) if settings else None,
        "significance": tables.differences_table([d for p in names for d in found[p]]) if any(found.values()) else None,
    }
    shown["fleet"] = tables.fleet_table({label: of[0].summary for label, of in members.items()})
    for table in shown.values():
        if table:
            tables.write(table, out / "tables")
    (out / "tables").mkdir(parents=True, exist_ok=True)
    results.to_csv(out / "tables" / "runs.csv", index=False)
    kinds = {str(run.about.get("device", "unknown device")): None for run in runs if run.about}
    versions = {f"{k} {v}": None for run in runs for k, v in _versions(run)}
    shared = _shared(runs)
    return {
        "version": __version__,
        "runs": runs,
        "faults": [run for run in runs if run.fault],
        "repeated": int(results["finished"].sum()) - len(finished),
        "seeds": sorted({str(run.config[SEED]) for run in runs if SEED in run.config}, key=lambda s: (len(s), s)),
        "settings": settings,
        "said": {field: shared[field] for field in SAID if field in shared},
        "protocols": [protocol_words(p) for p in names],
        "headline": list(headline(finished, settings, names, found)),
        "tables": {name: table and table.words for name, table in shown.items()},
        "differences": {protocol_words(p): [str(d) for d in ds] for p, ds in found.items()},
        "costs": [_costs_figure(finished, settings, p, out) for p in names] if len(finished) > 1 else [],
        "in_one_panel": len(settings) <= len(STYLES),
        "curves": list(_curve_figures(members, settings, names, runs, out)),
        "spending": _picture(members[settings[0].label][0].path / "plots" / "resources.png", SPENDING)
        if len(settings) == 1
        else None,
        "populations": list(itertools.islice(_populations(runs), SHOWN_POPULATIONS)),
        "more_populations": max(0, len(list(_populations(runs))) - SHOWN_POPULATIONS),
        "differing": list(settings[0].values) if settings else [],
        "shared": shared,
        "devices": list(kinds),
        "versions": list(versions),
    }


def _versions(run: RunRecord) -> list[tuple[str, Any]]:
    versions = run.about.get("versions")
    return list(versions.items()) if isinstance(versions, dict) else []


def _shared(runs: Sequence[RunRecord]) -> dict[str, str]:
    """The config fields that all runs have with one value, but for the seed."""
    configs = [run.config for run in runs if run.config]
    fields = configs[0] if configs else {}
    return {
        field: " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for field, value in fields.items()
        if field != SEED and all(config.get(field) == value for config in configs)
    }


def _costs_figure(runs: "pd.DataFrame", settings: Sequence[Setting], protocol: str, out: Path) -> Figure:
    figure = setting_plots.plot_costs(runs, settings, protocol, tables.baselines(runs, settings))
    svg = setting_plots.save(figure, out / "plots", f"accuracy_against_costs_{protocol}")
    mean = over_seeds(runs)[(f"accuracy.{protocol}", "mean")]
    numbers = "; ".join(f"{s.label}: {100 * mean[s.label]:.1f} %" for s in settings)
    return Figure(
        _uri("svg+xml", svg),
        f"Accuracy by {protocol_words(protocol)} against traffic, operations and memory. {numbers}",
        f"Accuracy by {protocol_words(protocol)} against what it costs a client over the whole run. Small: every run; "
        "large, to its left: mean ± standard deviation over seeds. Settings in one place are drawn around each other.",
    )


def _curve_figures(
    members: dict[str, list[RunRecord]],
    settings: Sequence[Setting],
    names: Sequence[str],
    runs: Sequence[RunRecord],
    out: Path,
) -> Iterator[Figure]:
    """Loss, and accuracy by each protocol, over the rounds; of one setting all protocols in one figure."""
    if not settings:  # nothing is finished: what there is so far
        begun = [run for run in runs if run.lines]
        settings = [Setting(run.path.name, str(run.config.get(STRATEGY, "")), "", {}) for run in begun]
        members = {s.label: [run] for s, run in zip(settings, begun, strict=True)}
        names = list(dict.fromkeys(n for run in begun for line in run.lines if (n := line.get("protocol"))))
    looks = setting_plots.look(settings)

    def curve(label: str, protocol: str) -> setting_plots.Curve | None:
        panel, name, _, style = looks[label]
        seeds = [_over_rounds(run, protocol) for run in members[label]]
        rounds = [line for line in members[label][0].lines if "event" not in line]
        if len(set.intersection(*map(set, seeds))) < 2:
            return None
        return setting_plots.Curve(name, panel, style, seeds, tuple(stage_ends(rounds)))

    def figure(
        curves: Sequence[setting_plots.Curve | None], file: str, what: str, ylabel: str, share: bool
    ) -> list[Figure]:
        drawn = [c for c in curves if c]
        if not drawn:
            return []
        svg = setting_plots.save(setting_plots.plot_curves(drawn, ylabel, share_y=share), out / "plots", file)
        last = "; ".join(f"{', '.join(filter(None, (c.panel, c.label)))}: {_last(c)}" for c in drawn)
        band = ", in a band of a standard deviation" if any(len(c.seeds) > 1 for c in drawn) else ""
        caption = f"{what} over the rounds{', mean over seeds' * bool(band)}{band}."
        return [Figure(_uri("svg+xml", svg), f"{what} over the rounds. After the last one: {last}", caption)]

    one_objective = len({s.values.get("objective.name") for s in settings}) == 1
    labels = [s.label for s in settings]
    loss = [curve(label, "") for label in labels]
    yield from figure(loss, "loss_over_rounds", "Training loss", "mean loss of a sample", one_objective)
    if len(labels) == 1:
        styles = itertools.cycle(STYLES)
        each = [(c := curve(labels[0], p)) and c._replace(label=protocol_words(p), style=next(styles)) for p in names]
        yield from figure(each, "accuracy_over_rounds", "Accuracy", "accuracy (%)", True)
        return
    for p in names:
        what = f"Accuracy by {protocol_words(p)}"
        curves = [curve(label, p) for label in labels]
        yield from figure(curves, f"accuracy_over_rounds_{p}", what, f"{protocol_words(p)}\naccuracy (%)", True)


def _over_rounds(run: RunRecord, protocol: str) -> dict[int, float]:
    """A run's loss by round, or its accuracy in % by a protocol."""
    if not protocol:
        return {line["round"]: line["loss"] for line in run.lines if line.get("loss") is not None}
    lines = [line for line in run.lines if line.get("protocol") == protocol and "baseline" not in line]
    return {line["round"]: 100 * line["accuracy"] for line in lines}


def _last(curve: setting_plots.Curve) -> str:
    last = max(set.intersection(*map(set, curve.seeds)))
    return f"{sum(seed[last] for seed in curve.seeds) / len(curve.seeds):.3g}"


def _populations(runs: Sequence[RunRecord]) -> Iterator[Figure]:
    """Who owns what: the picture of the first run of each data set, partition and seed."""
    seen = set()
    for run in runs:
        key = str([(f, v) for f, v in run.config.items() if f.startswith(("data.", "partition.")) or f == SEED])
        if key not in seen and (picture := _picture(run.path / "plots" / "clients.png", "")):
            seen.add(key)
            config = run.config
            words = [str(config.get(f, "")) for f in ("data.name", "partition.kind")]
            words += [f"beta {config.get('partition.beta')}"] * (words[1] in ("dirichlet", "quantity"))
            words += [f"{config.get('partition.clients')} clients", f"seed {config.get(SEED)}"]
            caption = f"Who owns what: {', '.join(words)}."
            yield picture._replace(alt=f"Examples of each class on each client: {', '.join(words)}", caption=caption)


def _picture(file: Path, caption: str) -> Figure | None:
    try:
        return Figure(_uri("png", file.read_bytes()), caption, caption)
    except OSError:
        return None


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def commands(runs: Sequence[RunRecord], directories: Sequence[str | Path]) -> Iterator[str]:
    """Command lines that would measure the runs again, and write the page."""
    for directory in filter(sweep_name, map(Path, directories)):
        named = sweep_name(directory)
        own = shlex.join([str(directory / "sweep.py"), "--workdir", str(directory)])
        yield f"python run.py sweep {named if (CONFIG_DIR / SWEEPS / f'{named}.py').is_file() else own}"
    grouped: dict[str, list[str]] = {}
    for run in runs:
        if run.about and not run.label:
            start = _own(run) if run.about.get("config_file") else _train(run.config)
            grouped.setdefault(f"python run.py train {start}", []).append(str(run.config.get(SEED)))
    for command, seeds in grouped.items():
        more = f"  # and {', '.join(seeds[1:])}" if len(seeds) > 1 else ""
        yield f"{command} --runtime.seed {seeds[0]}{more}"
    yield f"python run.py report {shlex.join(map(str, directories))}"


def _own(run: RunRecord) -> str:
    """The user's own file with the options that were given, but for the seed and the place."""
    words = run.about.get("command")
    if not (isinstance(words, list) and words and all(isinstance(word, str) for word in words)):
        return "YOUR_CONFIG.py"
    given: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in OF_A_PLACE:
            next(rest, None)
        elif word.partition("=")[0] not in OF_A_PLACE:
            given.append(word)
    return shlex.join(given)


def _train(config: dict[str, Any]) -> str:
    """The quick start with the options that make this config of it, but for the seed."""
    base = {f"{section}.{k}": v for section, fields in to_dict(resolve(load(BASE))).items() for k, v in fields.items()}
    changes = {k: v if isinstance(v, list) else [v] for k, v in config.items() if k != SEED and base.get(k) != v}
    return " ".join([BASE, *(f"--{k.replace('_', '-')} {shlex.join(map(str, v))}" for k, v in changes.items())])
