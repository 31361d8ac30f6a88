"""One self-contained HTML page on one or several runs, with its figures and tables as files next to it."""

import itertools
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import pandas as pd

from lwfedssl_jax import __version__
from lwfedssl_jax.analysis import tables
from lwfedssl_jax.analysis.comparisons import compare_all
from lwfedssl_jax.analysis.device_tables import device_table, event_words, stage_table
from lwfedssl_jax.analysis.equal_cost import equal_cost_table
from lwfedssl_jax.analysis.headline import headline
from lwfedssl_jax.analysis.report_figures import (
    Members,
    costs_figure,
    curve_figures,
    device_figures,
    epsilon_figures,
    first_curves,
    grids,
    has_effect,
    image_figures,
    pacing_figure,
    populations,
    spending_figure,
)
from lwfedssl_jax.analysis.results import (
    EVALUATION_FINGERPRINT,
    FINGERPRINT,
    SEED,
    RunRecord,
    find_runs,
    frame,
    sweep_base,
    sweep_name,
)
from lwfedssl_jax.analysis.settings import Setting, group_by_setting, protocols
from lwfedssl_jax.analysis.statistics import CHANCE, Difference
from lwfedssl_jax.analysis.style import STYLES
from lwfedssl_jax.analysis.tables import Table
from lwfedssl_jax.analysis.wording import protocol_words
from lwfedssl_jax.config import CONFIG_DIR, SWEEPS, flat, join_lists, load, resolve, to_dict
from lwfedssl_jax.costs.privacy import NOT_COVERED
from lwfedssl_jax.system.files import write_whole
from lwfedssl_jax.system.program import program

TEMPLATE = Path(__file__).parent / "report.html.j2"
SHOWN_POPULATIONS = 4
FINGERPRINTS = (FINGERPRINT, EVALUATION_FINGERPRINT)
LOCAL_OPTIONS = (  # options that depend on the machine or run; a command that repeats runs omits or adds them for all
    "--runtime.seed", "--workdir", "--compilation-cache", "--coordinator", "--processes", "--process",
)  # fmt: skip
BASE = "quickstart"  # the config that command lines start from
MAIN_FIELDS = (  # shown at the top of the page if all runs share them
    "data.name", "partition.kind", "partition.beta", "partition.clients", "federation.clients_per_round", "model.name",
    "model.width", "model.depth", "objective.name", "strategy.name", "federation.rounds", "federation.local_epochs",
)  # fmt: skip


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
    write_whole(
        page, environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(content).encode(errors="replace")
    )
    return page


def compose(runs: Sequence[RunRecord], out: Path) -> dict[str, Any]:
    """Make the content for the template, and write its figures and tables under ``out``."""
    results = frame(runs)
    finished, settings = group_by_setting(results)
    names = protocols(results)
    by_path = {str(run.path): run for run in runs}
    members = {s.label: [by_path[p] for p in finished.loc[finished["setting"] == s.label, "path"]] for s in settings}
    compared = compare_all(finished, settings, names) if len(settings) > 1 else {}
    shown = _tables(finished, settings, members, [d for found in compared.values() for d in found])
    shown["equal_cost"] = equal_cost_table(members, settings, names[0]) if names else None
    for table in filter(None, shown.values()):
        tables.write(table, out / "tables")
    (out / "tables").mkdir(parents=True, exist_ok=True)
    results.to_csv(out / "tables" / "runs.csv", index=False, errors="replace")
    pictures = list(populations(runs))
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
        "differences": {
            protocol_words(p): [f"{d}{'; may be chance' * (d.p_holm >= CHANCE)}" for d in found]
            for p, found in compared.items()
            if found
        },
        "tests": sum(not isnan(d.p) for found in compared.values() for d in found),
        "by_factor": any(d.factor for found in compared.values() for d in found),
        "grids": list(grids(finished, settings, names, out)),
        "costs": [costs_figure(finished, settings, p, out) for p in names] if len(finished) > 1 else [],
        "curves": list(curve_figures(members, settings, names, out) if settings else first_curves(runs, out)),
        "privacy_figures": epsilon_figures(finished, settings, names, out),
        "promises": promises(members, lambda promise: promise["says"]),
        "audits": promises(members, lambda promise: promise.get("audit", {}).get("says")),
        "not_covered": NOT_COVERED,
        "events": {label: said for label, runs in members.items() if (said := list(event_words(runs[0].path)))},
        "device_figures": device_figures(members, out),
        "pacing": pacing_figure(members),
        "share_panel": len(settings) <= len(STYLES),
        "spending": spending_figure(members),
        "pictures": image_figures(members),
        "populations": pictures[:SHOWN_POPULATIONS],
        "more_populations": len(pictures[SHOWN_POPULATIONS:]),
        "differing": list(settings[0].values) if settings else [],
        "shared": (shared := _shared_fields(runs)),
        "main_fields": {field: shared[field] for field in MAIN_FIELDS if field in shared and has_effect(field, shared)},
        "devices": list(dict.fromkeys(str(run.about.get("device", "unknown device")) for run in runs if run.about)),
        "versions": list(dict.fromkeys(version for run in runs for version in _versions(run))),
    }


