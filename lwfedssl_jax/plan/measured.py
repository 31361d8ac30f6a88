"""Accuracies measured by finished runs, for a plan's options."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from lwfedssl_jax.analysis.results import FINGERPRINT
from lwfedssl_jax.analysis.settings import protocols
from lwfedssl_jax.config import Config, ConfigError, flat, join_lists, override, to_dict
from lwfedssl_jax.method.stages import STRATEGIES, Stages, stages_of

FREE_SECTIONS = ("strategy", "runtime", "evaluation", "fleet")  # sections in which runs may differ from the config
COMPARED = ("evaluation.labelled_split",)  # except for these fields: they change what a protocol's accuracy means

Row = Mapping[str, Any]  # of ``analysis.results.load_results``


class Measured(NamedTuple):
    """Accuracies in [0, 1] of an option by seed, their mean, and their sample standard deviation (NaN for one seed)."""

    by_seed: Mapping[int, float]

    @property
    def accuracy(self) -> float:
        return sum(self.by_seed.values()) / len(self.by_seed)

    @property
    def std(self) -> float:
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else math.nan


class Results(NamedTuple):
    """Accuracies that runs have reached.

    Attributes:
      protocol: the evaluation protocol of the accuracies, or an empty string without any.
      on_fleet: whether the runs trained on the plan's fleet; otherwise all their clients took part in all stages.
      found: accuracies by the stages of an option and its ``runtime.remat``.
    """

    protocol: str = ""
    on_fleet: bool = False
    found: Mapping[tuple[Stages, bool], Measured] = {}


NO_RESULTS = Results()


def measured_accuracies(config: Config, rows: Sequence[Row], protocol: str | None) -> Results:
    """Collect the accuracies of each option by seed, each the mean over the runs with that seed.

    Args:
      config: resolved.
      rows: of ``analysis.results.load_results``.
      protocol: such as ``knn``; None for the one that a report begins with (``analysis.settings.protocols``).

    Raises:
      ConfigError: no run is like the config (``runs_like``), none of those that are was evaluated by the protocol, or
        they were trained on different data.
    """
    runs, on_fleet = runs_like(config, rows)
    data = list(dict.fromkeys(text for run in runs if (text := str(run.get(FINGERPRINT) or ""))))
    if len(data) > 1:  # those of older runs are unknown
        raise ConfigError(
            f"--results: {len(runs)} runs like this config were trained on {len(data)} different data sets "
            f"({FINGERPRINT}: {', '.join(repr(text) for text in data)}); accepted: runs on the same data"
        )
    known = protocols(pd.DataFrame(runs))
    if not known or (protocol and protocol not in known):
        accepted = ", ".join(known) or "none"
        raise ConfigError(f"--protocol: {protocol or 'nothing'} has evaluated none of the runs; accepted: {accepted}")
    chosen = protocol or known[0]
    values: dict[tuple[Stages, bool], dict[int, list[float]]] = {}
    for run in runs:
        accuracy, stages = run.get(f"accuracy.{chosen}"), stages_of_run(config, run)
        if not isinstance(accuracy, float) or not math.isfinite(accuracy) or not stages:
            continue
        # On a fleet, runtime.remat decides which clients take part; otherwise it does not change accuracies.
        for remat in (bool(run["runtime.remat"]),) if on_fleet else (False, True):
            values.setdefault((stages, remat), {}).setdefault(run["runtime.seed"], []).append(accuracy)
    found = {
        option: Measured({seed: statistics.fmean(accuracies) for seed, accuracies in by_seed.items()})
        for option, by_seed in values.items()
    }
    return Results(chosen, on_fleet, found)


def stages_of_run(config: Config, run: Row) -> Stages:
    """Return the stages of a run; none if this version cannot train it, or paces its stages unlike the config."""
    if run["strategy.name"] not in STRATEGIES or run["strategy.pacing"] != config.strategy.pacing:
        return ()
    listed = tuple(int(number) for number in str(run["strategy.rounds_per_stage"]).split())
    changes = {
        "strategy.name": run["strategy.name"],
        "strategy.layers_per_stage": int(run["strategy.layers_per_stage"]),
        "strategy.first_stage_share": float(run["strategy.first_stage_share"]),
        "strategy.rounds_per_stage": listed,
    }
    return stages_of(override(config, changes))


def runs_like(config: Config, rows: Sequence[Row]) -> tuple[list[Row], bool]:
    """The finished runs that differ from the config only in strategy, runtime and evaluation.

    Returns:
      Those on the config's fleet, with its deadline, and True; or, if there are none, those without a fleet and False.

    Raises:
      ConfigError: there are no such runs.
    """
    finished = [row for row in rows if row["finished"]]
    wanted = join_lists(flat(to_dict(config)))
    compared = [name for name in wanted if name.split(".")[0] not in FREE_SECTIONS or name in COMPARED]
    differing = [[name for name in compared if row.get(name) != wanted[name]] for row in finished]
    similar = [row for row, names in zip(finished, differing, strict=True) if not names]
    fleet = [name for name in wanted if name.startswith("fleet.")]
    on_fleet = [row for row in similar if all(row.get(name) == wanted[name] for name in fleet)]
    if wanted["fleet.devices"] and on_fleet:
        return on_fleet, True
    without_fleet = [row for row in similar if pd.isna(row.get("fleet.devices")) or row["fleet.devices"] == ""]
    if without_fleet:
        return without_fleet, False
    found = f"{len(finished)} finished runs, none like this config"
    if finished and not similar:
        row, (name, *_) = min(zip(finished, differing, strict=True), key=lambda pair: len(pair[1]))
        found += f": {name} is {row.get(name)!r} there, {wanted[name]!r} here"
    free = ", ".join(FREE_SECTIONS[:-1])
    raise ConfigError(f"--results: {found}; accepted: runs that differ from it only in {free}")
