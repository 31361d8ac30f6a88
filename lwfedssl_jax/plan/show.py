"""Shows a plan as a table on a terminal, or as JSON."""

import dataclasses
import math
from typing import Any

import jax
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from lwfedssl_jax.analysis.wording import (
    byte_unit,
    bytes_words,
    count_of,
    protocol_words,
    round_percent,
    short_number,
    time_unit,
    time_words,
)
from lwfedssl_jax.config import override, to_dict
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.costs import fleet
from lwfedssl_jax.costs.fleet import Participation
from lwfedssl_jax.costs.ledger import Ledger
from lwfedssl_jax.method.stages import ADAPTIVE_COSTS, even_rounds, rounds_fit
from lwfedssl_jax.plan import privacy
from lwfedssl_jax.plan.clients import to_plain as clients_to_plain
from lwfedssl_jax.plan.make import Plan
from lwfedssl_jax.plan.options import Option
from lwfedssl_jax.plan.published import unlike
from lwfedssl_jax.plan.recommend import step_words


def table(plan: Plan, width: int) -> Group:
    """Show the plan on a screen of ``width`` columns: the options, the recommendation, what it requires of each class.

    Energy and the spread over seeds are shown only if there is enough space: energy with the time, the spread
    with the accuracy.
    """
    for energy, spread in ((True, True), (False, True), (False, False)):
        options = _options_table(plan, energy=energy, spread=spread)
        if Console(width=1000).measure(options).maximum <= width:
            break
    options.title = title(plan)
    notes = (f"[dim]{escape(note)}[/]" for note in _notes(plan, spread=spread))
    return Group(options, *notes, "", *map(escape, conclusions(plan)))


def title(plan: Plan) -> str:
    """Return what is planned, such as "vit_tiny, byol: 9 rounds, 3 local epochs of 50 images per client, batch 8"."""
    config = plan.config
    return (
        f"{config.model.name}, {config.objective.name}: {count_of(config.federation.rounds, 'round')}, "
        f"{count_of(config.federation.local_epochs, 'local epoch')} of {plan.clients.words}, "
        f"batch {config.optimizer.batch_size}"
    )


def conclusions(plan: Plan) -> list[str]:
    """Return the recommendation, what the next steps up and down would change, and what it requires of each class."""
    chosen = plan.recommendation
    found = [chosen.reason, *privacy_notes(plan)]
    if best := chosen.option:
        steps = (("A step up", chosen.up), ("A step down", chosen.down))
        found += [f"{name}: {step_words(option, best, plan.devices)}" for name, option in steps if option]
        found += [demand(device, part, best) for device, part in zip(plan.devices, best.parts, strict=True)]
    return found


def privacy_notes(plan: Plan) -> list[str]:
    """State what the epsilon that is asked for takes under each option, with ``runtime.remat`` where it needs that."""
    if not plan.asked:
        return []
    stages: dict[tuple[str, int], list[Option]] = {}
    for option in sorted(plan.options, key=lambda option: option.remat):
        stages.setdefault((option.strategy, option.layers_per_stage), []).append(option)
    priced = [next((o for o in options if o.privacy), options[0]) for options in stages.values()]
    prices = {option.name: option.privacy for option in priced if option.privacy}
    return [privacy.words(plan.config, plan.asked, prices, [o.name for o in priced if not o.privacy])]


