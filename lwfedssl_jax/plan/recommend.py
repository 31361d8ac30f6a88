"""The recommendation of a plan, and the reasons for it."""

import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from lwfedssl_jax.analysis.statistics import CHANCE, Difference, adjust, compare
from lwfedssl_jax.analysis.wording import (
    bytes_words,
    count_of,
    percent,
    protocol_words,
    round_percent,
    short_number,
    time_words,
)
from lwfedssl_jax.config import Config
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.plan.clients import left_words
from lwfedssl_jax.plan.frontier import accuracy_of, comparable, frontier, step
from lwfedssl_jax.plan.measured import Measured, Results
from lwfedssl_jax.plan.options import Option
from lwfedssl_jax.plan.published import Published

MAX_RIVALS = 2  # largest number of options to name that the recommended one is not shown to be better than
NONE_BEATS_UNTRAINED = "No measured option is more accurate than its untrained encoder."
SAME = 0.005  # share of a cost up to which it is called the same

Aim = Literal["devices", "accuracy", "cheapest"]  # what is put first


class Recommendation(NamedTuple):
    """The outcome of a plan.

    Attributes:
      option: to choose, or None if no class can take part throughout in any.
      reason: why, in sentences.
      frontier: of all options (``frontier.frontier``).
      up, down: the options of the frontier that are next in accuracy, if any.
    """

    option: Option | None
    reason: str
    frontier: list[Option]
    up: Option | None = None
    down: Option | None = None


def recommend(
    config: Config,
    devices: Sequence[DeviceClass],
    options: Sequence[Option],
    results: Results,
    published: Published,
    aim: Aim = "devices",
    dealt: bool = False,
) -> Recommendation:
    """Choose an option (``choose_option``), and give the reasons.

    Args:
      config: resolved, with the fleet.
      devices: its classes.
      options: of the plan.
      results: measured accuracies.
      published: the paper's accuracies.
      aim: what is put first.
      dealt: as in ``Clients``.
    """
    best, on_frontier = choose_option(options, aim), frontier(options)
    if best is None:
        lacking = (missing_for(config, device, number, options) for number, device in enumerate(devices))
        reason = " ".join(["No class can take part in every stage of any option.", *lacking])
        return Recommendation(None, reason, on_frontier)
    reason = " ".join(reasons(best, config, devices, options, results, published, aim, dealt))
    up, down = (step(on_frontier, best, up=up) for up in (True, False))
    return Recommendation(best, reason, on_frontier, up, down)


def choose_option(options: Sequence[Option], aim: Aim = "devices") -> Option | None:
    """Choose one of the options that the aim allows.

    By default, these are the options in which the largest share of the clients can take part in every stage, and the
    one with the highest measured accuracy is chosen if any of them is measured, otherwise the one with the highest
    published accuracy (``published``). Among equals it is the one that takes the least time, then the least traffic,
    then the fewest operations. For ``accuracy``, all options count in which any client can take part in every stage,
    and the share decides among equals. For ``cheapest``, time, traffic and operations decide before accuracy. None if
    no client can take part in every stage of any option.
    """
    candidates = fitting_options(options, aim)

    def rank(option: Option) -> tuple[float, ...]:
        accuracy, (share, *costs) = -accuracy_of(option), among_equals(option).values()
        return (*costs, accuracy) if aim == "cheapest" else (accuracy, share, *costs)

    if aim == "cheapest":
        return min(candidates, key=rank, default=None)
    return min(comparable(candidates) or candidates, key=rank, default=None)


def among_equals(option: Option) -> dict[str, float]:
    """Return what decides between options of one accuracy, in order, as words and what an option should have little of.

    The first entry decides only where options with unequal shares of the clients are compared.
    """
    return {
        "most clients can take part in it": -option.everywhere,
        "it takes the least time": option.seconds,
        "it takes the least traffic": option.traffic_bytes,
        "it takes the fewest operations": option.ledger["flops_executed"],
    }


def fitting_options(options: Sequence[Option], aim: Aim = "devices") -> list[Option]:
    """Return the options in which the largest share of the clients can take part in every stage, if any can.

    With the aim ``accuracy``, these are all in which any client can.
    """
    most = max(option.everywhere for option in options)
    return [o for o in options if o.everywhere and (aim == "accuracy" or o.everywhere == most)]


