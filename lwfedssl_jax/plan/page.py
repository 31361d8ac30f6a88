"""Writes the page of a plan, for whoever decides: it needs no other file and no network."""

import base64
import json
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from lwfedssl_jax import __version__
from lwfedssl_jax.analysis.style import save_with_svg
from lwfedssl_jax.analysis.wording import (
    byte_unit,
    bytes_words,
    count_of,
    percent,
    protocol_words,
    round_percent,
    short_number,
    time_words,
)
from lwfedssl_jax.config import flat, to_dict
from lwfedssl_jax.plan.clients import left_words
from lwfedssl_jax.plan.make import Plan
from lwfedssl_jax.plan.options import Option
from lwfedssl_jax.plan.plot import choice_figures
from lwfedssl_jax.plan.published import unlike
from lwfedssl_jax.plan.recommend import NONE_BEATS_UNTRAINED, beats_untrained, missing_for, step_words
from lwfedssl_jax.plan.show import (
    accuracy_cell,
    by_own_runs,
    class_words,
    demand,
    drawn_words,
    fleet_notes,
    own_study,
    privacy_notes,
    schedule_notes,
    seeds_words,
    time_column,
    title,
    to_plain,
    unranked_note,
)
from lwfedssl_jax.system.files import write_whole
from lwfedssl_jax.system.program import program

TEMPLATE = Path(__file__).with_name("plan.html.j2")
PAGE, PLAIN = "plan.html", "plan.json"
FIGURES = ("accuracy_against_cost", "accuracy_against_memory")
WHAT = {
    "layerwise": "Train the encoder stage by stage, and freeze the layers of earlier stages",
    "progressive": "Let the encoder grow stage by stage, and train all layers that exist so far",
    "end_to_end": "Train the whole encoder in all rounds",
}


def write_page(plan: Plan, out: Path, command: Sequence[str]) -> Path:
    """Write ``plan.html``, its figures and ``plan.json`` to a folder.

    Args:
      plan: to show.
      out: the folder, which may not exist yet.
      command: words after ``plan`` that made it.

    Returns:
      The path of the page.

    Raises:
      OSError: something cannot be written.
    """
    import jinja2

    pictures = [save_with_svg(figure, out, name) for figure, name in zip(choice_figures(plan), FIGURES, strict=True)]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    content = compose(plan, command) | {
        "figures": [f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for svg in pictures]
    }
    write_whole(out / PLAIN, f"{json.dumps(to_plain(plan), indent=1)}\n".encode())
    page = out / PAGE
    write_whole(
        page, environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(content).encode(errors="replace")
    )
    return page


def compose(plan: Plan, command: Sequence[str]) -> dict[str, Any]:
    """Make the content for the template, except for the figures."""
    chosen = plan.recommendation
    best = chosen.option
    steps = (("A step up", chosen.up), ("A step down", chosen.down))
    return {
        "version": __version__,
        "title": title(plan),
        "best": best,
        "sentences": sentences(plan, best) if best else [chosen.reason],
        "steps": [(name, step_words(option, best, plan.devices)) for name, option in steps if option and best],
        "reason": chosen.reason.removeprefix(f"{NONE_BEATS_UNTRAINED} "),  # that stands above
        "columns": columns(plan),
        "rows": [row(option, plan) for option in plan.options],
        "classes": [(device, class_sentences(plan, number)) for number, device in enumerate(plan.devices)],
        "assumed": list(assumed(plan)),
        "protocol": by_own_runs(plan) and protocol_words(plan.results.protocol),
        "seeds": f"mean over {seeds_words(plan)}{unranked_note(plan)}",
        "measured_on": plan.published.measured_on,
        "own_study": own_study(plan),
        "differing": unlike(plan.config, plan.published),
        "commands": [
            shlex.join([*program(), "plan", *command]),
            *([train_command(plan, best, command)] if best else []),
        ],
    }


def sentences(plan: Plan, best: Option) -> list[str]:
    """The recommendation in three sentences: what, for whom, and for how much; before them, if nothing has learnt."""
    what = WHAT.get(best.strategy, f"Train by the strategy {best.strategy}")
    accuracy = (
        f"measured accuracy: {best.ranked.words}"
        if best.ranked
        else "accuracy unknown"
        if best.published is None
        else f"published accuracy {percent(best.published)} on other data"
        if not best.estimated
        else f"accuracy of about {percent(best.published)} as estimated from published ones on other data"
    )
    growth = f", {count_of(best.layers_per_stage, 'new layer')} per stage" if len(best.ledger["per_stage"]) > 1 else ""
    remat = ", and recompute activations to save memory (runtime.remat)" if best.remat else ""
    who = "All clients" if best.everywhere == 1 else f"{round_percent(best.everywhere)} of the clients"
    traffic = f"{bytes_words(best.traffic_bytes)} of traffic"
    of_class = zip(plan.devices, best.parts, strict=True)
    unknown = [device.name for device, part in of_class if part.stages and part.energy_wh is None]
    without = f" (not known for {', '.join(unknown)})" if unknown else ""
    spent = f"{traffic} and up to {short_number(best.energy_wh)} Wh{without}" if best.energy_wh else traffic
    time = f"The whole run takes {time_words(best.seconds)}, with" if best.seconds else "It costs"
    left = f"; left out: {left_words(best.left, plan.clients.dealt)}" if any(s.clients for s in best.left) else ""
    drawn = drawn_words(plan)
    warning = [NONE_BEATS_UNTRAINED] * (beats_untrained(plan.options) is False)
    return [
        *warning,
        f"{what}{growth}{remat} ({accuracy}).",
        f"{who} can take part in every stage, which needs up to {bytes_words(best.ledger['peak_memory_bytes'])} of "
        f"memory for a training step{left}.",
        f"{time} {spent} per device{f' that takes part in every round{drawn}' if drawn else ''}.",
    ]