def _notes(plan: Plan, *, spread: bool) -> list[str]:
    """Explain what the table's columns mean, which accuracies it has, and which options are missing."""
    columns = (
        "k: layers per stage. remat: with runtime.remat. memory: peak of a training step in the first stage → in the "
        f"stage that needs most, by the compiler for {jax.devices()[0].device_kind}. fleet: clients that can take part "
        "in the first stage → in every stage. out ≥s: cannot take part from stage s on. traffic: of a device that "
        f"takes part in every round{drawn_words(plan)}. *: no other option is better in one respect and as good in the "
        "others."
    )
    columns += (
        " Times: of the class's slowest client, if it takes part in every round."
        if any(device.has_speed for device in plan.devices)
        else " Times need gflops, uplink_mbps and downlink_mbps."
    )
    notes = [
        columns,
        *([] if by_own_runs(plan) else [published_note(plan)]),
        *fleet_notes(plan),
        *schedule_notes(plan),
        *(f"{name} cannot run with this config: {why}" for name, why in plan.refused.items()),
    ]
    if plan.results.protocol:
        where = "on this fleet" if plan.results.on_fleet else "in which all clients take part throughout"
        several = spread and any(o.measured and not math.isnan(o.measured.std) for o in plan.options)
        notes.append(
            f"acc.: accuracy by {protocol_words(plan.results.protocol)}, mean{' ± standard deviation' * several} over "
            f"{seeds_words(plan)}, of runs {where}{unranked_note(plan)}; blank if there are none. Options are "
            "compared by paired t-tests, adjusted for those of this plan only."
        )
    return notes


def drawn_words(plan: Plan) -> str:
    """State in which share of the rounds a client takes part, in brackets after a space, unless it is all."""
    config = plan.config
    drawn = config.cohort_size / config.partition.clients * (1 - config.federation.dropout)
    return f" (here a client takes part in about {round_percent(drawn)} of them)" if drawn < 1 else ""


def seeds_words(plan: Plan) -> str:
    """Name the seeds over which accuracies are means."""
    measured = [option.measured for option in plan.options if option.measured]
    seeds = sorted(measured[0].seeds) if measured else []
    if not seeds:
        return "seeds"
    return f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"


def unranked_note(plan: Plan) -> str:
    """Explain the mark of accuracies that are not over these seeds, with a semicolon before it, if there are any."""
    unranked = any(option.measured and not option.measured.ranked for option in plan.options)
    return "; ?: without a run for each of these seeds, and not ranked" * unranked


def fleet_notes(plan: Plan) -> list[str]:
    """State what processes need before any model, and that a run has other numbers of clients than devices, if so."""
    clients, devices = plan.config.partition.clients, sum(device.count for device in plan.devices)
    notes = list[str]()
    if needs := [f"{d.name} {d.baseline_gb:.3g} of {d.memory_gb:.3g} GB" for d in plan.devices if d.baseline_gb]:
        notes.append(
            f"Before any model, a process needs (baseline_gb): {', '.join(needs)}. The memory shown is what is left."
        )
    if devices not in (1, clients):  # a single device stands for all
        notes.append(
            f"The fleet has {devices:,} devices, and a run with this config has {count_of(clients, 'client')} "
            "(partition.clients), which stand for them: each class has its share of the clients. Shares of clients and "
            "images are those of the run."
        )
    return notes


def by_own_runs(plan: Plan) -> bool:
    """Return whether the recommended option is ranked by accuracies of the user's own runs, not by published ones."""
    return bool(plan.recommendation.option and plan.recommendation.option.ranked)


def published_note(plan: Plan, most: int = 6) -> str:
    """State what the published accuracies are of, and in which settings this config differs from the paper's."""
    differ = unlike(plan.config, plan.published)
    estimates = (
        "; ~: estimated from it, by adding what more layers per stage gain with mocov3 and all clients"
        if any(option.estimated for option in plan.options)
        else ""
    )
    more = f" and {len(differ) - most} more" if len(differ) > most else ""
    return (
        f"paper: accuracy in arXiv 2401.11647 (without a spread there), {plan.published.measured_on}{estimates}."
        f"{own_study(plan)} Unlike there, this config has {', '.join(differ[:most])}{more}. Accuracies of your own "
        "runs (--results) count more."
    )


def own_study(plan: Plan) -> str:
    """State what a study of ours found against the published accuracies, with a space before it, if there is one."""
    study = plan.published.own_study
    return f" {study[0].upper()}{study[1:]}." if study else ""


def schedule_notes(plan: Plan) -> list[str]:
    """State what the options assume about the rounds of their stages, where that is not what the config says."""
    strategy, notes = plan.config.strategy, []
    evenly = [option.name for option in plan.options if not option.remat and not _rounds_fit(plan, option)]
    if evenly:
        notes.append(even_rounds(plan.config, evenly))
    if strategy.pacing == "adaptive":
        notes.append(ADAPTIVE_COSTS)
    return notes


