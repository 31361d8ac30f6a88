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
    short_number,
    time_words,
)
from lwfedssl_jax.config import override, to_dict
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.costs import fleet
from lwfedssl_jax.costs.fleet import Participation
from lwfedssl_jax.costs.ledger import Ledger
from lwfedssl_jax.method.stages import ADAPTIVE_COSTS, even_rounds, rounds_fit
from lwfedssl_jax.plan.make import Plan
from lwfedssl_jax.plan.options import Option


def table(plan: Plan, width: int) -> Group:
    """Show the plan on a screen of ``width`` columns: the options, the recommendation, what it requires of each class.

    Energy and the spread over seeds are shown only if there is enough space: energy with the time, the spread
    with the accuracy.
    """
    for energy, spread in ((True, True), (False, True), (False, False)):
        options = _options_table(plan, energy=energy, spread=spread)
        if Console(width=1000).measure(options).maximum <= width:
            break
    config = plan.config
    options.title = (
        f"{config.model.name}, {config.objective.name}: {count_of(config.federation.rounds, 'round')}, "
        f"{count_of(config.federation.local_epochs, 'local epoch')} of {plan.examples:,.0f} images per client, "
        f"batch {config.optimizer.batch_size}"
    )
    conclusions = [plan.reason]
    if best := plan.recommended:
        conclusions += [_demand(device, part, best) for device, part in zip(plan.devices, best.parts, strict=True)]
    notes = (f"[dim]{escape(note)}[/]" for note in _notes(plan, spread=spread))
    return Group(options, *notes, "", *map(escape, conclusions))


def _notes(plan: Plan, *, spread: bool) -> list[str]:
    """Explain what the table's columns mean, and which options are missing."""
    columns = (
        "k: layers per stage. remat: with runtime.remat. memory: peak of a training step in the first stage → in the "
        f"stage that needs most, by the compiler for {jax.devices()[0].device_kind}. fleet: devices that can take part "
        "in the first stage → in every stage. out ≥s: cannot take part from stage s on."
    )
    if any(device.has_speed for device in plan.devices):
        columns += " Times: of a device that takes part in every round."
    notes = [
        columns,
        *_schedule_notes(plan),
        *(f"{name} cannot run with this config: {why}" for name, why in plan.refused.items()),
    ]
    if plan.results.protocol:
        where = "on this fleet" if plan.results.on_fleet else "in which all clients take part throughout"
        several = spread and any(o.measured and len(o.measured.by_seed) > 1 for o in plan.options)
        notes.append(
            f"acc.: accuracy by {protocol_words(plan.results.protocol)}, mean{' ± standard deviation' * several} over "
            f"seeds, of runs {where}; blank if there are none."
        )
    return notes


def _schedule_notes(plan: Plan) -> list[str]:
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
        byte_unit(max(option.ledger[key] for option in plan.options)) for key in ("peak_memory_bytes", "total_bytes")
    )
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.add_column("strategy", no_wrap=True)
    shown.add_column("k", justify="right", no_wrap=True)
    shown.add_column("re-\nmat", no_wrap=True)
    heads = [f"memory\n{memory[1]}", "fleet\n%", *map(_device_head, plan.devices), f"traf-\nfic\n{traffic[1]}"]
    heads += ["acc.\n%"] if plan.results.protocol else []
    for head in heads:
        shown.add_column(head, justify="right", no_wrap=True)
    for option, following in zip(plan.options, [*plan.options[1:], None], strict=True):
        peaks = [row["peak_memory_bytes"] for row in option.ledger["per_stage"]]
        recommended = option is plan.recommended
        shown.add_row(
            f"{'→ ' if recommended else ''}{option.strategy}",
            str(option.layers_per_stage),
            "yes" if option.remat else "",
            _range(*(short_number(peak / memory[0]) for peak in (peaks[0], max(peaks)))),
            _range(*(f"{100 * share:.0f}" for share in (option.shares[0], option.everywhere))),
            *(_cell(part, option.ledger, energy=energy) for part in option.parts),
            short_number(option.ledger["total_bytes"] / traffic[0]),
            *([_accuracy(option, spread=spread)] if plan.results.protocol else []),
            style="bold reverse" if recommended else "",
            end_section=following is not None and following.strategy != option.strategy,
        )
    return shown


def _device_head(device: DeviceClass) -> str:
    memory = f"{device.memory_gb:.3g} GB" if device.memory_gb >= 0.1 else f"{1000 * device.memory_gb:.3g} MB"
    return escape(f"{device.name}\n{device.count:,} x\n{memory}")


def _accuracy(option: Option, *, spread: bool) -> str:
    if not option.measured:
        return ""
    std = "" if not spread or math.isnan(option.measured.std) else f"±{100 * option.measured.std:.1f}"
    return f"{100 * option.measured.accuracy:.1f}{std}"


def _cell(part: Participation, ledger: Ledger, *, energy: bool) -> str:
    """Describe a class under an option: its time and energy, or the stage from which it cannot take part."""
    stages = len(ledger["per_stage"])
    if len(part.stages) < stages:
        return f"[red]{fleet.stages_text(part.stages, stages).replace('from ', '≥')}[/]"
    if part.seconds is None:
        return "yes"
    watt_hours = f" {short_number(part.energy_wh)} Wh" if energy and part.energy_wh is not None else ""
    return f"{time_words(part.seconds)}{watt_hours}"


def _range(first: str, last: str) -> str:
    return first if first == last else f"{first}→{last}"


def _demand(device: DeviceClass, part: Participation, option: Option) -> str:
    """Describe what the option requires of a device."""
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
    return f"{device.name}: {', '.join(demands)}."


def to_plain(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain data for JSON, with units in the keys."""
    return {
        "config": to_dict(plan.config),
        "devices": [dataclasses.asdict(device) for device in plan.devices],
        "examples_of_a_client": plan.examples,
        "protocol": plan.results.protocol or None,
        "results_on_this_fleet": plan.results.on_fleet,
        "options": [_plain_option(option, plan.devices) for option in plan.options],
        "refused": plan.refused,
        "recommended": plan.options.index(plan.recommended) if plan.recommended else None,
        "reason": plan.reason,
    }


def _plain_option(option: Option, devices: list[DeviceClass]) -> dict[str, Any]:
    return {
        "strategy": option.strategy,
        "layers_per_stage": option.layers_per_stage,
        "remat": option.remat,
        "share_every_stage": option.everywhere,
        "share_first_stage": option.shares[0],
        "share_by_stage": option.shares[:-1],
        "peak_memory_bytes": option.ledger["peak_memory_bytes"],
        "traffic_bytes": option.ledger["total_bytes"],
        "flops_executed_a_sample": option.ledger["flops_executed"],
        "accuracy": option.measured.accuracy if option.measured else None,
        "accuracy_by_seed": option.measured.by_seed if option.measured else {},
        "classes": [
            {
                "name": device.name,
                "stages": part.stages,
                "says": fleet.stages_text(part.stages, len(option.ledger["per_stage"])),
                "round_seconds_by_stage": part.round_seconds,
                "slowest_round_seconds": max(part.round_seconds) if part.round_seconds else None,
                "seconds": part.seconds,
                "traffic_bytes": part.traffic_bytes,
                "energy_wh": part.energy_wh,
            }
            for device, part in zip(devices, option.parts, strict=True)
        ],
        "per_stage": option.ledger["per_stage"],
    }