def reasons(
    best: Option,
    config: Config,
    devices: Sequence[DeviceClass],
    options: Sequence[Option],
    results: Results,
    published: Published,
    aim: Aim,
    dealt: bool,
) -> Iterator[str]:
    """Explain why an option is recommended, what it is not shown to be better than, and which classes it leaves out."""
    most = ", the most that any option reaches," * (best.everywhere == max(o.everywhere for o in options))
    share = f"{round_percent(best.everywhere)} of the clients{most}"
    beats = beats_untrained(options)
    if beats is False:
        yield NONE_BEATS_UNTRAINED
    yield f"{best.name}: {'all clients' if best.everywhere == 1 else share} can take part in every stage."
    fitting = fitting_options(options, aim)
    if len(fitting) > 1:
        which = "in which any client can" if aim == "accuracy" else "with this share"
        by_accuracy = best.ranked and aim != "cheapest"
        of = count_of(len(comparable(fitting)), "measured option") if by_accuracy else f"{len(fitting)} options"
        rest = len(fitting) - len(comparable(fitting)) if by_accuracy else 0
        without = f" (without a rank: {rest})" if rest else ""
        yield f"Of the {of} {which}{without}, {_advantage(best, fitting, results.protocol, published, aim)}."
    if rivals := unresolved_rivals(best, fitting, results.protocol):
        more = f", and {len(rivals) - MAX_RIVALS} more" if len(rivals) > MAX_RIVALS else ""
        yield f"It is not shown to be better than {'; '.join(map(_rival_words, rivals[:MAX_RIVALS]))}{more}."
    if unranked := _unranked_words(options):
        yield unranked
    if beats and best.ranked and best.ranked.gain <= 0:
        yield "It is not more accurate than its own untrained encoder, as others are."
    if best.ranked:
        yield from _shallow_words(best.ranked, results)
    without_remat = [option for option in options if not option.remat]
    if best.remat and without_remat:
        other = choose_option(without_remat, aim)
        unmeasured = " (not measured)" * bool(best.ranked and other and not other.ranked)
        found = other and f"the choice is {other.name}{unmeasured}, {round_percent(other.everywhere)} of the clients"
        yield f"Without runtime.remat, {found or 'nothing fits'}."
    for number, part in enumerate(best.parts):
        if not part.everywhere:
            yield missing_for(config, devices[number], number, options)
    if any(left.clients for left in best.left):
        yield f"Left out: {left_words(best.left, dealt)}."


def _advantage(best: Option, fitting: Sequence[Option], protocol: str, published: Published, aim: Aim) -> str:
    least = "time" if best.seconds else "traffic"
    if aim == "cheapest":
        return f"it takes the least {least}"
    if best.ranked:
        found = f"it has the highest measured accuracy ({protocol_words(protocol)}; {best.ranked.words})"
    elif best.published is None:
        return f"none has a known accuracy, and it takes the least {least}"
    else:
        unknown = f"; none of them is ranked by {protocol_words(protocol)}" if protocol else ""
        what = "accuracy as estimated from published ones" if best.estimated else "published accuracy"
        doubt = f"; {published.own_study}" if published.own_study else ""
        source = f"arXiv 2401.11647, on other data{doubt}"
        found = f"it has the highest {what}, {percent(best.published)} ({source}){unknown}"
    equal = [option for option in comparable(fitting) if accuracy_of(option) == accuracy_of(best)]
    differ = (words for words, own in among_equals(best).items() if any(among_equals(o)[words] != own for o in equal))
    decisive = next(differ, "")
    return f"{found}; among equals {decisive}" if decisive else found


def _shallow_words(best: Measured, results: Results) -> Iterator[str]:
    """Compare an option's accuracies with those of the shallow controls among the results, over common seeds."""
    for depth, control in results.shallow.items():
        if seeds := best.by_seed.keys() & control.by_seed.keys():
            reached, own = (found._replace(seeds=frozenset(seeds)) for found in (control, best))
            verdict = "reached" if reached.accuracy < own.accuracy else "is as accurate, or more, with"
            layers = count_of(depth, "layer")
            yield f"An encoder with {layers}, trained end to end in as many rounds, {verdict} {reached.words}."


def beats_untrained(options: Sequence[Option]) -> bool | None:
    """Return whether any measured option is more accurate than its untrained encoder; None if that is not known."""
    gains = [option.measured.gain for option in options if option.measured]
    if any(gain > 0 for gain in gains):
        return True
    return False if gains and not any(map(math.isnan, gains)) else None