def _rounds_fit(plan: Plan, option: Option) -> bool:
    changes = {"strategy.name": option.strategy, "strategy.layers_per_stage": option.layers_per_stage}
    return rounds_fit(override(plan.config, changes))


def _options_table(plan: Plan, *, energy: bool, spread: bool) -> Table:
    memory, traffic = (
        byte_unit(max(sizes))
        for sizes in (
            [option.ledger["peak_memory_bytes"] for option in plan.options],
            [option.traffic_bytes for option in plan.options],
        )
    )
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("strategy", no_wrap=True)
    shown.add_column("k", justify="right", no_wrap=True)
    shown.add_column("re-\nmat", no_wrap=True)
    divisor, unit = time_column(plan)
    classes = [_device_head(device, unit, energy=energy) for device in plan.devices]
    heads = [f"memory\n{memory[1]}", "fleet\n%", *classes, f"traf-\nfic\n{traffic[1]}"]
    heads += ["acc.\n%"] if plan.results.protocol else ["pa-\nper\n%"]
    for head in heads:
        shown.add_column(head, justify="right", no_wrap=True)
    for option, following in zip(plan.options, [*plan.options[1:], None], strict=True):
        peaks = [row["peak_memory_bytes"] for row in option.ledger["per_stage"]]
        recommended = option is plan.recommendation.option
        mark = "→ " if recommended else "* " if option in plan.recommendation.frontier else "  "
        shown.add_row(
            f"{mark}{option.strategy}",
            str(option.layers_per_stage),
            "yes" if option.remat else "",
            _range(*(short_number(peak / memory[0]) for peak in (peaks[0], max(peaks)))),
            _range(*(f"{100 * share:.0f}" for share in (option.shares[0], option.everywhere))),
            *(_cell(part, option.ledger, divisor, energy=energy) for part in option.parts),
            short_number(option.traffic_bytes / traffic[0]),
            accuracy_cell(option, plan, spread=spread),
            style="bold reverse" if recommended else "",
            end_section=following is not None and following.strategy != option.strategy,
        )
    return shown


def _device_head(device: DeviceClass, unit: str, *, energy: bool) -> str:
    size = max(device.step_gb, 0)
    memory = f"{size:.3g} GB" if size >= 0.1 else f"{1000 * size:.3g} MB"
    watt_hours = " / Wh" if energy and device.watts is not None else ""
    return escape(f"{device.name}\n{device.count:,} x\n{memory}" + f"\n{unit}{watt_hours}" * device.has_speed)


def accuracy_cell(option: Option, plan: Plan, *, spread: bool) -> str:
    """Return an option's accuracy in %: measured if the plan has results, otherwise published, "~" if estimated."""
    if not plan.results.protocol:
        return "" if option.published is None else f"{'~' * option.estimated}{100 * option.published:.1f}"
    if not option.measured:
        return ""
    std = "" if not spread or math.isnan(option.measured.std) else f"±{100 * option.measured.std:.1f}"
    return f"{'?' * (not option.measured.ranked)}{100 * option.measured.accuracy:.1f}{std}"


def _cell(part: Participation, ledger: Ledger, divisor: float, *, energy: bool) -> str:
    """Describe a class under an option as markup: its time and energy, or whom it leaves out."""
    words = class_words(part, len(ledger["per_stage"]), divisor, energy=energy)
    return words if part.everywhere == 1 else f"[red]{words}[/]"


def time_column(plan: Plan) -> tuple[float, str]:
    """Return the divisor and the name of the unit in which all times of a plan's table are."""
    parts = [part for option in plan.options for part in option.parts]
    return time_unit([part.seconds for part in parts if part.seconds and part.everywhere == 1])


def class_words(part: Participation, stages: int, divisor: float, *, energy: bool) -> str:
    """Describe a class under an option: its time and energy, or the share of its clients, or where it is out."""
    if len(part.stages) < stages:
        return fleet.stages_text(part.stages, stages).replace("from ", "≥")
    if part.everywhere < 1:
        return round_percent(part.everywhere)
    if part.seconds is None:
        return "yes"
    watt_hours = f" / {short_number(part.energy_wh)}" if energy and part.energy_wh is not None else ""
    return f"{short_number(part.seconds / divisor)}{watt_hours}"


