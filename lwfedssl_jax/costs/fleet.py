"""Fleets: which devices can afford which stages, and which clients of a run they belong to."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np

from lwfedssl_jax.config import Config, ConfigError, device_classes
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.costs.ledger import StageCost
from lwfedssl_jax.system import seeds


class Participation(NamedTuple):
    """What the clients of a class can do in a run, and what one that takes part in all stages of its class spends.

    Attributes:
      stages: numbers of the stages that some of them take part in.
      shares: by stage, the share of the clients that can take part.
      everywhere: the share of them that can take part in every stage.
      round_seconds: by stage, the time of a round on the slowest of the clients that can take part, or of all if none
        can; None if the class's speed is unknown.
      fetch_seconds: in which a client downloads, over the run, the frozen layers that stages begin with; None if
        unknown.
      seconds: of all rounds of its stages, with these; None if unknown.
      traffic_bytes: of the same, both directions.
      energy_wh: of the same, in watt-hours; None if its speed or its power is unknown.
    """

    stages: list[int]
    shares: list[float]
    everywhere: float
    round_seconds: list[float] | None
    fetch_seconds: float | None
    seconds: float | None
    traffic_bytes: int
    energy_wh: float | None


class Fleet(NamedTuple):
    """The clients of a run on the devices of a fleet.

    Attributes:
      devices: the classes.
      classes: N, the class of each client, as an index.
      per_stage: of the run's ledger with peak memory.
      can: by stage number, which of the N clients can take part in it.
    """

    devices: Sequence[DeviceClass]
    classes: np.ndarray
    per_stage: Sequence[StageCost]
    can: dict[int, np.ndarray]


class ClassSummary(TypedDict):
    """The entry of a class of devices in ``summary.json``.

    ``stages`` are those in which some of its clients can take part. ``round_seconds_by_stage`` are of the slowest of
    these clients, None if there is none or its speed is unknown.
    """

    name: str
    clients: int
    stages: list[int]
    clients_by_stage: list[int]
    round_seconds_by_stage: list[float | None]


def participation(
    device: DeviceClass, per_stage: Sequence[StageCost], examples_M: np.ndarray, deadline: float
) -> Participation:
    """Compute what the clients of a class do if they take part in every round of all stages that they can afford.

    Args:
      device: their class.
      per_stage: of a ledger with peak memory.
      examples_M: how many examples each trains on; at least one client.
      deadline: seconds that a round may take; 0 for no deadline.
    """
    can_SxM = np.array([affords(device, cost, examples_M, deadline) for cost in per_stage])
    taken = [cost for cost, can in zip(per_stage, can_SxM, strict=True) if can.any()]
    stages = [cost["stage"] for cost in taken]
    shares, everywhere = can_SxM.mean(1).tolist(), float(can_SxM.all(0).mean())
    fetched = fetched_bytes(taken)
    traffic = sum(cost["download_bytes"] + cost["upload_bytes"] for cost in taken) + fetched
    if not device.has_speed:
        return Participation(stages, shares, everywhere, None, None, None, traffic, None)
    round_seconds = {
        cost["stage"]: float(seconds_of_a_round(device, cost, examples_M[can] if can.any() else examples_M).max())
        for cost, can in zip(per_stage, can_SxM, strict=True)
    }
    fetching = fetch_seconds(device, fetched)
    seconds = sum(cost["rounds"] * round_seconds[cost["stage"]] for cost in taken) + fetching
    energy = None if device.watts is None else device.watts * seconds / 3600
    return Participation(stages, shares, everywhere, list(round_seconds.values()), fetching, seconds, traffic, energy)


def fetched_bytes(stages: Sequence[StageCost]) -> int:
    """Return the bytes of frozen layers that a client downloads over the run if it takes part in these stages.

    In the first of them it downloads all layers that are frozen, later those that have become so since: their averages,
    which it does not have although it has trained them.
    """
    return stages[-1]["frozen_bytes"] if stages else 0


def fetch_seconds(device: DeviceClass, size: int) -> float:
    """Return the seconds in which a device of known speed downloads a number of bytes."""
    assert device.downlink_mbps is not None
    return 8 * size / (device.downlink_mbps * 1e6)


def affords(device: DeviceClass, cost: StageCost, examples_N: np.ndarray, deadline: float) -> np.ndarray:
    """Return whether devices of a class have the memory for a stage, and are fast enough for the deadline, if any.

    Args:
      device: the class.
      cost: of the stage, with peak memory.
      examples_N: of each device.
      deadline: seconds that a round may take; 0 for no deadline.

    Returns:
      N booleans.
    """
    if cost["peak_memory_bytes"] > device.step_gb * 1e9:
        return np.zeros(len(examples_N), bool)
    if not deadline:
        return np.ones(len(examples_N), bool)
    return seconds_of_a_round(device, cost, examples_N) <= deadline


def seconds_of_a_round(device: DeviceClass, cost: StageCost, examples_N: np.ndarray) -> np.ndarray:
    """Return N seconds: download, two operations per executed multiply-add, and upload; speeds must be known."""
    assert device.gflops is not None
    assert device.uplink_mbps is not None
    assert device.downlink_mbps is not None
    download, upload = cost["download_bytes"] / device.downlink_mbps, cost["upload_bytes"] / device.uplink_mbps
    training = operations_of_a_round(cost, examples_N) / (device.gflops * 1e9)
    return training + 8 * (download + upload) / 1e6 / cost["rounds"]


def operations_of_a_round(cost: StageCost, examples_N: np.ndarray) -> np.ndarray:
    """Return N numbers of floating-point operations: two per executed multiply-add."""
    return 2 * cost["flops_executed"] / cost["rounds"] * examples_N


def deal(devices: Sequence[DeviceClass], clients: int, seed: int) -> np.ndarray:
    """Draw the class of each client, as an index: at random, in proportion to the counts (largest remainders)."""
    counts = np.array([device.count for device in devices], float)
    exact = clients * counts / counts.sum()
    whole = np.floor(exact).astype(int)
    whole[np.argsort(whole - exact, kind="stable")[: clients - whole.sum()]] += 1
    return seeds.rng(seed, seeds.RngTag.FLEET).permutation(np.repeat(np.arange(len(devices)), whole))


def make_fleet(
    devices: Sequence[DeviceClass], per_stage: Sequence[StageCost], examples_N: np.ndarray, deadline: float, seed: int
) -> Fleet:
    """Assign clients to the classes by the seed; the other arguments are as for ``affords``."""
    class_N = deal(devices, len(examples_N), seed)
    return Fleet(devices, class_N, per_stage, able_clients(devices, class_N, per_stage, examples_N, deadline))


def able_clients(
    devices: Sequence[DeviceClass],
    class_N: np.ndarray,
    per_stage: Sequence[StageCost],
    examples_N: np.ndarray,
    deadline: float,
) -> dict[int, np.ndarray]:
    """Return which of N clients can take part, given their classes and numbers of examples, by stage number."""
    members = [class_N == number for number in range(len(devices))]
    return {
        cost["stage"]: np.select(members, [affords(device, cost, examples_N, deadline) for device in devices], False)
        for cost in per_stage
    }


def fleet_of_clients(config: Config, per_stage: Sequence[StageCost], examples_N: np.ndarray) -> Fleet:
    """Assign the clients of a run to the config's fleet.

    Args:
      config: resolved, with ``fleet.devices``.
      per_stage: of its ledger with peak memory.
      examples_N: of each client.

    Raises:
      ConfigError: there is a stage in which no client with examples can take part.
    """
    devices, deadline = device_classes(config), config.fleet.deadline_seconds
    fleet = make_fleet(devices, per_stage, examples_N, deadline, config.partition_seed)
    for cost in per_stage:
        if not (fleet.can[cost["stage"]] & (examples_N > 0)).any():
            most = max(device.step_gb for device in devices)
            slow = f", or a round in fleet.deadline_seconds {deadline:g}" if deadline else ""
            raise ConfigError(
                f"fleet.devices: no client can take part in stage {cost['stage']} of {len(per_stage)}, which needs "
                f"{cost['peak_memory_bytes'] / 1e9:.3g} GB (they have up to {max(most, 0):.3g} GB for it){slow}; "
                "accepted: devices that can, a smaller optimizer.batch_size, runtime.remat True, or strategy.name "
                "layerwise"
            )
    return fleet


def summary(fleet: Fleet, examples_N: np.ndarray) -> list[ClassSummary]:
    """Make the entries of the classes in ``summary.json``; ``examples_N`` are those of each client."""
    return [_class_summary(fleet, number, examples_N) for number in range(len(fleet.devices))]


def _class_summary(fleet: Fleet, number: int, examples_N: np.ndarray) -> ClassSummary:
    device, members = fleet.devices[number], fleet.classes == number
    participants = [fleet.can[cost["stage"]] & members for cost in fleet.per_stage]
    stages = list(zip(fleet.per_stage, participants, strict=True))
    return {
        "name": device.name,
        "clients": int(members.sum()),
        "stages": [cost["stage"] for cost, clients in stages if clients.any()],
        "clients_by_stage": [int(clients.sum()) for clients in participants],
        "round_seconds_by_stage": [
            float(seconds_of_a_round(device, cost, examples_N[clients]).max())
            if device.has_speed and clients.any()
            else None
            for cost, clients in stages
        ],
    }


def fleet_line(classes: Sequence[Mapping[str, Any]], stages: int) -> str:
    """Return one line on the classes of ``summary``: their clients, and the stages in which these take part."""
    texts = [f"{c['name']}, {c['clients']} client{'s' * (c['clients'] != 1)}: {class_text(c, stages)}" for c in classes]
    return f"fleet: {'; '.join(texts)}"


def class_text(class_summary: Mapping[str, Any], stages: int) -> str:
    """Describe the stages in which clients of a class of ``summary`` take part, and whether all of them do."""
    clients = class_summary["clients"]
    if not clients:
        return "none is dealt to it"
    some = any(0 < n < clients for n in class_summary["clients_by_stage"])
    return stages_phrase(class_summary["stages"], stages) + ", not all of them" * some


def participation_rows(run_summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the classes of a run's ``summary.json`` as rows; empty for a run without a fleet.

    Returns:
      ``class``, ``clients``, ``takes_part`` in words, ``share_of_rounds`` in which its clients can take part (NaN
      without clients), and ``slowest_round_seconds`` (NaN if unknown).

    Raises:
      Exception: of any kind, if the summary is damaged.
    """
    found = []
    for c in run_summary.get("fleet", ()):
        rounds = [cost["rounds"] for cost in run_summary["resources"]["per_stage"]]
        client_rounds = sum(r * n for r, n in zip(rounds, c["clients_by_stage"], strict=True))
        seconds = [s for s in c["round_seconds_by_stage"] if s is not None]
        found.append(
            {
                "class": c["name"],
                "clients": c["clients"],
                "takes_part": class_text(c, len(rounds)),
                "share_of_rounds": client_rounds / (sum(rounds) * c["clients"]) if c["clients"] else math.nan,
                "slowest_round_seconds": max(seconds, default=math.nan),
            }
        )
    return found


def stages_text(numbers: Sequence[int], stages: int) -> str:
    """Describe the stages that a class takes part in: ``yes``, ``out``, ``out from S``, or ``only A-B,C``."""
    if len(numbers) == stages:
        return "yes"
    if not numbers:
        return "out"
    if list(numbers) == list(range(1, len(numbers) + 1)):
        return f"out from {len(numbers) + 1}"
    firsts, lasts = [s for s in numbers if s - 1 not in numbers], [s for s in numbers if s + 1 not in numbers]
    return "only " + ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(firsts, lasts, strict=True))


def stages_phrase(numbers: Sequence[int], stages: int) -> str:
    """Describe the same as a phrase in a sentence."""
    if len(numbers) in (0, stages):
        return "in all stages" if numbers else "in no stage"
    text = stages_text(numbers, stages)
    return text.replace("from", "from stage") if text.startswith("out") else text.replace("only", "in stages")
