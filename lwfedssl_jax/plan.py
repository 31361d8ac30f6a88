"""Which strategy and how many layers a stage a fleet can afford."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from lwfedssl_jax import fleet
from lwfedssl_jax.comparison import CHANCE, compare, holm, protocols
from lwfedssl_jax.config import Config, ConfigError, device_classes, divisors, override, to_dict
from lwfedssl_jax.data import sources
from lwfedssl_jax.fleet import DeviceClass, Fleet, Part
from lwfedssl_jax.report import protocol_words
from lwfedssl_jax.resources import Ledger, Notify, each_strategy, ledgers_of
from lwfedssl_jax.stages import STRATEGIES

PUBLISHED = ("progressive", "end_to_end", "layerwise")  # by accuracy, best first (arXiv 2401.11647)
UNTOLD = 2  # options named from which the recommended one is not told apart
IN_RESULTS = ("strategy", "runtime", "evaluation", "fleet")  # sections in which runs that are compared may differ

Stages = tuple[tuple[int, int], ...]  # (frozen_depth, depth) of each


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


class Option(NamedTuple):
    """A way to train, and what each class can do of it.

    Attributes:
      strategy, layers_per_stage, remat: of the config.
      ledger: with peak memory.
      parts: of each class.
      shares: of the devices that can take part in each stage, and last in every one.
      measured: None where no results have it.
    """

    strategy: str
    layers_per_stage: int
    remat: bool
    ledger: Ledger
    parts: list[Part]
    shares: list[float]
    measured: Measured | None

    @property
    def name(self) -> str:
        """For a sentence."""
        layers = f", {self.layers_per_stage} layer{'s' * (self.layers_per_stage > 1)} a stage"
        remat = ", with runtime.remat" if self.remat else ""
        return f"{self.strategy}{layers if len(self.ledger['per_stage']) > 1 else ''}{remat}"

    @property
    def everywhere(self) -> float:
        """Share of the devices that can take part in every stage."""
        return self.shares[-1]

    @property
    def seconds(self) -> float:
        """Of the whole run on the slowest class whose speed is known, of those that take part throughout."""
        all_ = len(self.ledger["per_stage"])
        return max((p.seconds for p in self.parts if p.seconds is not None and len(p.stages) == all_), default=0.0)


class Plan(NamedTuple):
    """What ``plan`` prints.

    Attributes:
      config: resolved, with the fleet.
      devices: its classes.
      examples: of a client.
      options: all that can run.
      refused: of those that cannot run with the rest of the config, why.
      recommended: the choice of ``recommend``; None where no class can take part throughout in any.
      reason: why, in sentences.
      results: that were asked for.
    """

    config: Config
    devices: list[DeviceClass]
    examples: float
    options: list[Option]
    refused: dict[str, str]
    recommended: Option | None
    reason: str
    results: Results


def make_plan(config: Config, examples: float, results: Results = NO_RESULTS, notify: Notify = lambda _: None) -> Plan:
    """Price every option and see what each class of the fleet can do of it; compiles a step of each.

    Args:
      config: resolved; its strategy and ``runtime.remat`` are varied.
      examples: that a client trains on.
      results: accuracies (``measured_accuracies``).
      notify: told what is being compiled.

    Raises:
      ConfigError: no option can run.
    """
    configs, refused = each_option(config)
    ledgers = ledgers_of(configs, memory=True, notify=notify)
    devices = device_classes(config)
    options = []
    for (strategy, layers, remat), ledger in ledgers.items():
        deadline = config.fleet.deadline_seconds
        parts = [fleet.take_part(device, ledger["per_stage"], examples, deadline) for device in devices]
        accuracy = results.found.get((stages_of(config, strategy, layers), remat))
        shares = shares_by_stage(devices, parts, len(ledger["per_stage"]))
        options.append(Option(strategy, layers, remat, ledger, parts, shares, accuracy))
    recommended, reason = recommend(config, devices, options, results.protocol)
    return Plan(config, devices, examples, options, refused, recommended, reason, results)


def each_option(config: Config) -> tuple[dict[tuple[str, int, bool], Config], dict[str, str]]:
    """Each strategy with the numbers of layers a stage that divide the depth, and the config's own, and remat or not.

    Returns:
      The config by strategy, layers a stage and ``runtime.remat``, one for all that have the same stages; and why
      strategies are refused.

    Raises:
      ConfigError: all are.
    """
    depth = config.model.depth
    numbers = sorted({*divisors(depth)[:-1], config.strategy.layers_per_stage})
    found: dict[tuple[str, int, bool], Config] = {}
    refused: dict[str, str] = {}
    for strategy in STRATEGIES:
        for remat in (False, True):
            seen = {stages_of(config, s, k) for s, k, _ in found if s != strategy}
            for number in numbers:
                stages = stages_of(config, strategy, number)
                if stages in seen:
                    continue
                seen.add(stages)
                layers = depth if len(stages) == 1 else number
                changes = {"strategy.layers_per_stage": layers, "runtime.remat": remat}
                of_strategy, why = each_strategy(override(config, changes))
                if strategy in of_strategy:
                    found[strategy, layers, remat] = of_strategy[strategy]
                else:
                    refused[f"{strategy}, {layers} layer{'s' * (layers > 1)} a stage"] = why[strategy]
    if not found:
        raise ConfigError(next(iter(refused.values())))
    return found, refused


def stages_of(config: Config, strategy: str, layers_per_stage: int) -> Stages:
    """What makes two options the same, but for ``runtime.remat``."""
    return tuple(STRATEGIES[strategy](config.model.depth, layers_per_stage))


def shares_by_stage(devices: Sequence[DeviceClass], parts: Sequence[Part], stages: int) -> list[float]:
    """Share of the devices that can take part in each stage, and at the end in all of them."""
    total = sum(device.count for device in devices)
    pairs = list(zip(devices, parts, strict=True))
    of_stage = [sum(d.count for d, p in pairs if s in p.stages) / total for s in range(1, stages + 1)]
    return [*of_stage, sum(d.count for d, p in pairs if len(p.stages) == stages) / total]


def recommend(
    config: Config, devices: Sequence[DeviceClass], options: Sequence[Option], protocol: str
) -> tuple[Option | None, str]:
    """The option to take, and why.

    Of the options in which the largest share of the devices can take part in every stage: the one with the highest
    measured accuracy, if any of them is measured; else by the published order of accuracies (progressive, end_to_end,
    layerwise; others last). Among equals the one of least time on the slowest class, then of least traffic, then of
    fewest operations. None if no class can take part in every stage of any option; the reason then says what is
    nearest.
    """
    most = max(option.everywhere for option in options)
    if not most:
        lacking = [_lacking(config, device, number, options) for number, device in enumerate(devices)]
        return None, " ".join(["No class can take part in every stage of any option.", *lacking])
    fit = [option for option in options if option.everywhere == most]
    known = [option for option in fit if option.measured]

    def order(option: Option) -> tuple[float, ...]:
        rank = (*PUBLISHED, option.strategy).index(option.strategy)
        first = -option.measured.accuracy if option.measured else rank
        return first, option.seconds, option.ledger["total_bytes"], option.ledger["flops_executed"]

    best = min(known or fit, key=order)
    share = "all devices" if most == 1 else f"{_percent(most)} of the devices, the most that any option reaches,"
    reason = f"{best.name}: {share} can take part in every stage."
    if best.measured:
        count = len(best.measured.by_seed)
        runs = f"mean of {count} seeds" if count > 1 else "1 seed"
        by = f"{100 * best.measured.accuracy:.1f} % ({protocol_words(protocol)}, {runs})"
        why = f"it has the highest measured accuracy, {by}"
    else:
        why = f"{best.strategy} is the most accurate as published ({' > '.join(PUBLISHED)})"
        why += f"; none of them is in the results by {protocol_words(protocol)}" if protocol else ""
    least = "time" if best.seconds else "traffic"
    if len(fit) > 1:
        reason += f" Of the {len(fit)} options of which that is so {why}; among equals it takes least {least}."
    reason += _untold(best, known, protocol)
    plain = [option for option in options if not option.remat]
    if best.remat and plain:
        other, _ = recommend(config, devices, plain, protocol)
        found = f"{other.name}, {_percent(other.everywhere)} of the devices" if other else "nothing fits"
        reason += f" Without runtime.remat: {found}."
    stages = len(best.ledger["per_stage"])
    out = [number for number, part in enumerate(best.parts) if len(part.stages) < stages]
    return best, " ".join([reason, *(_lacking(config, devices[number], number, options) for number in out)])


def _untold(best: Option, known: Sequence[Option], protocol: str) -> str:
    """Measured options that the best is not shown to be better than, by paired t-tests adjusted by Holm's method."""
    if not best.measured:
        return ""
    runs_of = lambda option: (option.strategy, option.layers_per_stage, str(option.measured))  # noqa: E731
    others: dict[Any, Option] = {}  # with remat and without it may be the same runs
    for option in known:
        if runs_of(option) != runs_of(best):
            others.setdefault(runs_of(option), option)
    found = [
        compare(protocol, best.name, option.name, best.measured.by_seed, option.measured.by_seed)
        for option in others.values()
        if option.measured
    ]
    adjusted = [d._replace(p_holm=p) for d, p in zip(found, holm([d.p for d in found]), strict=True)]
    untold = sorted(
        (d for d in adjusted if not (d.p_holm < CHANCE and d.mean > 0)), key=lambda d: (not d.seeds, d.seeds and d.mean)
    )
    if not untold:
        return ""
    points = lambda d: f"{100 * d.mean:+.1f} points, " if d.seeds else ""  # noqa: E731
    told = [f"{d.against} ({points(d)}{d.why_not or f'adjusted p = {d.p_holm:.2g}'})" for d in untold]
    more = f", and {len(told) - UNTOLD} more" if len(told) > UNTOLD else ""
    return f" It is not shown to be better than {'; '.join(told[:UNTOLD])}{more}."