def _range(first: str, last: str) -> str:
    return first if first == last else f"{first}→{last}"


def demand(device: DeviceClass, part: Participation, option: Option) -> str:
    """Describe what the option requires of the class's slowest client."""
    if not part.stages:
        return f"{device.name}: does not take part."
    demands = []
    if part.round_seconds and part.seconds:
        slowest = max(part.round_seconds[stage - 1] for stage in part.stages)
        rounds = sum(row["rounds"] for row in option.ledger["per_stage"] if row["stage"] in part.stages)
        demands.append(f"up to {time_words(slowest)} per round, {time_words(part.seconds)} for its {rounds} rounds")
    demands.append(f"{bytes_words(part.traffic_bytes)} of traffic")
    if part.energy_wh is not None:
        demands.append(f"{short_number(part.energy_wh)} Wh")
    if part.everywhere < 1:
        demands.append(f"{round_percent(part.everywhere)} of its clients throughout")
    return f"{device.name}: {', '.join(demands)}."


def to_plain(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain data for JSON, with units in the keys."""
    chosen = plan.recommendation
    return {
        "config": to_dict(plan.config),
        "devices": [dataclasses.asdict(device) for device in plan.devices],
        "examples_of_a_client": plan.clients.mean,
        "clients": clients_to_plain(plan.clients),
        "protocol": plan.results.protocol or None,
        "results_on_this_fleet": plan.results.on_fleet,
        "published": {
            "measured_on": plan.published.measured_on,
            "unlike_this_config": unlike(plan.config, plan.published),
        },
        "options": [_plain_option(option, plan) for option in plan.options],
        "refused": plan.refused,
        "recommended": _plain_name(chosen.option),
        "reason": chosen.reason,
        "step_up": _plain_name(chosen.up),
        "step_down": _plain_name(chosen.down),
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _plain_name(option: Option | None) -> dict[str, Any] | None:
    if option is None:
        return None
    return {"strategy": option.strategy, "layers_per_stage": option.layers_per_stage, "remat": option.remat}


def _plain_option(option: Option, plan: Plan) -> dict[str, Any]:
    stages = len(option.ledger["per_stage"])
    return {
        "strategy": option.strategy,
        "layers_per_stage": option.layers_per_stage,
        "remat": option.remat,
        "on_frontier": option in plan.recommendation.frontier,
        "share_every_stage": option.everywhere,
        "share_first_stage": option.shares[0],
        "share_by_stage": option.shares,
        "left_out_by_stage": [
            {"clients": left.clients, "clients_share": left.share, "images_share": left.images} for left in option.left
        ],
        "peak_memory_bytes": option.ledger["peak_memory_bytes"],
        "seconds": option.seconds or None,
        "traffic_bytes": option.traffic_bytes,
        "energy_wh": option.energy_wh or None,
        "flops_executed_a_sample": option.ledger["flops_executed"],
        "published_accuracy": option.published,
        "accuracy": option.measured.accuracy if option.measured else None,
        "accuracy_by_seed": option.measured.by_seed if option.measured else {},
        "accuracy_ranked": option.measured.ranked if option.measured else None,
        "untrained_accuracy": _number(option.measured.untrained_accuracy) if option.measured else None,
        "classes": [
            {
                "name": device.name,
                "stages": part.stages,
                "says": fleet.stages_text(part.stages, stages),
                "share_by_stage": part.shares,
                "share_every_stage": part.everywhere,
                "round_seconds_by_stage": part.round_seconds,
                "slowest_round_seconds": max(part.round_seconds) if part.round_seconds else None,
                "seconds": part.seconds,
                "traffic_bytes": part.traffic_bytes,
                "energy_wh": part.energy_wh,
            }
            for device, part in zip(plan.devices, option.parts, strict=True)
        ],
        "per_stage": option.ledger["per_stage"],
        **({"privacy": option.privacy._asdict()} if option.privacy else {}),
    }
