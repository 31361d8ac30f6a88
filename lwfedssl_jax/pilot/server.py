"""The server's side of a pilot: a simulator whose clients are real devices."""

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lwfedssl_jax.config import Config, ConfigError, to_dict
from lwfedssl_jax.data.partition import Population
from lwfedssl_jax.experiment.active import ActiveRun
from lwfedssl_jax.experiment.train import train_together
from lwfedssl_jax.method.aggregation import RoundContext
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.task import Broadcast
from lwfedssl_jax.pilot.devices import Devices, Report, Request
from lwfedssl_jax.pilot.journal import Journal
from lwfedssl_jax.pilot.link import Link
from lwfedssl_jax.pilot.protocol import Result
from lwfedssl_jax.pilot.wire import Wire
from lwfedssl_jax.simulation import cohort
from lwfedssl_jax.simulation.events import Hear, Note, StepsDone, ignore
from lwfedssl_jax.simulation.feed import Feed, streamed
from lwfedssl_jax.simulation.lanes import placer
from lwfedssl_jax.simulation.program import with_key
from lwfedssl_jax.simulation.rounds import BY_LANE, LANES, Carry, Method, Update, accumulate
from lwfedssl_jax.simulation.setup import Cache, Prepared
from lwfedssl_jax.simulation.simulator import Simulator
from lwfedssl_jax.simulation.state import RoundStart, Trained
from lwfedssl_jax.tree import Tree
from lwfedssl_jax.workdir import WorkDir

ACCEPTED: dict[str, tuple[Any, str]] = {
    "federation.client_start": ("global", "keeps models on clients between rounds"),
    "federation.dropout": (0.0, "devices drop out by themselves"),
    "additions.dictionary": (0, "uploads embeddings"),
    "additions.base_steps": (0, "sends a base model and images"),
    "privacy.secure_sum_bits": (0, "secure sums are only simulated"),
    "fleet.devices": ((), "the devices are real"),
    "evaluation.membership": (0, "looks at the clients' images"),
}


def check_pilot(config: Config) -> None:
    """Refuse what devices cannot do.

    Args:
      config: resolved.

    Raises:
      ConfigError: naming the field, the value and what is accepted.
    """
    for name, (accepted, why) in ACCEPTED.items():
        section, field = name.split(".")
        if (value := getattr(getattr(config, section), field)) != accepted:
            raise ConfigError(f"{name}: {value!r} cannot be part of a pilot: {why}; accepted: {accepted!r}")
    if config.additions.depth_dropout and config.additions.depth_dropout_per == "round":
        raise ConfigError(
            "additions.depth_dropout_per: 'round' cannot be part of a pilot: each device would have other layers; "
            "accepted: 'step'"
        )
    if config.data.name.startswith("memory:"):
        raise ConfigError(f"data.name: {config.data.name!r} is only in this process; accepted: data that have a name")


def check_numbers(config: Config, result: Result) -> None:
    """Refuse a device's result whose numbers cannot be.

    Raises:
      ValueError: naming one of them.
    """
    most = result.examples * config.federation.local_epochs
    if not 0 < result.samples <= most or not 0 <= result.layers <= most * config.model.depth:
        raise ValueError(f"an update after {result.samples} samples and {result.layers} layers, of {most} samples")
    for name in ("train_seconds", "compile_seconds", "peak_bytes", "program_bytes"):
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
      at_start: wait for so many devices before the first round.
      deadline: seconds for a round.
      hear: called with each event.
      now, sleep: the clock.
      cache: shared with other runs of this process.
      names: of the first devices, which get the first numbers; others get theirs as they join.

    Returns:
      The content of ``summary.json``.

    Raises:
      ConfigError: the config cannot be run on devices, and as ``experiment.train.train``.
    """
    check_pilot(config)
    run = ActiveRun(config, workdir, [hear])

    def make(runs: Sequence[Prepared], stages: Sequence[Stage], *rest: Any) -> PilotSimulator:
        journal, (_, between_calls, _) = Journal(workdir.path, run.done, names), rest
        fewest = runs[0].task.objective.fewest
        devices = Devices(link, journal, config.partition.clients, fewest, deadline, between_calls, now, sleep)
        return PilotSimulator(runs, stages, *rest, devices=devices, journal=journal, at_start=at_start)

    train_together([run], cache, make)
    if run.error:
        raise run.error
    return run.summary or {}


class Told(NamedTuple):
    """Numbers of a device's result, as in ``Result``."""

    examples: jax.Array
    loss: jax.Array
    samples: jax.Array
    layers: jax.Array