def _lacking(config: Config, device: DeviceClass, number: int, options: Sequence[Option]) -> str:
    """What the class of that number lacks for the option that comes nearest to it."""
    least = min(options, key=lambda option: option.ledger["peak_memory_bytes"])
    peak, has = least.ledger["peak_memory_bytes"] / 1e9, device.memory_gb
    if peak > has:
        batch = 2 ** math.floor(math.log2(config.optimizer.batch_size * has / peak))
        hint = f", or try optimizer.batch_size {batch}" if batch >= 2 else ""
        return (
            f"{device.name}: every option needs {peak:.3g} GB or more ({least.name}), {peak - has:.2g} GB above what "
            f"it has{hint}."
        )
    fitting = [option for option in options if option.ledger["peak_memory_bytes"] <= has * 1e9]
    slowest = {option.name: max(option.parts[number].round_seconds or [0.0]) for option in fitting}
    name = min(slowest, key=lambda name: slowest[name])
    if config.fleet.deadline_seconds < slowest[name]:
        return (
            f"{device.name}: with fleet.deadline_seconds {config.fleet.deadline_seconds:g} it is too slow for every "
            f"option that fits its memory: a round takes up to {_time(slowest[name])} ({name})."
        )
    return f"{device.name}: it could take part throughout in {name}."


