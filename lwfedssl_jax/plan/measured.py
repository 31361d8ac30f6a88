"""Accuracies measured by finished runs, for a plan's options."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lwfedssl_jax.analysis.settings import protocols
from lwfedssl_jax.config import Config, ConfigError, to_dict
from lwfedssl_jax.method.stages import STRATEGIES, Stages, stages_of

IN_RESULTS = ("strategy", "runtime", "evaluation", "fleet")  # sections in which runs that are compared may differ


class Measured(NamedTuple):
    """Accuracies in [0, 1] of an option by seed, and their mean and sample standard deviation (NaN for one)."""

    by_seed: Mapping[int, float]

    @property
    def accuracy(self) -> float:
        return sum(self.by_seed.values()) / len(self.by_seed)

    @property
    def std(self) -> float:
        return statistics.stdev(self.by_seed.values()) if len(self.by_seed) > 1 else math.nan


class Results(NamedTuple):
    """What runs have reached.

    Attributes:
      protocol: by which their accuracy is told; empty where there are none.
      on_fleet: whether their clients were on the fleet that is asked about; else all took part in everything.
      found: by an option's stages and ``runtime.remat``.
    """

    protocol: str = ""
    on_fleet: bool = False
    found: Mapping[tuple[Stages, bool], Measured] = {}


NO_RESULTS = Results()


def measured_accuracies(config: Config, rows: Sequence[Mapping[str, Any]], protocol: str | None) -> Results:
    """Accuracy of each option that results have, by seed: the mean of its runs that have one.

    Finished runs count that differ from the config in strategy, runtime and evaluation alone. Their fleet is the
    config's, with its deadline, and then ``runtime.remat`` decides who took part; or, where none has that, they have
    none.

    Args:
      config: resolved.
      rows: of ``results.load_results``.
      protocol: such as ``knn``; None for the one that a report leads with (``comparison.protocols``).

    Raises:
      ConfigError: no run is like the config, or none has the protocol.
    """
    import pandas as pd

    finished = [row for row in rows if row["finished"]]
    plain = {
        f"{section}.{name}": " ".join(map(str, value)) if isinstance(value, list) else value
        for section, values in to_dict(config).items()
        for name, value in values.items()
    }
    same = [name for name in plain if name.split(".")[0] not in IN_RESULTS]
    others = [[name for name in same if row.get(name) != plain[name]] for row in finished]
    alike = [row for row, differing in zip(finished, others, strict=True) if not differing]
    on_fleet = [name for name in plain if name.startswith("fleet.")] if plain["fleet.devices"] else []
    mine = [row for row in alike if on_fleet and all(row.get(name) == plain[name] for name in on_fleet)]
    runs = mine or [row for row in alike if pd.isna(row.get("fleet.devices")) or row["fleet.devices"] == ""]
    if not runs:
        found = f"{len(finished)} finished runs, none like this config"
        if finished and not alike:
            row, differing = min(zip(finished, others, strict=True), key=lambda pair: len(pair[1]))
            found += f": {differing[0]} is {row.get(differing[0])!r} there, {plain[differing[0]]!r} here"
        raise ConfigError(
            f"--results: {found}; accepted: runs that differ from it in {', '.join(IN_RESULTS[:-1])} alone"
        )
    judged = protocols(pd.DataFrame(runs))
    if not judged or (protocol and protocol not in judged):
        raise ConfigError(
            f"--protocol: {protocol or 'nothing'} has judged none of the runs; accepted: {', '.join(judged) or 'none'}"
        )
    chosen = protocol or judged[0]
    values: dict[tuple[Stages, bool], dict[int, list[float]]] = {}
    for row in runs:
        value = row.get(f"accuracy.{chosen}")
        if _is_number(value) and row["strategy.name"] in STRATEGIES:
            stages = stages_of(config, row["strategy.name"], int(row["strategy.layers_per_stage"]))
            for remat in (bool(row["runtime.remat"]),) if mine else (False, True):
                values.setdefault((stages, remat), {}).setdefault(row["runtime.seed"], []).append(float(value))  # type: ignore[arg-type]
    by_seed = {key: {seed: statistics.fmean(v) for seed, v in of.items()} for key, of in values.items()}
    return Results(chosen, bool(mine), {key: Measured(of) for key, of in by_seed.items()})


def _is_number(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)
