"""Which option a plan recommends, and why."""

import math
from collections.abc import Sequence
from typing import Any

from lwfedssl_jax.analysis.statistics import CHANCE, compare, holm
from lwfedssl_jax.analysis.wording import percent_range, protocol_words, time_text
from lwfedssl_jax.config import Config
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.plan.options import Option

PUBLISHED = ("progressive", "end_to_end", "layerwise")  # by accuracy, best first (arXiv 2401.11647)
MAX_RIVALS = 2  # options named from which the recommended one is not told apart


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
        lacking = [missing_for(config, device, number, options) for number, device in enumerate(devices)]
        return None, " ".join(["No class can take part in every stage of any option.", *lacking])
    fit = [option for option in options if option.everywhere == most]
    known = [option for option in fit if option.measured]

    def order(option: Option) -> tuple[float, ...]:
        rank = (*PUBLISHED, option.strategy).index(option.strategy)
        first = -option.measured.accuracy if option.measured else rank
        return first, option.seconds, option.ledger["total_bytes"], option.ledger["flops_executed"]

    best = min(known or fit, key=order)
    share = "all devices" if most == 1 else f"{percent_range(most)} of the devices, the most that any option reaches,"
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
    reason += unresolved_rivals(best, known, protocol)
    plain = [option for option in options if not option.remat]
    if best.remat and plain:
        other, _ = recommend(config, devices, plain, protocol)
        found = f"{other.name}, {percent_range(other.everywhere)} of the devices" if other else "nothing fits"
        reason += f" Without runtime.remat: {found}."
    stages = len(best.ledger["per_stage"])
    out = [number for number, part in enumerate(best.parts) if len(part.stages) < stages]
    return best, " ".join([reason, *(missing_for(config, devices[number], number, options) for number in out)])


def unresolved_rivals(best: Option, known: Sequence[Option], protocol: str) -> str:
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
    more = f", and {len(told) - MAX_RIVALS} more" if len(told) > MAX_RIVALS else ""
    return f" It is not shown to be better than {'; '.join(told[:MAX_RIVALS])}{more}."


def missing_for(config: Config, device: DeviceClass, number: int, options: Sequence[Option]) -> str:
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
            f"option that fits its memory: a round takes up to {time_text(slowest[name])} ({name})."
        )
    return f"{device.name}: it could take part throughout in {name}."
