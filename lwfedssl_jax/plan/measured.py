"""Accuracies measured by finished runs, for a plan's options."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from lwfedssl_jax.analysis.results import FINGERPRINT
from lwfedssl_jax.analysis.settings import protocols
from lwfedssl_jax.analysis.wording import percent
from lwfedssl_jax.config import Config, ConfigError, flat, join_lists, override, to_dict
from lwfedssl_jax.method.stages import STRATEGIES, Stages, stages_of

FREE_SECTIONS = ("strategy", "runtime", "evaluation", "fleet")  # sections in which runs may differ from the config
COMPARED = ("evaluation.labelled_split",)  # except for these fields: they change what a protocol's accuracy means

Row = Mapping[str, Any]  # of ``analysis.results.load_results``


class Measured(NamedTuple):
    """Accuracies of an option.

    Attributes:
      by_seed: in [0, 1].
      untrained: those of the same runs' untrained encoders, where they are known.
      seeds: over which the options of a plan are ranked (``statistics.common_seeds``); without any, each over its own.
    """

    by_seed: Mapping[int, float]
    untrained: Mapping[int, float] = {}
    seeds: frozenset[int] = frozenset()

    @property
    def ranked(self) -> bool:
        """Whether it has all the seeds over which options are ranked."""
        return self.seeds <= self.by_seed.keys()

    @property
    def counted(self) -> dict[int, float]:
        """The accuracies that count, by seed: over the common seeds if it is ranked by them, otherwise all."""
        return {s: x for s, x in self.by_seed.items() if s in self.seeds or not (self.seeds and self.ranked)}

    @property
    def accuracy(self) -> float:
        """The mean over the seeds that count."""
        return statistics.fmean(self.counted.values())

    @property
    def std(self) -> float:
        """The sample standard deviation over the seeds that count; NaN for one seed."""
        return statistics.stdev(self.counted.values()) if len(self.counted) > 1 else math.nan

    @property
    def untrained_accuracy(self) -> float:
        """The mean accuracy of the untrained encoder over the seeds that count; NaN if it is not known for all."""
        known = [self.untrained[seed] for seed in self.counted if seed in self.untrained]
        return statistics.fmean(known) if len(known) == len(self.counted) else math.nan

    @property
    def gain(self) -> float:
        """The mean of accuracy minus that of the untrained encoder, over all seeds in which both are known; or NaN."""
        gains = [accuracy - self.untrained[seed] for seed, accuracy in self.by_seed.items() if seed in self.untrained]
        return statistics.fmean(gains) if gains else math.nan

    @property
    def words(self) -> str:
        """The accuracy with its spread, its seeds and that of the untrained encoder, separated by semicolons."""
        several = len(self.counted) > 1
        spread = f" ± {100 * self.std:.1f}" if several else ""
        seeds = f"mean of {len(self.counted)} seeds" if several else "1 seed"
        known = not math.isnan(self.untrained_accuracy)
        untrained = f"; untrained: {percent(self.untrained_accuracy)}" if known else ""
        return f"{100 * self.accuracy:.1f}{spread} %; {seeds}{untrained}"


class Results(NamedTuple):
    """Accuracies that runs have reached.

    Attributes:
      protocol: the evaluation protocol of the accuracies, or an empty string without any.
      on_fleet: whether the runs trained on the plan's fleet; otherwise all their clients took part in all stages.
      found: accuracies by the stages of an option and its ``runtime.remat``.
      shallow: of encoders with fewer layers, trained end to end and otherwise like the config, by their depth.
    """

    protocol: str = ""
    on_fleet: bool = False
    found: Mapping[tuple[Stages, bool], Measured] = {}
    shallow: Mapping[int, Measured] = {}


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
    of_option: dict[tuple[Stages, bool], list[Row]] = {}
    for run in runs:
        stages = stages_of_run(config, run)
        # On a fleet, runtime.remat decides which clients take part; otherwise it does not change accuracies.
        for remat in (bool(run["runtime.remat"]),) if on_fleet else (False, True):
            if stages and is_known(run.get(f"accuracy.{chosen}")):
                of_option.setdefault((stages, remat), []).append(run)
    found = {
        option: Measured(by_seed(members, f"accuracy.{chosen}"), by_seed(members, f"untrained.{chosen}"))
        for option, members in of_option.items()
    }
    same_data = [row for row in rows if str(row.get(FINGERPRINT) or "") in ("", *data)]
    return Results(chosen, on_fleet, found, shallow_controls(config, same_data, chosen, on_fleet))


def shallow_controls(config: Config, rows: Sequence[Row], protocol: str, on_fleet: bool) -> dict[int, Measured]:
    """Return the accuracies of shallower encoders that were trained end to end for as many rounds, by depth.

    Args:
      config: resolved.
      rows: of ``analysis.results.load_results``, on the data of the other runs.
      protocol: such as ``knn``.
      on_fleet: whether those runs, and so these, are trained on the config's fleet.
    """
    found = {}
    whole = [row for row in rows if row["strategy.name"] == "end_to_end" and is_known(row.get(f"accuracy.{protocol}"))]
    for depth in sorted({row["model.depth"] for row in whole if row["model.depth"] < config.model.depth}):
        try:
            runs, same_fleet = runs_like(override(config, {"model.depth": depth}), whole)
        except ConfigError:  # none of that depth is like the config
            continue
        if same_fleet == on_fleet:
            found[depth] = Measured(by_seed(runs, f"accuracy.{protocol}"), by_seed(runs, f"untrained.{protocol}"))
    return found


def is_known(value: object) -> bool:
    """Return whether a column of a run has a number."""
    return isinstance(value, float) and math.isfinite(value)


def by_seed(runs: Sequence[Row], column: str) -> dict[int, float]:
    """Return the mean of a column over the runs with each seed that have it."""
    found: dict[int, list[float]] = {}
    for run in runs:
        if is_known(run.get(column)):
            found.setdefault(run["runtime.seed"], []).append(run[column])
    return {seed: statistics.fmean(values) for seed, values in found.items()}


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
