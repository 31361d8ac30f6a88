"""A plan as tables and as JSON."""

import dataclasses
import math
from typing import Any

import jax
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from lwfedssl_jax.analysis.wording import protocol_words, short_number, time_text, unit_text
from lwfedssl_jax.config import to_dict
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.costs import fleet
from lwfedssl_jax.costs.fleet import Participation
from lwfedssl_jax.costs.ledger import Ledger
from lwfedssl_jax.plan.make import Plan
from lwfedssl_jax.plan.options import Option


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
    memory, traffic = (unit_text(max(o.ledger[key] for o in options)) for key in ("peak_memory_bytes", "total_bytes"))
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
            _range(*(short_number(peak / memory[0]) for peak in (peaks[0], max(peaks)))),
            _range(*(f"{100 * share:.0f}" for share in (option.shares[0], option.everywhere))),
            *(_cell(part, option.ledger, energy=energy) for part in option.parts),
            short_number(option.ledger["total_bytes"] / traffic[0]),
            *([accuracy] if protocol else []),
            style="bold reverse" if option is plan.recommended else "",
            end_section=following is not None and following.strategy != option.strategy,
        )
    return shown


def _demand(device: DeviceClass, part: Participation, option: Option) -> str:
    """What the option asks of a device."""
    if not part.stages:
        return f"{device.name}: takes no part."
    rounds = sum(row["rounds"] for row in option.ledger["per_stage"] if row["stage"] in part.stages)
    asked = [
        f"{short_number(part.traffic_bytes / size)} {unit} of traffic" for size, unit in [unit_text(part.traffic_bytes)]
    ]
    if part.round_seconds and part.seconds:
        most = max(part.round_seconds[stage - 1] for stage in part.stages)
        asked.insert(0, f"up to {time_text(most)} a round, {time_text(part.seconds)} for its {rounds} rounds")
    if part.energy_wh is not None:
        asked.append(f"{short_number(part.energy_wh)} Wh")
    return f"{device.name}: {', '.join(asked)}."


def _cell(part: Participation, ledger: Ledger, *, energy: bool) -> str:
    """What a class does in an option: its time and energy, or from which stage on it is out."""
    stages = len(ledger["per_stage"])
    if len(part.stages) < stages:
        return f"[red]{fleet.stages_text(part.stages, stages).replace('from ', '≥')}[/]"
    if part.seconds is None:
        return "yes"
    return time_text(part.seconds) + (
        f" {short_number(part.energy_wh)} Wh" if energy and part.energy_wh is not None else ""
    )


def _range(first: str, last: str) -> str:
    return first if first == last else f"{first}→{last}"


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
                    "says": fleet.stages_text(part.stages, len(of.ledger["per_stage"])),
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
