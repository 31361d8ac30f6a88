"""Which clients' devices can afford which stages."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lwfedssl_jax.config import Config, ConfigError, device_classes
from lwfedssl_jax.config.device_classes import DeviceClass
from lwfedssl_jax.system import seeds


class Participation(NamedTuple):
    """What a device of a class does in a run.

    Attributes:
      stages: numbers of the stages that it takes part in.
      round_seconds: of each stage of the run, what a round takes it or would; None where its speed is not known.
      seconds: of all rounds of the stages that it takes part in; None likewise.
      traffic_bytes: of these, both directions.
      energy_wh: of these, in watt-hours; None where its speed or its power is not known.
    """

    stages: list[int]
    round_seconds: list[float] | None
    seconds: float | None
    traffic_bytes: int
    energy_wh: float | None


def participation(
    device: DeviceClass, per_stage: Sequence[Mapping[str, Any]], examples: float, deadline: float
) -> Participation:
    """What a device does that takes part in every round of all stages that it can afford (``affords``).

    Args:
      device: its class.
      per_stage: of a ledger with peak memory (``resources.ledger``).
      examples: that it trains on.
      deadline: seconds that a round may take; 0 for any.
    """
    rows = [row for row in per_stage if affords(device, row, np.array([examples]), deadline)[0]]
    traffic = sum(row["download_bytes"] + row["upload_bytes"] for row in rows)
    if not device.has_speed:
        return Participation([row["stage"] for row in rows], None, None, traffic, None)
    of_a_round = {row["stage"]: float(seconds_of_a_round(device, row, np.array([examples]))[0]) for row in per_stage}
    seconds = sum(row["rounds"] * of_a_round[row["stage"]] for row in rows)
    energy = None if device.watts is None else device.watts * seconds / 3600
    return Participation([row["stage"] for row in rows], list(of_a_round.values()), seconds, traffic, energy)


def affords(device: DeviceClass, row: Mapping[str, Any], examples_N: np.ndarray, deadline: float) -> np.ndarray:
    """Whether devices of a class with so many examples can take part in a stage: its memory, and its deadline if any.

    Returns:
      N booleans.
    """
    if row["peak_memory_bytes"] > device.memory_gb * 1e9:
        return np.zeros(len(examples_N), bool)
    if not deadline:
        return np.ones(len(examples_N), bool)
    return seconds_of_a_round(device, row, examples_N) <= deadline


def seconds_of_a_round(device: DeviceClass, row: Mapping[str, Any], examples_N: np.ndarray) -> np.ndarray:
    """N seconds: download, two operations for each multiply-add that the stage executes, upload; speeds are known."""
    assert device.gflops is not None
    assert device.uplink_mbps is not None
    assert device.downlink_mbps is not None
    of_a_sample = 2 * row["flops_executed"] / (device.gflops * 1e9)
    download, upload = row["download_bytes"] / device.downlink_mbps, row["upload_bytes"] / device.uplink_mbps
    return (examples_N * of_a_sample + 8 * (download + upload) / 1e6) / row["rounds"]


def deal(devices: Sequence[DeviceClass], clients: int, seed: int) -> np.ndarray:
    """The class of each client, as an index: at random, in proportion to the counts (largest remainders)."""
    counts = np.array([device.count for device in devices], float)
    exact = clients * counts / counts.sum()
    whole = np.floor(exact).astype(int)
    whole[np.argsort(whole - exact, kind="stable")[: clients - whole.sum()]] += 1
    return seeds.rng(seed, seeds.RngTag.FLEET).permutation(np.repeat(np.arange(len(devices)), whole))


class Fleet(NamedTuple):
    """The clients of a run on the devices of a fleet.

    Attributes:
      devices: the classes.
      classes: N, of each client, as an index.
      per_stage: of the run's ledger with peak memory.
      can: for each stage's number, which of the N clients can take part in it.
    """

    devices: Sequence[DeviceClass]
    classes: np.ndarray
    per_stage: Sequence[Mapping[str, Any]]
    can: dict[int, np.ndarray]


def make_fleet(
    devices: Sequence[DeviceClass],
    per_stage: Sequence[Mapping[str, Any]],
    examples_N: np.ndarray,
    deadline: float,
    seed: int,
) -> Fleet:
    """Clients with so many examples, dealt to the classes by the seed; the rest is as for ``take_part``."""
    class_N = deal(devices, len(examples_N), seed)
    of_class = [class_N == number for number in range(len(devices))]
    can = {
        row["stage"]: np.select(of_class, [affords(device, row, examples_N, deadline) for device in devices], False)
        for row in per_stage
    }
    return Fleet(devices, class_N, per_stage, can)


def summary(fleet: Fleet, examples_N: np.ndarray) -> list[dict[str, Any]]:
    """What ``summary.json`` says of each class.

    Returns:
      ``name``, ``clients``, ``stages`` that some of them take part in, ``clients_by_stage`` that do, and
      ``round_seconds_by_stage`` of the slowest of these, None where there is none or its speed is not known.
    """
    result = []
    for number, device in enumerate(fleet.devices):
        taking = [fleet.can[row["stage"]] & (fleet.classes == number) for row in fleet.per_stage]
        result.append(
            {
                "name": device.name,
                "clients": int((fleet.classes == number).sum()),
                "stages": [row["stage"] for row, who in zip(fleet.per_stage, taking, strict=True) if who.any()],
                "clients_by_stage": [int(who.sum()) for who in taking],
                "round_seconds_by_stage": [
                    float(seconds_of_a_round(device, row, examples_N[who]).max())
                    if device.has_speed and who.any()
                    else None
                    for row, who in zip(fleet.per_stage, taking, strict=True)
                ],
            }
        )
    return result


def fleet_line(of_classes: Sequence[Mapping[str, Any]], stages: int) -> str:
    """A line of what ``summary`` gives: each class, its clients, and in which stages they take part."""
    told = [
        f"{c['name']}, {c['clients']} client{'s' * (c['clients'] != 1)}: {class_text(c, stages)}" for c in of_classes
    ]
    return f"fleet: {'; '.join(told)}"


def class_text(of_class: Mapping[str, Any], stages: int) -> str:
    """In which stages the clients of a class of ``summary`` take part, or that only some of them do."""
    if not of_class["clients"]:
        return "none is dealt to it"
    some = any(0 < n < of_class["clients"] for n in of_class["clients_by_stage"])
    return stages_phrase(of_class["stages"], stages) + ", not all of them" * some


def participation_rows(summary_of_run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of a run's summary each class, with the share of its clients' rounds that they can take part in (NaN for none).

    Raises whatever a damaged summary makes of it; empty for a run without a fleet.
    """
    found = []
    for c in summary_of_run.get("fleet", ()):
        rounds = [row["rounds"] for row in summary_of_run["resources"]["per_stage"]]
        taken = sum(r * n for r, n in zip(rounds, c["clients_by_stage"], strict=True))
        slowest = [s for s in c["round_seconds_by_stage"] if s is not None]
        found.append(
            {
                "class": c["name"],
                "clients": c["clients"],
                "takes_part": class_text(c, len(rounds)),
                "share_of_rounds": taken / (sum(rounds) * c["clients"]) if c["clients"] else math.nan,
                "slowest_round_seconds": max(slowest, default=math.nan),
            }
        )
    return found


def stages_text(part_in: Sequence[int], stages: int) -> str:
    """In which stages a class takes part: yes, out, out from S, or only those."""
    if len(part_in) == stages:
        return "yes"
    if not part_in:
        return "out"
    if list(part_in) == list(range(1, len(part_in) + 1)):
        return f"out from {len(part_in) + 1}"
    runs = [s for s in part_in if s - 1 not in part_in], [s for s in part_in if s + 1 not in part_in]
    return "only " + ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(*runs, strict=True))


def stages_phrase(part_in: Sequence[int], stages: int) -> str:
    """In which stages a class takes part, for a sentence."""
    if len(part_in) in (0, stages):
        return "in all stages" if part_in else "in no stage"
    said = stages_text(part_in, stages)
    return said.replace("from", "from stage") if said.startswith("out") else said.replace("only", "in stages")


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
    made = make_fleet(devices, per_stage, examples_N, deadline, config.runtime.seed)
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