def examples_of_a_client(config: Config, given: int | None) -> float:
    """How many images a client trains on; the mean where they are unequal, and the median of shared ones.

    Args:
      config: resolved.
      given: by the user; None to take them from a data set whose size is known without reading one from disk.

    Raises:
      ConfigError: it is not known.
    """
    if given is not None:
        if given < 1:
            raise ConfigError(f"--examples: {given} is out of range; accepted: at least 1")
        return given
    source = sources.find(config.data)
    if config.partition.kind == "shared":
        return config.partition.examples_per_client
    if config.data.name not in ("digits", "synthetic"):
        raise ConfigError(
            f"--examples: nothing, and how many images a client of data.name {config.data.name} has is not known "
            "without reading it; accepted: their number"
        )
    synthetic = config.data.name == "synthetic"
    total = config.data.synthetic_examples if synthetic else len(source.load(config.data).train_images)
    return (total - round(config.partition.server_share * total)) / config.partition.clients


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


def fleet_of_clients(config: Config, per_stage: Sequence[Mapping[str, Any]], examples_N: np.ndarray) -> Fleet:
    """The clients of a run on the config's fleet.

    Args:
      config: resolved, with ``fleet.devices``.
      per_stage: of its ledger with peak memory.
      examples_N: of each client.

    Raises:
      ConfigError: no client with examples can take part in some stage.
    """
    devices, deadline = device_classes(config), config.fleet.deadline_seconds
    made = fleet.make_fleet(devices, per_stage, examples_N, deadline, config.runtime.seed)
    for row in per_stage:
        if not (made.can[row["stage"]] & (examples_N > 0)).any():
            most = max(device.memory_gb for device in devices)
            slow = f", or a round in fleet.deadline_seconds {deadline:g}" if deadline else ""
            raise ConfigError(
                f"fleet.devices: no client can take part in stage {row['stage']} of {len(per_stage)}, which needs "
                f"{row['peak_memory_bytes'] / 1e9:.3g} GB (they have up to {most:.3g} GB){slow}; accepted: devices "
                "that can, a smaller optimizer.batch_size, runtime.remat True, or strategy.name layerwise"
            )
    return made