def columns(plan: Plan) -> list[str]:
    """The heads of the table, each with its unit."""
    memory, traffic = units(plan)
    heads = ["strategy", "layers per stage", "remat", f"peak memory ({memory[1]})", "clients in every stage (%)"]
    unit = time_column(plan)[1]
    heads += [
        f"{device.name}, {device.count:,} x {device.step_gb:.3g} GB{f' ({unit})' * device.has_speed}"
        for device in plan.devices
    ]
    accuracy = "accuracy (%)" if plan.results.protocol else "published accuracy (%), ~: estimated"
    energy = ["energy per device (Wh)"] if knows_energy(plan) else []
    return [*heads, f"traffic per device ({traffic[1]})", *energy, accuracy]


def knows_energy(plan: Plan) -> bool:
    """Whether the energy of an option is known."""
    return any(option.energy_wh for option in plan.options)


def units(plan: Plan) -> list[tuple[float, str]]:
    """The units of memory and of traffic."""
    peaks = max(option.ledger["peak_memory_bytes"] for option in plan.options)
    return [byte_unit(peaks), byte_unit(max(option.traffic_bytes for option in plan.options))]


def row(option: Option, plan: Plan) -> dict[str, Any]:
    """An option's row of the table."""
    memory, traffic = units(plan)
    stages = len(option.ledger["per_stage"])
    cells = [
        str(option.layers_per_stage),
        "yes" if option.remat else "",
        short_number(option.ledger["peak_memory_bytes"] / memory[0]),
        round_percent(option.everywhere).removesuffix(" %"),
        *(class_words(part, stages, time_column(plan)[0], energy=False) for part in option.parts),
        short_number(option.traffic_bytes / traffic[0]),
    ]
    if knows_energy(plan):
        cells.append(short_number(option.energy_wh) if option.energy_wh and option.everywhere else "")
    cells.append(accuracy_cell(option, plan, spread=True))
    return {
        "name": option.strategy,
        "cells": cells,
        "chosen": option is plan.recommendation.option,
        "frontier": option in plan.recommendation.frontier,
        "out": option.everywhere < 1,
    }


def class_sentences(plan: Plan, number: int) -> list[str]:
    """What the recommended option requires of a class, or what the class lacks."""
    best = plan.recommendation.option
    if best is None or not best.parts[number].everywhere:
        return [missing_for(plan.config, plan.devices[number], number, plan.options)]
    return [demand(plan.devices[number], best.parts[number], best)]


def assumed(plan: Plan) -> list[str]:
    """What the plan takes for granted or does not know."""
    config, device = plan.config, jax.devices()[0]
    how = (
        "They are the clients that a run with this config deals out, each with its own images."
        if plan.clients.dealt
        else f"They are as given: --examples {plan.clients.given}, the same for each class of devices. A run of this "
        "config deals out its own images, and may leave out other clients."
    )
    sizes = ", ".join(f"{name} {size:,.0f}" for name, size in plan.clients.quantiles.items())
    slow = [device.name for device in plan.devices if not device.has_speed]
    lacking = f" Some of gflops, uplink_mbps and downlink_mbps are not known for {', '.join(slow)}, nor is its time."
    speed = [
        "Time is download, training and upload after each other, at the speeds given for each class, without idle "
        "time; a round is as long as its slowest client takes. Speeds are not measured: gflops is what a device "
        "sustains." + lacking * bool(slow)
        if any(device.has_speed for device in plan.devices)
        else "Time is unknown: no class has all of gflops, uplink_mbps and downlink_mbps."
    ]
    drawn = drawn_words(plan)
    deadline = config.fleet.deadline_seconds
    late = f"A client that needs more than {deadline:g} s for a round (fleet.deadline_seconds) is left out."
    return [
        f"{plan.clients.number:,.0f} clients with {plan.clients.words} ({sizes}). {how}",
        f"Memory is what the compiler reports for one training step on {device.device_kind}. It was not "
        "measured on these devices. What the process itself needs, with JAX and its compiler, comes on top for classes "
        "without baseline_gb.",
        *speed,
        *([late] if deadline else []),
        *([f"Costs are of a device that takes part in every round{drawn}."] if drawn else []),
        "Traffic is 4 bytes per parameter in both directions, with what a device downloads when a stage begins; "
        "protocols and encryption come on top.",
        *fleet_notes(plan),
        *privacy_notes(plan),
        *schedule_notes(plan),
        *(f"{name} cannot run with this config: {why}" for name, why in plan.refused.items()),
    ]


def train_command(plan: Plan, best: Option, command: Sequence[str]) -> str:
    """The command that trains the recommended option on the plan's fleet."""
    ours, theirs = (flat(to_dict(config)) for config in (best.config, plan.config))
    changes = {name: value for name, value in ours.items() if value != theirs[name]}
    changes |= {name: ours[name] for name in ("strategy.name", "fleet.devices")}
    words = [*program(), "train", *config_words(command, changes)]
    for name, value in changes.items():
        words += [option_name(name), *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def config_words(command: Sequence[str], without: Iterable[str]) -> list[str]:
    """The words of a command that belong to its config, its name and ``--section.field`` options, ``without`` some."""
    left_out, kept, keep = set(map(option_name, without)), list(command[:1]), False
    for word in command[1:]:
        if word.startswith("--"):
            name = word.partition("=")[0].replace("_", "-")
            keep = "." in name and name not in left_out
        if keep:
            kept.append(word)
    return kept


def option_name(field: str) -> str:
    """The option of the command line that sets a config field."""
    return f"--{field.replace('_', '-')}"
