"""The recommendation of a plan, and the reasons for it."""

import math
from collections.abc import Iterator, Sequence

from lwfedssl_jax.analysis.statistics import CHANCE, Difference, adjust, compare
from lwfedssl_jax.analysis.wording import percent, protocol_words, round_percent, time_words
from lwfedssl_jax.config import Config
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.plan.options import Option

PUBLISHED = ("progressive", "end_to_end", "layerwise")  # by accuracy, best first (arXiv 2401.11647)
MAX_RIVALS = 2  # largest number of options to name that the recommended one is not shown to be better than


def recommend(
    config: Config, devices: Sequence[DeviceClass], options: Sequence[Option], protocol: str
) -> tuple[Option | None, str]:
    """Return the recommended option (see ``choose_option``), and the reason in sentences."""
    best = choose_option(options)
    if best is None:
        lacking = (missing_for(config, device, number, options) for number, device in enumerate(devices))
        return None, " ".join(["No class can take part in every stage of any option.", *lacking])
    return best, " ".join(reasons(best, config, devices, options, protocol))


def choose_option(options: Sequence[Option]) -> Option | None:
    """Choose one of the options in which the largest share of the devices can take part in every stage.

    It is the one with the highest measured accuracy, if any of them is measured; otherwise the first by the published
    order of accuracies (progressive, end_to_end, layerwise; others last). Among equals it is the one that takes the
    least time on the slowest class, then the least traffic, then the fewest operations. None if no class can take part
    in every stage of any option.
    """
    fitting = fitting_options(options)
    if not fitting[0].everywhere:
        return None

    def rank(option: Option) -> tuple[float, ...]:
        published = (*PUBLISHED, option.strategy).index(option.strategy)
        first = -option.measured.accuracy if option.measured else published
        return first, option.seconds, option.ledger["total_bytes"], option.ledger["flops_executed"]

    return min([option for option in fitting if option.measured] or fitting, key=rank)


def fitting_options(options: Sequence[Option]) -> list[Option]:
    """Return the options in which the largest share of the devices can take part in every stage."""
    most = max(option.everywhere for option in options)
    return [option for option in options if option.everywhere == most]


def reasons(
    best: Option, config: Config, devices: Sequence[DeviceClass], options: Sequence[Option], protocol: str
) -> Iterator[str]:
    """Explain why an option is recommended, what it is not shown to be better than, and which classes it leaves out."""
    share = f"{round_percent(best.everywhere)} of the devices, the most that any option reaches,"
    yield f"{best.name}: {'all devices' if best.everywhere == 1 else share} can take part in every stage."
    fitting = fitting_options(options)
    if len(fitting) > 1:
        least = "time" if best.seconds else "traffic"
        yield (
            f"Of the {len(fitting)} options with this share, {_advantage(best, protocol)}; among equals it takes the "
            f"least {least}."
        )
    if rivals := unresolved_rivals(best, fitting, protocol):
        more = f", and {len(rivals) - MAX_RIVALS} more" if len(rivals) > MAX_RIVALS else ""
        yield f"It is not shown to be better than {'; '.join(map(_rival_words, rivals[:MAX_RIVALS]))}{more}."
    without_remat = [option for option in options if not option.remat]
    if best.remat and without_remat:
        other = choose_option(without_remat)
        found = f"{other.name}, {round_percent(other.everywhere)} of the devices" if other else "nothing fits"
        yield f"Without runtime.remat: {found}."
    for number, part in enumerate(best.parts):
        if len(part.stages) < len(best.ledger["per_stage"]):
            yield missing_for(config, devices[number], number, options)


def _advantage(best: Option, protocol: str) -> str:
    if best.measured:
        seeds = len(best.measured.by_seed)
        runs = f"mean of {seeds} seeds" if seeds > 1 else "1 seed"
        accuracy = f"{percent(best.measured.accuracy)} ({protocol_words(protocol)}, {runs})"
        return f"it has the highest measured accuracy, {accuracy}"
    unknown = f"; none of them is in the results by {protocol_words(protocol)}" if protocol else ""
    return f"{best.strategy} is the most accurate as published ({' > '.join(PUBLISHED)}){unknown}"


def unresolved_rivals(best: Option, options: Sequence[Option], protocol: str) -> list[Difference]:
    """Return the measured options that the recommended one is not shown to be better than, nearest first.

    They are compared by paired t-tests, adjusted by Holm's method.
    """
    if not best.measured:
        return []

    def runs_key(option: Option) -> tuple[str, int, str]:
        return option.strategy, option.layers_per_stage, str(option.measured)

    others: dict[tuple[str, int, str], Difference] = {}  # the same runs may measure an option with remat and without
    for option in options:
        key = runs_key(option)
        if option.measured and key != runs_key(best) and key not in others:
            by_seed = option.measured.by_seed
            others[key] = compare(protocol, best.name, option.name, best.measured.by_seed, by_seed)
    unresolved = [d for d in adjust([*others.values()]) if not (d.p_holm < CHANCE and d.mean > 0)]
    return sorted(unresolved, key=lambda d: (not d.seeds, d.seeds and d.mean))


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
    smallest = min(options, key=lambda option: option.ledger["peak_memory_bytes"])
    peak, available = smallest.ledger["peak_memory_bytes"] / 1e9, device.memory_gb
    if peak > available:
        batch = 2 ** math.floor(math.log2(config.optimizer.batch_size * available / peak))
        hint = f", or try optimizer.batch_size {batch}" if batch >= 2 else ""
        return (
            f"{device.name}: every option needs {peak:.3g} GB or more ({smallest.name}), {peak - available:.2g} GB "
            f"above what it has{hint}."
        )
    fitting = [option for option in options if option.ledger["peak_memory_bytes"] <= available * 1e9]
    slowest = {option.name: max(option.parts[number].round_seconds or [0.0]) for option in fitting}
    name = min(slowest, key=lambda name: slowest[name])
    if config.fleet.deadline_seconds < slowest[name]:
        return (
            f"{device.name}: with fleet.deadline_seconds {config.fleet.deadline_seconds:g} it is too slow for every "
            f"option that fits its memory: a round takes up to {time_words(slowest[name])} ({name})."
        )
    return f"{device.name}: it could take part throughout in {name}."