def table(plan: Plan, width: int) -> Group:
    """The plan on one screen of so many columns: a line an option, the recommendation, and what it asks of each class.

    Energy stands beside the time, and the spread over seeds beside the accuracy, where there is room.
    """
    config, protocol = plan.config, plan.results.protocol
    for energy, spread in ((True, True), (False, True), (False, False)):
        shown = _options_table(plan, energy=energy, spread=spread)
        if Console(width=1000).measure(shown).maximum <= width:
            break
    epochs = f"{config.federation.local_epochs} local epoch{'s' * (config.federation.local_epochs > 1)}"
    shown.title = (
        f"{config.model.name}, {config.objective.name}: {config.federation.rounds} rounds, "
        f"{epochs} of {plan.examples:,.0f} images a client, batch {config.optimizer.batch_size}"
    )
    lines = [
        "k: layers a stage. memory: of a step in the first stage → the most of any stage, by the compiler for "
        f"{jax.devices()[0].device_kind}. fleet: devices that can take part in the first stage → in every one. "
        "out ≥s: cannot take part from stage s on."
        + " Times are of a device in every round."
        * any(d.has_speed for d in plan.devices),
        *(f"{name} cannot run with this config: {why}" for name, why in plan.refused.items()),
    ]
    if protocol:
        who = "on this fleet" if plan.results.on_fleet else "in which all clients take part throughout"
        several = spread and any(o.measured and len(o.measured.by_seed) > 1 for o in plan.options)
        lines.append(
            f"acc.: accuracy by {protocol_words(protocol)}, mean{' ± standard deviation' * several} over seeds, "
            f"of runs {who}; blank where there is none."
        )
    chosen = [plan.reason]
    if plan.recommended:
        chosen += [_demand(d, p, plan.recommended) for d, p in zip(plan.devices, plan.recommended.parts, strict=True)]
    return Group(shown, *(f"[dim]{escape(line)}[/]" for line in lines), "", *map(escape, chosen))


def _options_table(plan: Plan, *, energy: bool, spread: bool) -> Table:
    options, protocol = plan.options, plan.results.protocol
    memory, traffic = (_unit(max(o.ledger[key] for o in options)) for key in ("peak_memory_bytes", "total_bytes"))
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("strategy", no_wrap=True)
    shown.add_column("k", justify="right", no_wrap=True)
    shown.add_column("re-\nmat", no_wrap=True)
    shown.add_column(f"memory\n{memory[1]}", justify="right", no_wrap=True)
    shown.add_column("fleet\n%", justify="right", no_wrap=True)
    for device in plan.devices:
        has = f"{device.memory_gb:.3g} GB" if device.memory_gb >= 0.1 else f"{1000 * device.memory_gb:.3g} MB"
        head = escape(f"{device.name}\n{device.count:,} x\n{has}")
        shown.add_column(head, justify="right", no_wrap=True)
    shown.add_column(f"traf-\nfic\n{traffic[1]}", justify="right", no_wrap=True)
    if protocol:
        shown.add_column("acc.\n%", justify="right", no_wrap=True)
    for option, following in zip(options, [*options[1:], None], strict=True):
        peaks = [row["peak_memory_bytes"] for row in option.ledger["per_stage"]]
        accuracy = f"{100 * option.measured.accuracy:.1f}" if option.measured else ""
        if option.measured and spread and not math.isnan(option.measured.std):
            accuracy += f"±{100 * option.measured.std:.1f}"
        shown.add_row(
            f"{'→ ' if option is plan.recommended else ''}{option.strategy}",
            str(option.layers_per_stage),
            "yes" if option.remat else "",
            _range(*(_short(peak / memory[0]) for peak in (peaks[0], max(peaks)))),
            _range(*(f"{100 * share:.0f}" for share in (option.shares[0], option.everywhere))),
            *(_cell(part, option.ledger, energy=energy) for part in option.parts),
            _short(option.ledger["total_bytes"] / traffic[0]),
            *([accuracy] if protocol else []),
            style="bold reverse" if option is plan.recommended else "",
            end_section=following is not None and following.strategy != option.strategy,
        )
    return shown


