"""The simulator, which runs the rounds of a prepared run on its devices."""

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lwfedssl_jax.costs.traffic import make_traffic
from lwfedssl_jax.method import canaries as canaries_of
from lwfedssl_jax.method.aggregation import Canaries, RoundContext
from lwfedssl_jax.method.pacing import end_stage, loss_fall
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.task import Broadcast
from lwfedssl_jax.simulation import cohort
from lwfedssl_jax.simulation.dictionary import Dictionary
from lwfedssl_jax.simulation.events import Hear, StepsDone, ignore
from lwfedssl_jax.simulation.feed import Feed, resident, streamed
from lwfedssl_jax.simulation.lanes import placer
from lwfedssl_jax.simulation.lines import empty_line, trained_fields
from lwfedssl_jax.simulation.memories import recall, remember
from lwfedssl_jax.simulation.packing import PackedRound, Schedule, side_by_side
from lwfedssl_jax.simulation.program import BROADCAST_BY_RUN, Before, Program, Programs, idle_call
from lwfedssl_jax.simulation.rounds import ALL, BY_LANE, SCHEDULE_BY_LANE, Carry, Work
from lwfedssl_jax.simulation.server import ServerTraining
from lwfedssl_jax.simulation.setup import (
    RESIDENT_SHARE,
    Cache,
    Prepared,
    initial_params,
    not_finite,
    with_fewer_lanes,
)
from lwfedssl_jax.simulation.stack import Stack
from lwfedssl_jax.simulation.state import RoundStart, RoundState, Trained, resume_one
from lwfedssl_jax.system import seeds
from lwfedssl_jax.system.devices import from_first, memory_limit, program_memory
from lwfedssl_jax.tree import Tree

SECONDS_PER_CALL = 5.0  # progress is seen after each call


class Outcome(NamedTuple):
    """A round's outcome for one run: its line of ``metrics.jsonl``, and an error if no update is finite."""

    line: dict[str, Any]
    error: FloatingPointError | None


class RoundResult(NamedTuple):
    """The global parameters and the state after a round (of all stacked runs), each outcome, and the stage.

    The stage is as it was, or ends with the round.
    """

    params: Tree
    state: RoundState
    outcomes: list[Outcome]
    stage: Stage


