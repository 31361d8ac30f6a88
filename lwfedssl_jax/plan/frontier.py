"""The frontier of a plan: options of which no other is better in one respect and as good in all others."""

from collections.abc import Sequence

from lwfedssl_jax.plan.options import Option


def frontier(options: Sequence[Option]) -> list[Option]:
    """Return the options that no other dominates: by accuracy, clients, time, traffic, energy and peak memory.

    Where the time is not known, operations take its place.

    Accuracies are the measured ones if any option has one, otherwise the published ones. Options without one, those
    that are not ranked for lack of seeds, and those that no client can take part in throughout, are not on it.
    """
    known = [option for option in comparable(options) if option.everywhere]
    return [option for option in known if not any(dominates(other, option) for other in known)]


def comparable(options: Sequence[Option]) -> list[Option]:
    """Return the options whose accuracies can be compared: measured ones if any is ranked, otherwise published."""
    measured = [option for option in options if option.ranked]
    return measured or [option for option in options if option.published is not None]


def accuracy_of(option: Option) -> float:
    """Return the accuracy by which an option of ``comparable`` is ranked."""
    return option.ranked.accuracy if option.ranked else option.published or 0.0


def dominates(better: Option, worse: Option) -> bool:
    """Return whether an option is better than another in one respect and as good in all others."""
    first, second = losses(better), losses(worse)
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))


def losses(option: Option) -> tuple[float, ...]:
    """Return what an option should have little of."""
    peak = float(option.ledger["peak_memory_bytes"])
    effort = option.seconds or float(option.ledger["flops_executed"])  # time is not known for all fleets
    costs = effort, option.traffic_bytes, option.energy_wh, peak
    return -accuracy_of(option), -option.everywhere, *costs


def step(on_frontier: Sequence[Option], chosen: Option, *, up: bool) -> Option | None:
    """Return the option of the frontier that is next in accuracy above the chosen one, or below it; None without one.

    Accuracies of different kinds, measured and published, are not compared.
    Above, only those count that leave the fewest clients out, so that no accuracy is bought with clients for nothing.
    Of several with one accuracy it is the one that most clients can take part in, then the one that takes the least
    time, then the least traffic. Below, only options that need less of something count.
    """
    sign = 1 if up else -1
    at = sign * accuracy_of(chosen)
    alike = [option for option in on_frontier if (option.ranked is None) == (chosen.ranked is None)]
    further = [option for option in alike if sign * accuracy_of(option) > at]
    if up:
        most = max((option.everywhere for option in further), default=0.0)
        further = [option for option in further if option.everywhere == most]
    else:
        further = [option for option in further if is_cheaper(option, chosen)]
    nearest = min((sign * accuracy_of(option) for option in further), default=None)
    candidates = [option for option in further if sign * accuracy_of(option) == nearest]
    key = lambda option: (-option.everywhere, option.seconds, option.traffic_bytes)  # noqa: E731
    return min(candidates, key=key, default=None)


def is_cheaper(option: Option, than: Option) -> bool:
    """Return whether an option needs less of something that costs, or leaves fewer clients out."""
    return any(a < b for a, b in zip(losses(option)[1:], losses(than)[1:], strict=True))