def _demand(device: DeviceClass, part: Part, option: Option) -> str:
    """What the option asks of a device."""
    if not part.stages:
        return f"{device.name}: takes no part."
    rounds = sum(row["rounds"] for row in option.ledger["per_stage"] if row["stage"] in part.stages)
    asked = [f"{_short(part.traffic_bytes / size)} {unit} of traffic" for size, unit in [_unit(part.traffic_bytes)]]
    if part.round_seconds and part.seconds:
        most = max(part.round_seconds[stage - 1] for stage in part.stages)
        asked.insert(0, f"up to {_time(most)} a round, {_time(part.seconds)} for its {rounds} rounds")
    if part.energy_wh is not None:
        asked.append(f"{_short(part.energy_wh)} Wh")
    return f"{device.name}: {', '.join(asked)}."


def _cell(part: Part, ledger: Ledger, *, energy: bool) -> str:
    """What a class does in an option: its time and energy, or from which stage on it is out."""
    stages = len(ledger["per_stage"])
    if len(part.stages) < stages:
        return f"[red]{fleet.words(part.stages, stages).replace('from ', '≥')}[/]"
    if part.seconds is None:
        return "yes"
    return _time(part.seconds) + (f" {_short(part.energy_wh)} Wh" if energy and part.energy_wh is not None else "")


def _range(first: str, last: str) -> str:
    return first if first == last else f"{first}→{last}"


def _time(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{_short(seconds / size)} {unit}"
    return f"{_short(seconds)} s"


def _short(x: float) -> str:
    """Two digits, or all before the point."""
    return f"{x:,.0f}" if x >= 10 else f"{x:.2g}"


def _unit(nbytes: float) -> tuple[float, str]:
    return (1e9, "GB") if nbytes >= 5e8 else (1e6, "MB")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def to_plain(plan: Plan) -> dict[str, Any]:
    """The plan as JSON, units in the keys; of an option's classes the stages that they take part in."""

    def option(of: Option) -> dict[str, Any]:
        return {
            "strategy": of.strategy,
            "layers_per_stage": of.layers_per_stage,
            "remat": of.remat,
            "share_every_stage": of.everywhere,
            "share_first_stage": of.shares[0],
            "share_by_stage": of.shares[:-1],
            "peak_memory_bytes": of.ledger["peak_memory_bytes"],
            "traffic_bytes": of.ledger["total_bytes"],
            "flops_executed_a_sample": of.ledger["flops_executed"],
            "accuracy": of.measured.accuracy if of.measured else None,
            "accuracy_by_seed": of.measured.by_seed if of.measured else {},
            "classes": [
                {
                    "name": device.name,
                    "stages": part.stages,
                    "says": fleet.words(part.stages, len(of.ledger["per_stage"])),
                    "round_seconds_by_stage": part.round_seconds,
                    "slowest_round_seconds": max(part.round_seconds) if part.round_seconds else None,
                    "seconds": part.seconds,
                    "traffic_bytes": part.traffic_bytes,
                    "energy_wh": part.energy_wh,
                }
                for device, part in zip(plan.devices, of.parts, strict=True)
            ],
            "per_stage": of.ledger["per_stage"],
        }

    return {
        "config": to_dict(plan.config),
        "devices": [dataclasses.asdict(device) for device in plan.devices],
        "examples_of_a_client": plan.examples,
        "protocol": plan.results.protocol or None,
        "results_on_this_fleet": plan.results.on_fleet,
        "options": [option(of) for of in plan.options],
        "refused": plan.refused,
        "recommended": plan.options.index(plan.recommended) if plan.recommended else None,
        "reason": plan.reason,
    }