class Simulator:
    """A run on its devices, or several that are stacked: where the images are, and the programs compiled so far.

    Stacked runs (``can_stack``) run each round in one program; parameters and state then have a leading axis over
    runs (``stack``).

    Args:
      runs: one, or several that can be stacked.
      stages: those to compile now; by default, programs are compiled when they are needed. If the number of
        lanes was chosen automatically, it is reduced until these programs fit into memory.
      hear: called with compilations and steps.
      between_calls: called after each call of a round's program; may raise to abandon the round.
      cache: shared with other simulators of this process.

    Attributes:
      runs: with the lanes and devices that are used.
      skipped: names of programs that are not needed (``Program``).

    Raises:
      ConfigError: the number of lanes that the config sets, or a single lane, does not fit into memory.
      MemoryError: the stacked runs do not fit into memory together.
    """

    skipped: frozenset[str] = frozenset()

    def __init__(
        self,
        runs: Sequence[Prepared],
        stages: Sequence[Stage] = (),
        hear: Hear = ignore,
        between_calls: Callable[[], None] = lambda: None,
        cache: Cache | None = None,
    ) -> None:
        batch = max(run.batch for run in runs)
        self.runs = tuple(run._replace(batch=batch) for run in runs)
        self._hear, self._between_calls, self._cache = hear, between_calls, cache or Cache()
        # Steps per call; several processes must make the same calls.
        self._call_steps = 1 if jax.process_count() == 1 else cohort.CALL_STEPS
        shapes = jax.eval_shape(lambda: initial_params(self.run))
        self._losses: list[float] = []  # of all rounds so far, if stages depend on them
        self._traffic = [make_traffic(run.config, shapes, run.layers, len(run.clients)) for run in self.runs]
        self._set_up()
        while (needed := self._needed(stages)) > (limit := memory_limit(self.run.mesh)):
            if not self.stack.is_single:
                raise MemoryError(f"{len(self.runs)} runs together need {needed} bytes on each device")
            self.runs = (with_fewer_lanes(self.run, needed, limit),)
            self._set_up()

    def _set_up(self) -> None:
        self.stack = Stack(len(self.runs), self.run.mesh)
        self._feed = self._make_feed()
        self._programs = Programs(self.run, self.stack, self._feed, self._cache, self._hear, self.skipped)
        self._server = ServerTraining(self.run, self._cache, self._hear)
        self._hyper = self.stack.gather([run.hyper for run in self.runs])

    def _make_feed(self) -> Feed:
        mesh, images, kind = self.run.mesh, self.run.dataset.train_images, self.run.config.runtime.feed
        if kind == "resident" or (kind == "auto" and images.nbytes < RESIDENT_SHARE * memory_limit(mesh)):
            key = self.run.config.data, mesh
            return self._cache.get_latest("images", key, lambda: resident(images, placer(mesh, ALL)))
        return streamed(images, placer(mesh, self.stack.spec(BY_LANE)))

    def _needed(self, stages: Sequence[Stage]) -> int:
        programs = [program for stage in stages for program in (self.program(stage).steps, self.program(stage).embed)]
        return max((program_memory(program) for program in programs if program), default=0)

    @property
    def run(self) -> Prepared:
        """The run, or the first of those that are stacked."""
        return self.runs[0]

    @functools.cached_property
    def _extras(self) -> Tree:
        """What every broadcast has in addition to the model."""
        return self.stack.place(from_first(self._server.extras))

    def program(self, stage: Stage) -> Program:
        """Return the programs of a stage, compiled once for all stages of the same shapes."""
        return self._programs.of(stage)

    def resume(
        self, rounds: int, saved: Sequence[Tree], losses: Sequence[float] = ()
    ) -> tuple[Tree, RoundState | None]:
        """Continue after ``rounds`` rounds.

        Args:
          rounds: how many are finished.
          saved: what ``state_to_save`` returned for each run; empty for a new run.
          losses: of the finished rounds, with ``strategy.pacing`` adaptive; the stages must fit them (``pacing.py``).

        Returns:
          The parameters, on all devices, and the state, None at a stage's beginning.
        """
        self._losses = list(losses)
        each = zip(self.runs, self._traffic, saved, strict=True)
        resumed = [resume_one(run, traffic, rounds, content) for run, traffic, content in each]
        params, states = self.stack.gather([params for params, _ in resumed]), [state for _, state in resumed]
        if (first := states[0]) is None:
            return params, None
        server = self.stack.gather([state.server for state in states if state])
        return params, RoundState(server, first.clients, first.exchange)

    def run_rounds(self, stage: Stage, params: Tree, state: RoundState | None, number: int) -> RoundResult:
        """Run one round of each run: draw the cohort, train the clients that report, aggregate their parameters.

        Args:
          stage: that the round is in.
          params: the global parameters, on all devices (``stack.place``).
          state: as the round before left it; None in a stage's first round.
          number: of the round, from 1.

        Returns:
          The new global parameters (the old ones if no client reports), the new state, each run's outcome, and the
          stage. The arguments are not changed; with ``strategy.pacing`` adaptive, the simulator's stages may be.
        """
        extras = self._extras  # before the clock starts: the base model's training is not part of a round
        began, program = time.monotonic(), self.program(stage)
        broadcast, carry, state = self.begin(program, stage, params, state, extras)
        context = self.context(stage, number, state.server)
        trained = self.train_cohorts(RoundStart(stage, number, program, broadcast, carry, context, state, params))
        per_run = list(zip(self.runs, self._traffic, trained.cohorts, trained.fields, strict=True))
        lines = [
            dict[str, Any](empty_line(run, stage, number, traffic, clients, state.exchange)) | fields
            for run, traffic, clients, fields in per_run
        ]
        if any(trained.works) or self.run.aggregator.finishes_empty:
            before = Before(params, self.stack.place(stage.rows), state.server)
            after = program.finish(before, broadcast, trained.carry, context)
            params, state = after.params, state._replace(server=after.state)
            for i, work in enumerate(trained.works):
                measured = jax.device_get(self.stack.select(i, after.measured))
                if work:
                    lines[i] |= trained_fields(self.runs[i], stage, work, trained.cohorts[i], measured)
                if work or self.run.aggregator.finishes_empty:
                    lines[i] |= {name: value.tolist() for name, value in measured["aggregator"].items()}
            if trained.exchange and lines[0]["left_out"] < lines[0]["clients"]:
                state = state._replace(exchange=trained.exchange)
            is_used = lines[0]["left_out"] < lines[0]["clients"] or self.run.aggregator.finishes_empty
            if self._server.calibrates and is_used:
                calibrated, lines[0]["calibration_loss"] = self._server.after_round(stage, params, number)
                params = self.stack.place(from_first(calibrated))
        seconds = round((time.monotonic() - began) / len(self.runs), 4)
        if self.run.config.strategy.pacing == "adaptive":
            stage, pace = self._pace(stage, lines[0]["loss"])
            lines[0] |= pace
        outcomes = [outcome(run, line | {"seconds": seconds}) for run, line in zip(self.runs, lines, strict=True)]
        return RoundResult(params, state, outcomes, stage)

    def train_cohorts(self, start: RoundStart) -> Trained:
        """Draw each run's cohort, and train the clients that report; changes ``start.state.clients``."""
        program, number = start.program, start.number
        cohorts = [cohort.draw_cohort(run, number) for run in self.runs]
        works = [
            cohort.pack_cohort(run, clients.reporting, number) for run, clients in zip(self.runs, cohorts, strict=True)
        ]
        trained = Trained(start.carry, cohorts, works, [{} for _ in self.runs])
        if not any(works):
            return trained
        dictionary = None
        if self.run.exchange.embeddings:
            dictionary = Dictionary(self.run, cohorts[0].drawn, number, self._between_calls)

        def keep(carry: Carry, schedule: Schedule) -> None:
            if self.run.keeps_clients:
                remember(start.state.clients, carry, schedule, start.stage)
            if dictionary:
                dictionary.add(program, self._feed, carry, start.broadcast, schedule, start.context)

        carry = self.train(start, works, keep)
        return trained._replace(carry=carry, exchange=dictionary.state if dictionary else None)

    def noise_only(self, clips: Sequence[np.ndarray]) -> Tree:
        """Return what all rounds' noise makes of the initial parameters if no client reports (``privacy.private``).

        Args:
          clips: of each run, the clip's norm in each round, since an adapted clip depends on the clients.
        """
        extras, params = self._extras, self.stack.gather([initial_params(run) for run in self.runs])
        for stage in self.run.stages:
            program, rows, state = self.program(stage), self.stack.place(stage.rows), None
            for number in range(stage.first_round + 1, stage.last_round + 1):
                broadcast, carry, state = self.begin(program, stage, params, state, extras)
                scales = [np.float32(clip[number - 1] / clip[stage.first_round]) for clip in clips]
                server = state.server._replace(scale=self.stack.gather(scales))
                context = self.context(stage, number, server)
                if context.canaries is not None:
                    silent = jax.tree.map(np.zeros_like, jax.device_get(context.canaries.uploads))
                    context = context._replace(canaries=context.canaries._replace(uploads=self.stack.place(silent)))
                after = program.finish(Before(params, rows, server), broadcast, carry, context)
                params, state = after.params, state._replace(server=after.state)
                if self._server.calibrates:
                    calibrated, _ = self._server.after_round(stage, params, number)
                    params = self.stack.place(from_first(calibrated))
                self._between_calls()
        return params

    def _pace(self, stage: Stage, loss: float | None) -> tuple[Stage, dict[str, Any]]:
        """End a stage whose rounds no longer pay; return it as it is now, and what the round's line says about it."""
        self._losses.append(math.nan if loss is None else loss)
        pace = loss_fall(self.run.stages, self._losses)
        self.runs = (self.run._replace(stages=end_stage(self.run.stages, self._losses)),)
        stage = self.run.stages[stage.number - 1]
        return stage, {"loss_fall": pace, "stage_ends": stage.last_round == len(self._losses)}

    def begin(
        self, program: Program, stage: Stage, params: Tree, state: RoundState | None, extras: Tree
    ) -> tuple[Broadcast, Carry, RoundState]:
        """The round's broadcast, the empty round, and the state, of which this round may change ``clients``."""
        exchange = state.exchange if state else self.run.exchange.start()
        rows, depths = self.stack.place(stage.rows), self.stack.place(stage.depths)
        broadcast, carry = program.start(params, rows, depths, extras | self.stack.place(exchange))
        if state:
            return broadcast, carry, state._replace(clients=dict(state.clients))
        server = self.stack.vmap(self.run.aggregator.init, (BROADCAST_BY_RUN,))(broadcast)
        return broadcast, carry, RoundState(server, {}, exchange)

    def context(self, stage: Stage, number: int, server: Tree) -> RoundContext:
        """The context of a round, before which ``server`` is the aggregator's state."""

        def keys(tag: seeds.KeyTag, path: int) -> jax.Array:
            of_runs = [seeds.key(run.config.runtime.seed, tag, path) for run in self.runs]
            placed: jax.Array = self.stack.gather([np.asarray(jax.random.key_data(key)) for key in of_runs])
            return placed

        canaries = None
        if self.run.config.privacy.canaries:
            uploads = [
                canaries_of.uploads(run.config, stage, number, cohort.probability(run, number)) for run in self.runs
            ]
            canaries = Canaries(self.stack.gather(uploads), keys(seeds.KeyTag.CANARIES, stage.number))
        return RoundContext(
            number=self.stack.place(np.int32(number)),
            key=keys(seeds.KeyTag.ROUND, number),
            hyper=self._hyper,
            expected=self.stack.gather([np.float32(cohort.expected_reports(run, number)) for run in self.runs]),
            shared=self.stack.vmap(self.run.aggregator.shared, (0,))(server),
            canaries=canaries,
        )

    def train(
        self,
        start: RoundStart,
        works: Sequence[PackedRound | None],
        keep: Callable[[Carry, Schedule], None] = lambda carry, schedule: None,
    ) -> Carry:
        """Run the round's local training, call by call, and ``keep`` after each."""
        carry, number = start.carry, start.number
        put_schedule = placer(self.run.mesh, self.stack.spec(SCHEDULE_BY_LANE))
        total, done = max(work.length for work in works if work), 0
        calls = self._feed.serve(self._calls(works))
        call = next(calls, None)
        while call is not None:
            images, host_schedule, steps = call
            schedule = put_schedule(host_schedule)
            memory = None
            if self.run.keeps_clients:
                memory = recall(self.run.start.empty_memory, start.state.clients, host_schedule, self.run.mesh)
            first, call = 0, None
            while first < steps:
                count = min(self._call_steps, steps - first)
                asked = time.monotonic()
                work = Work(images, schedule, *self.stack.place((np.int32(first), np.int32(count))))
                carry = start.program.steps(carry, start.broadcast, memory, work, start.context)
                if first + count == steps:
                    call = next(calls, None)  # made while the device works
                jax.block_until_ready(carry)
                first, done = first + count, done + count
                if jax.process_count() == 1:
                    self._call_steps = max(1, int(count * SECONDS_PER_CALL / (time.monotonic() - asked)))
                self._hear(StepsDone(number, done, total))
                self._between_calls()
            keep(carry, host_schedule)
        return carry

    def _calls(self, works: Sequence[PackedRound | None]) -> Iterator[tuple[Schedule, int]]:
        calls = [work.calls if work else iter(()) for work in works]
        return calls[0] if self.stack.is_single else side_by_side(calls, idle_call(self.run))


def outcome(run: Prepared, line: dict[str, Any]) -> Outcome:
    """Return a round's line, and an error if the updates of all reporting clients were left out."""
    failed = 0 < line["clients"] == line["left_out"]
    return Outcome(line, not_finite(run.config, "no client's update is finite", line["round"]) if failed else None)
