"""The server's side of a pilot: a simulator whose clients are real devices."""

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lwfedssl_jax.config import Config, ConfigError, to_dict
from lwfedssl_jax.costs.fleet import operations_of_a_round
from lwfedssl_jax.data.partition import Population
from lwfedssl_jax.experiment.active import ActiveRun
from lwfedssl_jax.experiment.ledgers import compiled_ledger
from lwfedssl_jax.experiment.train import train_together
from lwfedssl_jax.method.aggregation import RoundContext
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.task import Broadcast
from lwfedssl_jax.pilot.calibrate import operations_per_second
from lwfedssl_jax.pilot.checks import check_pilot
from lwfedssl_jax.pilot.devices import Devices
from lwfedssl_jax.pilot.journal import Journal
from lwfedssl_jax.pilot.link import Link
from lwfedssl_jax.pilot.open_round import Report, Request
from lwfedssl_jax.pilot.protocol import Result
from lwfedssl_jax.pilot.wire import Wire
from lwfedssl_jax.simulation import cohort
from lwfedssl_jax.simulation.events import Hear, Note, StepsDone, ignore
from lwfedssl_jax.simulation.feed import Feed, streamed
from lwfedssl_jax.simulation.lanes import placer
from lwfedssl_jax.simulation.program import with_key
from lwfedssl_jax.simulation.rounds import BY_LANE, LANES, Carry, Method, Update, accumulate
from lwfedssl_jax.simulation.setup import Cache, Prepared, with_full_batch
from lwfedssl_jax.simulation.simulator import Outcome, RoundResult, Simulator
from lwfedssl_jax.simulation.state import RoundStart, RoundState, Trained
from lwfedssl_jax.tree import Tree
from lwfedssl_jax.workdir import WorkDir

MOST_EMPTY_ROUNDS = 5
LARGEST_LOSS = 1e30
MOST_SAMPLES = 2**31 - 1  # as int32 has


def check_numbers(run: Prepared, result: Result) -> None:
    """Refuse a device's result whose numbers cannot be.

    Raises:
      ValueError: naming one of them.
    """
    samples = cohort.samples_of(run, result.examples)
    if result.samples != samples or not 0 <= result.layers <= samples * run.config.model.depth:
        raise ValueError(
            f"an update after {result.samples} samples and {result.layers} layers; it has {samples} samples"
        )
    if max(result.samples, result.layers) > MOST_SAMPLES:
        raise ValueError(f"an update after {result.samples} samples and {result.layers} layers; at most {MOST_SAMPLES}")
    if abs(result.loss) > LARGEST_LOSS:  # its own, and not only the sum over devices, is finite; NaN is left out later
        raise ValueError(f"an update whose loss is {result.loss}")
    if not result.train_seconds > 0:
        raise ValueError(f"an update whose train_seconds is {result.train_seconds}")
    for name in ("train_seconds", "compile_seconds", "overlap_seconds", "peak_bytes", "program_bytes"):
        if not 0 <= getattr(result, name) < math.inf:
            raise ValueError(f"an update whose {name} is {getattr(result, name)}")


def run_id(config: Config) -> str:
    """Return a name of a run, by its config."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()[:16]


def serve(
    config: Config,
    workdir: WorkDir,
    link: Link,
    at_start: int,
    deadline: float,
    hear: Hear = ignore,
    now: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    cache: Cache | None = None,
    names: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the rounds of a config on devices, or continue them, and write the work directory as ``train`` does.

    Args:
      config: resolved; ``partition.clients`` devices can join.
      workdir: belongs to this config.
      link: to the devices.
      at_start: how many devices have to be there before the first round; a run that continues waits for one.
      deadline: seconds for a round.
      hear: called with each event.
      now, sleep: the clock.
      cache: shared with other runs of this process.
      names: of the first devices, which get the first numbers; others get theirs as they join.

    Returns:
      The content of ``summary.json``.

    Raises:
      ConfigError: the config cannot be run on devices, ``at_start`` is more than can join, and as
        ``experiment.train.train``.
      OSError: no update could be used in ``MOST_EMPTY_ROUNDS`` rounds; and as ``experiment.train.train``.
    """
    check_pilot(config)
    if not 1 <= at_start <= config.partition.clients:
        raise ConfigError(f"--at-start: {at_start} is out of range; accepted: 1 to {config.partition.clients}")
    run = ActiveRun(config, workdir, [hear])

    def make(runs: Sequence[Prepared], stages: Sequence[Stage], *rest: Any) -> PilotSimulator:
        def tell(text: str) -> None:
            hear(Note(text))

        journal, (_, between_calls, _) = Journal(workdir.path, run.done, names), rest
        fewest = runs[0].task.objective.fewest
        devices = Devices(link, journal, config.partition.clients, fewest, deadline, between_calls, now, sleep, tell)
        return PilotSimulator(
            runs, stages, *rest, devices=devices, journal=journal, at_start=1 if run.done else at_start
        )

    train_together([run], cache, make)
    if run.error:
        raise run.error
    return run.summary or {}