def _tables(
    runs: pd.DataFrame, settings: Sequence[Setting], members: Members, compared: Sequence[Difference]
) -> dict[str, Table | None]:
    """Make the tables of the page by name; None for a table without content."""
    first_summaries = {label: runs[0].summary for label, runs in members.items()}
    paths = {label: runs[0].path for label, runs in members.items()}
    ledgers = first_summaries[settings[0].label]["strategies"] if len(settings) == 1 else None
    return {
        "settings": tables.settings_table(runs, settings) if settings else None,
        "resources": tables.resources_table(runs, settings, ledgers) if settings else None,
        "significance": tables.differences_table(compared) if compared else None,
        "label_free": tables.label_free_table(runs, settings) if settings else None,
        "fleet": tables.fleet_table(first_summaries),
        "privacy": tables.privacy_table(first_summaries),
        "membership": tables.membership_table(first_summaries),
        "devices": device_table(paths),
        "device_stages": stage_table(paths),
    }


def promises(members: Members, sentence: Callable[[Mapping[str, Any]], str | None]) -> dict[str, list[str]]:
    """A sentence on the privacy of each setting's first run, once, with the settings of which it is true."""
    found: dict[str, list[str]] = {}
    for label, runs in members.items():
        if (promise := runs[0].summary.get("privacy")) and (said := sentence(promise)):
            found.setdefault(said, []).append(label)
    return found


def _versions(run: RunRecord) -> list[str]:
    versions = run.about.get("versions")
    return [f"{name} {version}" for name, version in versions.items()] if isinstance(versions, dict) else []


def _shared_fields(runs: Sequence[RunRecord]) -> dict[str, str]:
    """The config fields that have one value in all runs, except for the seed."""
    configs = [run.config for run in runs if run.config]
    first = configs[0] if configs else {}
    shared = {f: v for f, v in first.items() if f != SEED and all(config.get(f) == v for config in configs)}
    return {field: str(value) for field, value in join_lists(shared).items()}


def commands(runs: Sequence[RunRecord], directories: Sequence[str | Path]) -> Iterator[str]:
    """Command lines that repeat the runs and write the page."""
    for directory in filter(sweep_name, map(Path, directories)):
        name, base = sweep_name(directory), sweep_base(directory)
        file = name if (CONFIG_DIR / SWEEPS / f"{name}.py").is_file() else str(directory / "sweep.py")
        words = ["sweep", file, *(["--base", base] if base else []), "--workdir", str(directory)]
        yield shlex.join([*program(), *words])
    seeds_by_command: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        if run.about and not run.label:
            arguments = _given_arguments(run) if run.about.get("config_file") else _arguments(run.config)
            key = f"{shlex.join(program())} train {arguments}", _given_workdir(run)
            seeds_by_command.setdefault(key, []).append(str(run.config.get(SEED)))
    for (command, workdir), seeds in seeds_by_command.items():
        more = f"  # and {', '.join(seeds[1:])}" if len(seeds) > 1 else ""
        yield f"{command} --runtime.seed {seeds[0]}{workdir}{more}"
    yield shlex.join([*program(), "report", *map(str, directories)])


def _given_words(run: RunRecord) -> list[str]:
    """The words after ``train`` that began the run; none if they are not known."""
    words = run.about.get("command")
    return words if isinstance(words, list) and all(isinstance(word, str) for word in words) else []


def _given_workdir(run: RunRecord) -> str:
    """``--workdir`` as it was given, with a space before it; empty without it."""
    for word, after in itertools.pairwise([*_given_words(run), ""]):
        if word.partition("=")[0] == "--workdir":
            return f" --workdir {shlex.quote(word.partition('=')[2] or after)}"
    return ""


def _given_arguments(run: RunRecord) -> str:
    """The user's own config file with the options that were given, except for ``LOCAL_OPTIONS``."""
    words = _given_words(run)
    if not words:
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