def fold(
    method: Method, context: RoundContext, broadcast: Broadcast, carry: Carry, client: jax.Array, sent: Tree, told: Told
) -> Carry:
    """Add a device's update to the sums of the only lane, in one program, as the simulator does: bit for bit.

    Args:
      method: static.
      context: of the round; its key is key data.
      broadcast: of the round.
      carry: the sums.
      client: the device's number.
      sent: its trainable part, or with compression its message.
      told: the rest of its result.
    """
    trained = method.compression.unpack(broadcast, sent) if method.compression else sent
    lane: Carry = jax.tree.map(lambda x: x[0], carry)
    update = Update(trained, told.examples, told.loss, told.samples)
    lane = accumulate(method, with_key(context), broadcast, lane, client, update)
    lane = lane._replace(layers=lane.layers + told.layers)
    return jax.tree.map(lambda x: x[None], lane)


class PilotSimulator(Simulator):
    """A simulator whose clients are devices.

    Args:
      runs: a single one, which gets one lane.
      devices: the clients, by their numbers.
      journal: their roster.
      at_start: wait for so many of them.
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
        super().__init__([runs[0]._replace(lanes=1, mesh=mesh)], stages, hear, between_calls, cache)
        self._devices, self._journal, self._heard = devices, journal, hear
        self._wire = Wire(self.run)
        self._fold = jax.jit(functools.partial(fold, self.run.method))
        devices.gather(at_start, lambda names: hear(Note(f"{len(names)} of {at_start} devices: {', '.join(names)}")))
        self._count_images()

    def _make_feed(self) -> Feed:
        return streamed(self.run.dataset.train_images, placer(self.run.mesh, BY_LANE))  # of no image, in fact

    def _count_images(self) -> None:
        """Take the numbers of images from the roster; who never joined is drawn and does not report."""
        sizes = np.full(self.run.config.partition.clients, self.run.task.objective.fewest, np.int64)
        for entry in self._journal.roster.values():
            sizes[entry.number] = entry.images or sizes[entry.number]
        self.runs = (self.run._replace(clients=Population.elsewhere(sizes)),)

    def train_cohorts(self, start: RoundStart) -> Trained:
        """Draw the cohort, ask its devices for their updates, and add up those that come."""
        self._journal.open()
        drawn = cohort.draw_cohort(self.run, start.number)
        params, sent = jax.device_get((start.params, start.broadcast.trainable))
        stage, updates = start.stage, dict[int, Any]()

        def check(result: Result) -> None:
            check_numbers(self.run.config, result)
            content = result.arrays.get("update", b"")
            updates[result.client] = self._wire.read_update(stage, content, sent)

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
        reports = self._devices.collect(
            request, drawn.drawn, lambda done, of: self._heard(StepsDone(start.number, done, of))
        )
        self._count_images()
        clients = [client for client in drawn.drawn if client in reports]
        carry = start.carry
        for client in cohort.order_in_lane(self.run, clients) if clients else []:
            result = reports[client].result
            numbers = np.float32(result.examples), np.float32(result.loss), result.samples, result.layers
            told = Told(*map(jax.numpy.asarray, numbers))
            carry = self._fold(start.context, start.broadcast, carry, np.int32(client), updates[client], told)
        self._record(stage, start.number, reports)
        work = cohort.pack_cohort(self.run, clients, start.number)
        fields = {
            "download_bytes": sum(report.payload_down for report in reports.values()),
            "upload_bytes": sum(report.payload_up for report in reports.values()),
        }
        return Trained(carry, [drawn._replace(reporting=clients)], [work], [fields])

    def _record(self, stage: Stage, number: int, reports: dict[int, Report]) -> None:
        """Write a line for each report: what it took, beside what the ledger says."""
        for client, report in reports.items():
            download, upload = self._traffic[0].of_client(stage, report.lacking)
            result = report.result
            self._journal.write(
                {
                    "round": number,
                    "stage": stage.number,
                    "client": client,
                    "name": self._devices.name_of(client),
                    "predicted": {"download": download, "upload": upload},
                    "measured": {
                        "payload_down": report.payload_down,
                        "payload_up": report.payload_up,
                        "train_seconds": round(result.train_seconds, 4),
                        "compile_seconds": round(result.compile_seconds, 4),
                        "message_seconds": round(report.message_seconds, 4),
                        "peak_rss": result.peak_bytes,
                        "program_bytes": result.program_bytes,
                    },
                }
            )