def step_words(option: Option, best: Option, devices: Sequence[DeviceClass]) -> str:
    """Describe what an option would bring and cost in comparison with the recommended one."""
    points = 100 * (accuracy_of(option) - accuracy_of(best))
    estimated = option.estimated or best.estimated
    kind = "measured" if option.ranked else "estimated" if estimated else "published"
    changes = [f"{points:+.1f} points of {kind} accuracy"]
    pairs = (
        ("time", option.seconds, best.seconds, time_words),
        ("traffic per device", option.traffic_bytes, best.traffic_bytes, bytes_words),
        ("energy per device", option.energy_wh, best.energy_wh, lambda wh: f"{short_number(wh)} Wh"),
        ("peak memory", *(o.ledger["peak_memory_bytes"] for o in (option, best)), bytes_words),
    )
    for what, new, old, words in pairs:
        if old and new:
            same = abs(new / old - 1) <= SAME
            changes.append(f"the same {what}" if same else f"{what} {words(new)} instead of {words(old)}")
    if option.everywhere != best.everywhere:
        lost = [
            f"{round_percent(then.everywhere)} of {device.name}" if then.everywhere else f"none of {device.name}"
            for device, now, then in zip(devices, best.parts, option.parts, strict=True)
            if then.everywhere < now.everywhere
        ]
        without = f" ({', '.join(lost)})" if lost else ""
        changes.append(
            f"{round_percent(option.everywhere)} instead of {round_percent(best.everywhere)} of the clients throughout"
            + without
        )
        if option.everywhere < best.everywhere:
            images = max(left.images for left in option.left)
            changes.append(f"{round_percent(images)} of the images are left out; time is that of the other clients")
    return f"{option.name}: {'; '.join(changes)}."


def unresolved_rivals(best: Option, options: Sequence[Option], protocol: str) -> list[Difference]:
    """Return the measured options that the recommended one is not shown to be better than, nearest first.

    They are compared by paired t-tests, adjusted by Holm's method.
    """
    if not best.ranked:
        return []
    others: dict[tuple[str, int, str], Difference] = {}  # the same runs may measure an option with remat and without
    for option in options:
        key = option.runs_key
        if option.ranked and key != best.runs_key and key not in others:
            accuracies = best.ranked.counted, option.ranked.counted
            others[key] = compare(protocol, best.name, option.name, *accuracies)
    unresolved = [d for d in adjust([*others.values()]) if not (d.p_holm < CHANCE and d.mean > 0)]
    return sorted(unresolved, key=lambda d: (not d.seeds, d.seeds and d.mean))


def _unranked_words(options: Sequence[Option]) -> str:
    """Name the measured options that lack seeds over which the others are ranked; empty without any."""
    lacking = {o.runs_key: (o.name, o.measured) for o in reversed(options) if o.measured and not o.ranked}
    if not lacking:
        return ""
    named = ", ".join(f"{name} ({measured.words})" for name, measured in reversed(lacking.values()))
    seeds = ", ".join(map(str, sorted(next(iter(lacking.values()))[1].seeds)))
    return f"Not ranked, for lack of a run with each of the seeds {seeds}: {named}."


def _rival_words(difference: Difference) -> str:
    points = f"{100 * difference.mean:+.1f} points, " if difference.seeds else ""
    return f"{difference.against} ({points}{difference.why_not or f'adjusted p = {difference.p_holm:.2g}'})"


def missing_for(config: Config, device: DeviceClass, number: int, options: Sequence[Option]) -> str:
    """Explain what a device class lacks for the option that is closest to fitting it.

    Args:
      config: resolved.
      device: the class.
      number: its index in the fleet.
      options: all of the plan.
    """
    closest = max(options, key=lambda option: (option.parts[number].everywhere, accuracy_of(option)))
    if share := closest.parts[number].everywhere:
        who = "it" if share == 1 else f"{round_percent(share)} of its clients"
        return f"{device.name}: {who} could take part throughout in {closest.name}."
    smallest = min(options, key=lambda option: option.ledger["peak_memory_bytes"])
    peak, available = smallest.ledger["peak_memory_bytes"] / 1e9, device.step_gb
    if peak > available:
        batch = 2 ** math.floor(math.log2(max(config.optimizer.batch_size * available / peak, 1)))
        hint = f", or try optimizer.batch_size {batch} or less" if batch >= 2 else ""
        return (
            f"{device.name}: every option needs {peak:.3g} GB or more ({smallest.name}), {peak - available:.2g} GB "
            f"above what it has{' for a step' if device.baseline_gb else ''}{hint}."
        )
    fitting = [option for option in options if option.ledger["peak_memory_bytes"] <= available * 1e9]
    slowest = {option.name: max(option.parts[number].round_seconds or [0.0]) for option in fitting}
    name = min(slowest, key=lambda name: slowest[name])
    return (
        f"{device.name}: with fleet.deadline_seconds {config.fleet.deadline_seconds:g} it is too slow for every "
        f"option that fits its memory: a round takes up to {time_words(slowest[name])} ({name})."
    )
