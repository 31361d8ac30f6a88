"""The simulator: rounds of a prepared run on its devices."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec

from lwfedssl_jax import tree
from lwfedssl_jax.costs.traffic import Traffic
from lwfedssl_jax.method import calibration, fedca
from lwfedssl_jax.method.programs import program_config
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.stateful_clients import Memory, to_memory
from lwfedssl_jax.method.task import Broadcast
from lwfedssl_jax.simulation import cohort, feed
from lwfedssl_jax.simulation.cohort import draw_cohort, pack_cohort
from lwfedssl_jax.simulation.events import Listener
from lwfedssl_jax.simulation.lanes import placer
from lwfedssl_jax.simulation.lines import empty_line, trained_fields
from lwfedssl_jax.simulation.packing import PackedRound, Schedule, idle_schedule, side_by_side
from lwfedssl_jax.simulation.program import BROADCAST_BY_RUN, Program, by_run, compile_stage
from lwfedssl_jax.simulation.rounds import ALL, BY_LANE, PLAN_BY_LANE, Carry
from lwfedssl_jax.simulation.setup import (
    RESIDENT_SHARE,
    Cache,
    Prepared,
    check_finite,
    initial_params,
    not_finite,
    with_fewer_lanes,
)
from lwfedssl_jax.simulation.state import RoundState, resume_one
from lwfedssl_jax.system.devices import from_first, memory_limit, program_memory
from lwfedssl_jax.system.seeds import BASE_STREAM, SERVER_STREAM, round_key, stream_key
from lwfedssl_jax.tree import Tree

SECONDS_OF_A_CALL = 5.0  # progress is seen after each call


class Simulator:
    """A run on its devices, or several that go together: where the images are, and the programs compiled so far.

    Runs that go together (``go_together``) make each round as one program, by ``vmap``; parameters and state then
    have a leading run axis.

    Args:
      run: what is to be run.
      stages: what is compiled now; by default nothing is before it is needed. Lanes that were
        not asked for become fewer where these need more memory than there is.
      listener: hears of compilations and steps.
      between_calls: called after each call of a round's program; may raise to give the round up.
      shared: with other simulators of this process.
      others: that go together with ``run``.

    Attributes:
      runs: with as many lanes and devices as are used.

    Raises:
      ConfigError: the lanes that the user asks for, or a single one, do not fit the memory.
      MemoryError: so many runs together do not fit.
    """

    def __init__(
        self,
        run: Prepared,
        stages: Sequence[Stage] = (),
        listener: Listener | None = None,
        between_calls: Callable[[], None] = lambda: None,
        shared: Cache | None = None,
        others: Sequence[Prepared] = (),
    ) -> None:
        self.runs = (run, *others)
        self._listener = listener or Listener()
        self._between_calls = between_calls
        self._shared = shared or Cache()
        # Steps of a call; several processes must make the same calls.
        self._pace = 1 if jax.process_count() == 1 else cohort.CALL_STEPS
        shapes = jax.eval_shape(lambda: initial_params(run))
        self._traffic = [
            Traffic(
                shapes,
                each.layers,
                len(each.clients),
                calibrated=bool(each.config.additions.calibration_steps),
                dictionary=fedca.dictionary_bytes(each.config),
                base=fedca.has_base(each.config),
            )
            for each in self.runs
        ]
        self._set_up()
        while (needed := max((self._needed(stage) for stage in stages), default=0)) > self._limit:
            if others:
                raise MemoryError(f"{len(self.runs)} runs together need {needed} bytes on each device")
            self.runs = (with_fewer_lanes(self.run, needed, self._limit),)
            self._set_up()

    def _set_up(self) -> None:
        mesh, images, kind = self.run.mesh, self.run.dataset.train_images, self.run.config.runtime.feed
        self._limit = memory_limit(mesh)
        self._resident = kind == "resident" or (kind == "auto" and images.nbytes < RESIDENT_SHARE * self._limit)
        if self._resident:
            place = lambda: feed.resident(images, placer(mesh, ALL))  # noqa: E731
            self._feed = self._shared.latest("images", (self.run.config.data, mesh), place)
        else:
            self._feed = feed.streamed(images, placer(mesh, self._by_run(BY_LANE)))
        numbers = [jax.tree.map(functools.partial(np.asarray, dtype=r.task.dtype), r.task.hyper) for r in self.runs]
        self._hyper = self._gather(numbers)

    @property
    def run(self) -> Prepared:
        """The run, or the first of those that go together."""
        return self.runs[0]

    def _needed(self, stage: Stage) -> int:
        return program_memory(self.program(stage).steps)

    def place(self, x: Tree) -> Tree:
        """Arrays on all devices, the same on each."""
        return jax.tree.map(placer(self.run.mesh, ALL), x)

    def _gather(self, of_runs: Sequence[Tree]) -> Tree:
        """Each run's arrays, on all devices."""
        return self.place(jax.device_get(of_runs[0]) if len(of_runs) == 1 else tree.stack(jax.device_get(of_runs)))

    def _by_run(self, spec: PartitionSpec) -> PartitionSpec:
        return spec if len(self.runs) == 1 else PartitionSpec(None, *spec)

    def of_run(self, number: int, x: Tree) -> Tree:
        """One run's part of parameters or state."""
        return x if len(self.runs) == 1 else jax.tree.map(lambda leaf: leaf[number], x)

    def program(self, stage: Stage) -> Program:
        """The programs of a stage, compiled once for all stages of the same shapes."""
        run, count = self.run, len(self.runs)

        def compiled() -> Program:
            together = f"{count} runs, each with " if count > 1 else ""
            self._listener.compiling(f"the round, {together}{run.lanes} lane{'s' * (run.lanes > 1)}")
            return compile_stage(run, stage, self._feed, count)

        shapes = str((jax.tree.map(np.shape, stage.rows), jax.tree.map(np.any, stage.frozen)))
        layout = run.lanes, run.mesh, count, self._resident
        return self._shared.once(("round", program_config(run.config), layout, shapes), compiled)

    def run_round(
        self, stage: Stage, params: Tree, state: RoundState | None, number: int
    ) -> tuple[Tree, RoundState, dict[str, Any]]:
        """``run_rounds`` of the only run.

        Raises:
          FloatingPointError: no client's update is finite.
        """
        params, state, (line,) = self.run_rounds(stage, params, state, number)
        if isinstance(line, FloatingPointError):
            raise line
        return params, state, line

    def run_rounds(
        self, stage: Stage, params: Tree, state: RoundState | None, number: int
    ) -> tuple[Tree, RoundState, list[dict[str, Any] | FloatingPointError]]:
        """One round of each run: draw the cohort, train the clients that report, aggregate what they trained.

        Args:
          stage: that the round is in.
          params: the global parameters, as ``place`` gives them.
          state: as the round before left it; None in a stage's first round.
          number: of the round, from 1.

        Returns:
          The new global parameters (the old ones if nobody reports), the new state, and each run's metrics line,
          or what is wrong where no client's update is finite. What was passed in stays as it was.
        """
        base = self._base
        began = time.monotonic()
        program, run = self.program(stage), self.run
        cohorts = [draw_cohort(each, number) for each in self.runs]
        if state is None:
            dictionary = self._gather([fedca.empty(each.config, each.task) for each in self.runs])
        else:
            dictionary = state.dictionary
        slots = [fedca.padded(each.config, cohort) for each, (cohort, _) in zip(self.runs, cohorts, strict=True)]
        of_cohort = {"cohort": self._gather(slots)} if dictionary else {}
        rows = self.place(stage.rows)
        depths = self.place(stage.depths)
        sent, carry = program.start(params, rows, depths, base | dictionary | of_cohort)
        clients = {} if state is None else dict(state.clients)
        server = (
            by_run(run.aggregator.init, (BROADCAST_BY_RUN,), len(self.runs))(sent) if state is None else state.server
        )
        lines = [
            empty_line(each, stage, number, traffic, *cohort)
            for each, traffic, cohort in zip(self.runs, self._traffic, cohorts, strict=True)
        ]
        works = [
            pack_cohort(each, reporting, number) if reporting else None
            for each, (_, reporting) in zip(self.runs, cohorts, strict=True)
        ]
        if any(works):
            carry = self._train(program, sent, carry, clients, works, number)
            params, server, measured, dictionary = program.finish(params, rows, server, sent, carry)
            for i, (work, (_, reporting)) in enumerate(zip(works, cohorts, strict=True)):
                if work is not None:
                    of_run = jax.device_get(self.of_run(i, measured))
                    lines[i] |= trained_fields(self.runs[i], stage, work, reporting, of_run)
            if run.config.additions.calibration_steps and lines[0]["left_out"] < lines[0]["clients"]:
                key = jax.random.fold_in(stream_key(run.config.runtime.seed, SERVER_STREAM), number)
                steps = run.config.additions.calibration_steps
                calibrated, lines[0]["calibration_loss"] = self._calibrate(stage, params, steps, key)
                params = self.place(from_first(calibrated))
                check_finite(run.config, "the calibration's loss is not finite", number, lines[0]["calibration_loss"])
        seconds = round((time.monotonic() - began) / len(self.runs), 4)
        return (
            params,
            RoundState(server, clients, dictionary),
            [
                not_finite(each.config, "no client's update is finite", number)
                if 0 < line["clients"] == line["left_out"]
                else line | {"seconds": seconds}
                for each, line in zip(self.runs, lines, strict=True)
            ],
        )

    def _train(
        self,
        program: Program,
        sent: Broadcast,
        carry: Carry,
        clients: dict[int, Memory],
        works: Sequence[PackedRound | None],
        number: int,
    ) -> Carry:
        """The round's local training, call by call; ``clients`` get what they keep of it."""
        keys = [np.asarray(jax.random.key_data(round_key(run.config.runtime.seed, number))) for run in self.runs]
        key = self._gather(keys)
        put_plan = placer(self.run.mesh, self._by_run(PLAN_BY_LANE))
        total, done = max(work.length for work in works if work), 0
        pieces = self._feed(self._calls(works))
        piece = next(pieces, None)
        while piece is not None:
            images, host_plan, steps = piece
            plan = jax.tree.map(put_plan, host_plan)
            memory = self._recall(clients, host_plan)
            first, piece = 0, None
            while first < steps:
                count = min(self._pace, steps - first)
                asked = time.monotonic()
                which = self.place((np.int32(first), np.int32(count)))
                carry = program.steps(carry, sent, memory, images, plan, *which, key, self._hyper)
                if first + count == steps:
                    piece = next(pieces, None)  # made while the device works
                jax.block_until_ready(carry)
                first, done = first + count, done + count
                if jax.process_count() == 1:
                    self._pace = max(1, int(count * SECONDS_OF_A_CALL / (time.monotonic() - asked)))
                self._listener.steps(number, done, total)
                self._between_calls()
            self._remember(clients, carry, host_plan)
        return carry

    def _calls(self, works: Sequence[PackedRound | None]) -> Iterator[tuple[Schedule, int]]:
        if len(works) == 1:
            return works[0].calls if works[0] else iter(())
        idle = idle_schedule(cohort.CALL_STEPS, self.run.lanes, self.run.config.optimizer.batch_size)
        return side_by_side([work.calls if work else iter(()) for work in works], idle)

    def take_up(self, rounds: int, saved: Tree, *of_others: Tree) -> tuple[Tree, RoundState | None]:
        """Continue after so many rounds with what ``to_save`` gave; from the beginning where that is empty.

        Returns:
          The parameters, on all devices, and the state, None at a stage's beginning.
        """
        taken = [
            resume_one(run, traffic, rounds, of_run)
            for run, traffic, of_run in zip(self.runs, self._traffic, (saved, *of_others), strict=True)
        ]
        params, states = self._gather([params for params, _ in taken]), [state for _, state in taken]
        if (first := states[0]) is None:
            return params, None
        server, dictionary = self._gather([(s.server, s.dictionary) for s in states if s])
        return params, RoundState(server, first.clients, dictionary)

    @functools.cached_property
    def _base(self) -> Tree:
        """What of ``Sent.shared`` no round changes: the base model, which is trained now, and the public images."""
        run = self.run
        if not fedca.has_base(run.config):
            return {}
        (stage,), key = run.stages, stream_key(run.config.runtime.seed, BASE_STREAM)
        params, loss = self._calibrate(stage, initial_params(run), run.config.additions.base_steps, key)
        check_finite(run.config, "the base model's loss is not finite", 0, loss)
        base = jax.device_get(tree.take(params, stage.rows))
        return self.place({"base": from_first(base), "public": run.server_images})

    def _recall(self, clients: dict[int, Memory], plan: Schedule) -> Memory | None:
        """Memories of the clients that lanes begin in a call, on the lanes' devices; other lanes get an empty one."""
        if self.run.no_memory is None:
            return None
        empty, begins = self.run.no_memory, plan.busy[0] & (plan.step[0] == 0)
        lanes = [clients.get(int(c), empty) if b else empty for c, b in zip(plan.client[0], begins, strict=True)]
        put = placer(self.run.mesh, BY_LANE)
        return jax.tree.map(lambda *of_lanes: put(np.stack(of_lanes)), *lanes)

    def _remember(self, clients: dict[int, Memory], carry: Carry, plan: Schedule) -> None:
        """Keep the finite models of the clients that a call has finished, one at most in a lane."""
        if self.run.no_memory is None:
            return
        lanes, losses = jax.device_get((to_memory(carry.client), carry.loss))
        for lane in np.flatnonzero(plan.weight.max(axis=0)):
            memory = jax.tree.map(lambda x, lane=lane: np.array(x[lane]), lanes)
            if all(np.isfinite(x).all() for x in jax.tree.leaves((memory, losses[lane]))):
                clients[int(plan.client[0, lane])] = memory

    def _calibrate(self, stage: Stage, params: Tree, steps: int, key: jax.Array) -> tuple[Tree, float]:
        """The server's own training, on one device; what it gives is on the host."""
        run = self.run
        stage = calibration.all_trainable(stage, run.layers)

        def traced() -> Callable[..., tuple[Tree, jax.Array]]:
            self._listener.compiling("the server's training")
            return jax.jit(functools.partial(calibration.calibrate, run.task, run.config.optimizer.batch_size, steps))

        shapes = str(jax.tree.map(np.shape, stage.rows))
        calibrate = self._shared.once(("calibration", program_config(run.config), steps, shapes), traced)
        hyper, params = jax.device_get((self._hyper, params))
        params, loss = calibrate(hyper, params, stage.rows, np.int32(stage.depth), run.server_images, key)
        return jax.device_get(params), float(loss)