class ResultNumbers(NamedTuple):
    """Numbers of a device's result, as in ``Result``, for a program."""

    examples: jax.Array
    loss: jax.Array
    samples: jax.Array
    layers: jax.Array


def fold(
    method: Method,
    context: RoundContext,
    broadcast: Broadcast,
    carry: Carry,
    client: jax.Array,
    sent: Tree,
    numbers: ResultNumbers,
) -> Carry:
    """Add a device's update to the sums of the only lane, in one program, as the simulator does: bit for bit.

    Args:
      method: static.
      context: of the round; its key is key data.
      broadcast: of the round.
      carry: the sums.
      client: the device's number.
      sent: its trainable part, or with compression its message.
      numbers: of its result.
    """
    trained = method.compression.unpack(broadcast, sent) if method.compression else sent
    lane: Carry = jax.tree.map(lambda x: x[0], carry)
    update = Update(trained, numbers.examples, numbers.loss, numbers.samples)
    lane = accumulate(method, with_key(context), broadcast, lane, client, update)
    lane = lane._replace(layers=lane.layers + numbers.layers)
    return jax.tree.map(lambda x: x[None], lane)


class PilotSimulator(Simulator):
    """A simulator whose clients are devices.

    Args:
      runs: a single one, which gets one lane.
      devices: the clients, by their numbers.
      journal: their roster.
      at_start: how many of them have to be there before it begins.
      stages, hear, between_calls, cache: as for ``Simulator``.
    """

    skipped = frozenset({"steps"})

    def __init__(
        self,
        runs: Sequence[Prepared],
        stages: Sequence[Stage] = (),
        hear: Hear = ignore,
        between_calls: Callable[[], None] = lambda: None,
        cache: Cache | None = None,
        *,
        devices: Devices,
        journal: Journal,
        at_start: int,
    ) -> None:
        mesh = Mesh(runs[0].mesh.devices.flat[:1], (LANES,))
        super().__init__([with_full_batch(runs[0])._replace(lanes=1, mesh=mesh)], stages, hear, between_calls, cache)
        self._devices, self._journal, self._empty_rounds = devices, journal, 0
        self._wire = Wire(self.run)
        self._measured = dict[str, list[Mapping[str, Any]]]()
        for line in journal.measured:
            self._measured.setdefault(line["name"], []).append(line)
        self._fold = jax.jit(functools.partial(fold, self.run.method))
        devices.gather(at_start, lambda names: hear(Note(f"{len(names)} of {at_start} devices: {', '.join(names)}")))
        self._count_images()

    def _make_feed(self) -> Feed:
        return streamed(self.run.dataset.train_images, placer(self.run.mesh, BY_LANE))  # of no image, in fact

    def _count_images(self, reported: Mapping[int, int] = MappingProxyType({})) -> None:
        """Take the numbers of images from the roster, and of devices that have just reported from their results.

        A device that has never joined is drawn as well, and does not report.
        """
        sizes = np.full(self.run.config.partition.clients, self.run.task.objective.fewest, np.int64)
        for entry in self._journal.roster.values():
            sizes[entry.number] = reported.get(entry.number, entry.images or sizes[entry.number])
        self.runs = (self.run._replace(clients=Population.elsewhere(sizes)),)

    def run_rounds(self, stage: Stage, params: Tree, state: RoundState | None, number: int) -> RoundResult:
        """Run one round; one in which no update can be used changes nothing, and several of them end the run.

        Raises:
          OSError: it is the last of ``MOST_EMPTY_ROUNDS`` such rounds.
        """
        result = super().run_rounds(stage, params, state, number)
        line = result.outcomes[0].line
        is_empty = line["left_out"] == line["clients"] and line["clients"] + line["dropped"] > 0
        self._empty_rounds = self._empty_rounds + 1 if is_empty else 0
        if self._empty_rounds == MOST_EMPTY_ROUNDS:
            why = self._devices.last_reason or "none was there in time"
            raise OSError(
                f"no device's update could be used in {MOST_EMPTY_ROUNDS} rounds, the last time because: {why}"
            )
        if number == self.run.config.federation.rounds:
            self._devices.settle()
        return result._replace(outcomes=[Outcome(line, None)])

    def train_cohorts(self, start: RoundStart) -> Trained:
        """Draw the cohort, ask its devices for their updates, and add up those that come."""
        self._journal.open()
        drawn = cohort.draw_cohort(self.run, start.number)
        params, sent = jax.device_get((start.params, start.broadcast.trainable))
        stage, updates = start.stage, dict[int, Any]()

        def check(result: Result) -> None:
            check_numbers(self.run, result)
            updates[result.client] = self._wire.read_update(stage, result.arrays["update"], sent)

        layers = [self._wire.layer(number, params) for number in range(1, stage.frozen_depth + 1)]
        request = Request(
            run=run_id(self.run.config),
            round=start.number,
            stage=stage.number,
            config=json.dumps(to_dict(self.run.config)),
            trainable=self._wire.trainable(stage, params),
            frozen={self._wire.digest(number, content): content for number, content in enumerate(layers, start=1)},
            check=check,
        )
        collected = self._devices.collect(
            request, drawn.drawn, lambda done, of: self._hear(StepsDone(start.number, done, of))
        )
        reports = collected.reports
        self._count_images({client: report.result.examples for client, report in reports.items()})
        clients = [client for client in drawn.drawn if client in reports]
        carry = start.carry
        for client in cohort.order_in_lane(self.run, clients) if clients else []:
            result = reports[client].result
            values = np.float32(result.examples), np.float32(result.loss), result.samples, result.layers
            numbers = ResultNumbers(*map(jax.numpy.asarray, values))
            carry = self._fold(start.context, start.broadcast, carry, np.int32(client), updates[client], numbers)
        self._record(stage, start.number, reports)
        work = cohort.pack_cohort(self.run, clients, start.number)
        fields = {
            "download_bytes": collected.payload_down,
            "upload_bytes": collected.payload_up,
        }
        return Trained(carry, [drawn._replace(reporting=clients)], [work], [fields])

    def _record(self, stage: Stage, number: int, reports: dict[int, Report]) -> None:
        """Write a line for each report: what it took, beside what the ledger says."""
        cost = compiled_ledger(self.run.config, self._hear, self._cache)["per_stage"][stage.number - 1]
        for client, report in reports.items():
            download, upload = self._traffic[0].round_bytes(stage, report.missing_layers)
            result, name = report.result, self._devices.name_of(client)
            operations = float(operations_of_a_round(cost, np.array(result.examples)))
            before = self._measured.setdefault(name, [])
            speed = operations_per_second(before)
            line = {
                "round": number,
                "stage": stage.number,
                "client": client,
                "name": name,
                "examples": result.examples,
                "predicted": {
                    "download": download,
                    "upload": upload,
                    "operations": operations,
                    "seconds": speed and round(operations / speed, 4),
                    "memory": cost["peak_memory_bytes"],
                },
                "measured": {
                    "payload_down": report.payload_down,
                    "payload_up": report.payload_up,
                    "wire_down": report.wire_down,
                    "train_seconds": float(f"{result.train_seconds:.4g}"),
                    "compile_seconds": round(result.compile_seconds, 4),
                    "overlap_seconds": round(result.overlap_seconds, 4),
                    "message_seconds": round(report.message_seconds, 4),
                    "peak_rss": result.peak_bytes,
                    "program_bytes": result.program_bytes,
                    "downlink_mbps": round(result.downlink_mbps, 4) or None,
                    "uplink_mbps": round(result.uplink_mbps, 4) or None,
                },
            }
            self._journal.write(line)
            before.append(line)
