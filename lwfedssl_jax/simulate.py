"""The simulator: a config, its data and its stages, and the rounds run on the devices."""

import functools
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from lwfedssl_jax import calibration, evaluate, fedca, tree
from lwfedssl_jax.aggregation import Aggregator, make_aggregator
from lwfedssl_jax.checks import check
from lwfedssl_jax.client import Hyper, Sent, Task, init_params, make_task, param_layers, program_config
from lwfedssl_jax.config import Config, ConfigError, override
from lwfedssl_jax.data import feed, sources
from lwfedssl_jax.data.partition import Population, partition, server_examples
from lwfedssl_jax.data.sources import Dataset
from lwfedssl_jax.devices import SAMPLES_AT_ONCE, from_first, lanes_and_mesh, memory_limit, placer, program_memory
from lwfedssl_jax.fleet import Fleet
from lwfedssl_jax.packing import Plan, Round, empty_plan, plan_round, side_by_side
from lwfedssl_jax.rounds import ALL, BY_LANE, LANES, PLAN_BY_LANE, Carry, finish_round, run_steps, start_round
from lwfedssl_jax.stages import Stage, make_stages
from lwfedssl_jax.starts import Memory, Start, keep, make_start, no_memory
from lwfedssl_jax.traffic import Traffic
from lwfedssl_jax.tree import Tree

CALL_STEPS = 32  # steps that are laid out, and at most run, at once
SECONDS_OF_A_CALL = 5.0  # progress is seen after each call
GIB = 2**30
RESIDENT_SHARE = 0.25  # of a device's memory that the images may take before they are streamed

# Streams of the seed; clients add round, client and step to theirs.
INIT_STREAM, ROUND_STREAM, SERVER_STREAM, BASE_STREAM = 0, 1, 2, 3
SAMPLING_STREAM, BATCHES_STREAM = 1, 2  # of NumPy's generators; 0 and 3 are the partition's


Made = TypeVar("Made")
# What of ``Sent`` has a run axis where runs go together: all but what the stage alone says.
OF_STAGE = ("present", "depth", "frozen_depth", "droppable")
SENT_BY_RUN = Sent._make(None if name in OF_STAGE else 0 for name in Sent._fields)


class Listener:
    """Hears how a run goes; every method may be overridden."""

    def loading(self, what: str) -> None:
        """So much of the data set is there."""

    def note(self, what: str) -> None:
        """Something that the user should know."""

    def start(self, run: "Run", finished_rounds: int) -> None:
        """The run begins, or continues after so many rounds."""

    def compiling(self, what: str) -> None:
        """A compilation begins."""

    def stage(self, stage: Stage) -> None:
        """A stage's rounds begin."""

    def steps(self, round_number: int, done: int, total: int) -> None:
        """So many of a round's steps are done."""

    def round(self, line: dict[str, Any]) -> None:
        """A round's line of ``metrics.jsonl``."""

    def fine_tuning(self, what: str) -> None:
        """An epoch of fine-tuning begins."""

    def evaluation(self, line: dict[str, Any]) -> None:
        """An evaluation's line of ``metrics.jsonl``."""

    def finished(self, summary: dict[str, Any]) -> None:
        """The run is over and its summary written."""


class Run(NamedTuple):
    """A config and all that is derived from it before anything is compiled."""

    config: Config
    dataset: Dataset
    clients: Population
    server_images: np.ndarray
    task: Task
    layers: Tree
    stages: list[Stage]
    lanes: int
    mesh: Mesh
    encode: evaluate.Encode
    aggregator: Aggregator
    start: Start | None
    no_memory: Memory | None
    fleet: Fleet | None = None


class Shared:
    """What the runs of a process have in common, made once: data sets, programs, ledgers."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` gave when the key was new."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def latest(self, kind: str, key: Hashable, make: Callable[[], Made]) -> Made:
        """As ``once``, but of what is large only the last is kept."""
        if self._made.get(kind, (None,))[0] != key:
            self._made.pop(kind, None)  # before the next one is made
            self._made[kind] = key, make()
        made: Made = self._made[kind][1]
        return made


class State(NamedTuple):
    """What lasts from round to round of a stage besides the parameters; of runs that go together, a leading run axis.

    Attributes:
      server: the aggregator's state.
      clients: what clients keep, by their number.
      dictionary: FedCA's, from the round before; empty without it.
    """

    server: Tree
    clients: dict[int, Memory]
    dictionary: Tree


class Program(NamedTuple):
    """The compiled programs of a stage, and of all stages of the same shapes.

    Attributes:
      start: ``(params, rows, depths, shared) -> (sent, empty carry)``.
      steps: ``(carry, sent, memory, images, plan, first, steps, round_key, hyper) -> carry``.
      finish: ``(params, rows, state, sent, carry) -> (params with the average put in, state, measured, dictionary)``.
    """

    start: jax.stages.Compiled
    steps: jax.stages.Compiled
    finish: jax.stages.Compiled


def prepare(
    config: Config,
    devices: Sequence[Any] | None = None,
    listener: Listener | None = None,
    shared: Shared | None = None,
) -> Run:
    """Load the data, deal it out, lay out the stages; nothing is compiled.

    Args:
      config: resolved.
      devices: to be used; by default all.
      listener: hears how the data is loaded.
      shared: with other runs of this process.

    Raises:
      ConfigError: the data set is not installed or does not serve the partition or a protocol, or
        parts of the config do not go together; the server's images do not fit a device.
    """
    listener, shared = listener or Listener(), shared or Shared()
    check(config)
    task = make_task(config)
    layers = param_layers(task, jax.eval_shape(lambda: init_params(task, jax.random.key(0))))
    stages = make_stages(config, layers)
    aggregator, start = make_aggregator(config), make_start(config, task)
    load = lambda: sources.find(config.data).load(config.data, listener.loading, listener.note)  # noqa: E731
    dataset = shared.latest("data", config.data, load)
    evaluate.check(config.evaluation, dataset)
    of_server = server_examples(config.partition, dataset.train_labels, config.runtime.seed)
    clients = partition(config.partition, dataset.train_labels, config.runtime.seed, dataset.train_clients)
    lanes, mesh = lanes_and_mesh(config, LANES, devices)
    size, room = len(of_server) * dataset.train_images[0].nbytes, int(RESIDENT_SHARE * memory_limit(mesh))
    if size > room:  # they stay on the device
        raise ConfigError(
            f"partition.server_share: {config.partition.server_share} gives the server {size / GIB:.3g} GiB of images, "
            f"and {room / GIB:.3g} GiB of a device are for them; "
            f"accepted: at most {config.partition.server_share * room / size:.2g}"
        )
    return Run(
        config,
        dataset,
        clients,
        dataset.train_images[of_server],
        task,
        layers,
        stages,
        lanes,
        mesh,
        shared.once(
            ("encode", program_config(config)), lambda: evaluate.make_encode(task.encoder, task.recipe, task.dtype)
        ),
        aggregator,
        start,
        no_memory(task, stages[0]) if start else None,
    )


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
        run: Run,
        stages: Sequence[Stage] = (),
        listener: Listener | None = None,
        between_calls: Callable[[], None] = lambda: None,
        shared: Shared | None = None,
        others: Sequence[Run] = (),
    ) -> None:
        self.runs = (run, *others)
        self._listener = listener or Listener()
        self._between_calls = between_calls
        self._shared = shared or Shared()
        # Steps of a call; several processes must make the same calls.
        self._pace = 1 if jax.process_count() == 1 else CALL_STEPS
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
    def run(self) -> Run:
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
        self, stage: Stage, params: Tree, state: State | None, number: int
    ) -> tuple[Tree, State, dict[str, Any]]:
        """``run_rounds`` of the only run.

        Raises:
          FloatingPointError: no client's update is finite.
        """
        params, state, (line,) = self.run_rounds(stage, params, state, number)
        if isinstance(line, FloatingPointError):
            raise line
        return params, state, line

    def run_rounds(
        self, stage: Stage, params: Tree, state: State | None, number: int
    ) -> tuple[Tree, State, list[dict[str, Any] | FloatingPointError]]:
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
        server = by_run(run.aggregator.init, (SENT_BY_RUN,), len(self.runs))(sent) if state is None else state.server
        lines = [
            begun_line(each, stage, number, traffic, *cohort)
            for each, traffic, cohort in zip(self.runs, self._traffic, cohorts, strict=True)
        ]
        works = [
            lay_out(each, reporting, number) if reporting else None
            for each, (_, reporting) in zip(self.runs, cohorts, strict=True)
        ]
        if any(works):
            carry = self._train(program, sent, carry, clients, works, number)
            params, server, measured, dictionary = program.finish(params, rows, server, sent, carry)
            for i, (work, (_, reporting)) in enumerate(zip(works, cohorts, strict=True)):
                if work is not None:
                    of_run = jax.device_get(self.of_run(i, measured))
                    lines[i] |= measured_line(self.runs[i], stage, work, reporting, of_run)
            if run.config.additions.calibration_steps and lines[0]["left_out"] < lines[0]["clients"]:
                key = jax.random.fold_in(stream_key(run.config.runtime.seed, SERVER_STREAM), number)
                steps = run.config.additions.calibration_steps
                calibrated, lines[0]["calibration_loss"] = self._calibrate(stage, params, steps, key)
                params = self.place(from_first(calibrated))
                check_finite(run.config, "the calibration's loss is not finite", number, lines[0]["calibration_loss"])
        seconds = round((time.monotonic() - began) / len(self.runs), 4)
        return (
            params,
            State(server, clients, dictionary),
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
        sent: Sent,
        carry: Carry,
        clients: dict[int, Memory],
        works: Sequence[Round | None],
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

    def _calls(self, works: Sequence[Round | None]) -> Iterator[tuple[Plan, int]]:
        if len(works) == 1:
            return works[0].calls if works[0] else iter(())
        idle = empty_plan(CALL_STEPS, self.run.lanes, self.run.config.optimizer.batch_size)
        return side_by_side([work.calls if work else iter(()) for work in works], idle)

    def take_up(self, rounds: int, saved: Tree, *of_others: Tree) -> tuple[Tree, State | None]:
        """Continue after so many rounds with what ``to_save`` gave; from the beginning where that is empty.

        Returns:
          The parameters, on all devices, and the state, None at a stage's beginning.
        """
        taken = [
            taken_up(run, traffic, rounds, of_run)
            for run, traffic, of_run in zip(self.runs, self._traffic, (saved, *of_others), strict=True)
        ]
        params, states = self._gather([params for params, _ in taken]), [state for _, state in taken]
        if (first := states[0]) is None:
            return params, None
        server, dictionary = self._gather([(s.server, s.dictionary) for s in states if s])
        return params, State(server, first.clients, dictionary)

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

    def _recall(self, clients: dict[int, Memory], plan: Plan) -> Memory | None:
        """Memories of the clients that lanes begin in a call, on the lanes' devices; other lanes get an empty one."""
        if self.run.no_memory is None:
            return None
        empty, begins = self.run.no_memory, plan.busy[0] & (plan.step[0] == 0)
        lanes = [clients.get(int(c), empty) if b else empty for c, b in zip(plan.client[0], begins, strict=True)]
        put = placer(self.run.mesh, BY_LANE)
        return jax.tree.map(lambda *of_lanes: put(np.stack(of_lanes)), *lanes)

    def _remember(self, clients: dict[int, Memory], carry: Carry, plan: Plan) -> None:
        """Keep the finite models of the clients that a call has finished, one at most in a lane."""
        if self.run.no_memory is None:
            return
        lanes, losses = jax.device_get((keep(carry.client), carry.loss))
        for lane in np.flatnonzero(plan.weight.max(axis=0)):
            memory = jax.tree.map(lambda x, lane=lane: np.array(x[lane]), lanes)
            if all(np.isfinite(x).all() for x in jax.tree.leaves((memory, losses[lane]))):
                clients[int(plan.client[0, lane])] = memory

    def _calibrate(self, stage: Stage, params: Tree, steps: int, key: jax.Array) -> tuple[Tree, float]:
        """The server's own training, on one device; what it gives is on the host."""
        run = self.run
        stage = calibration.whole(stage, run.layers)

        def traced() -> Callable[..., tuple[Tree, jax.Array]]:
            self._listener.compiling("the server's training")
            return jax.jit(functools.partial(calibration.calibrate, run.task, run.config.optimizer.batch_size, steps))

        shapes = str(jax.tree.map(np.shape, stage.rows))
        calibrate = self._shared.once(("calibration", program_config(run.config), steps, shapes), traced)
        hyper, params = jax.device_get((self._hyper, params))
        params, loss = calibrate(hyper, params, stage.rows, np.int32(stage.depth), run.server_images, key)
        return jax.device_get(params), float(loss)


def go_together(config: Config) -> bool:
    """Whether runs of a config can be one program: nothing of theirs is kept or trained between rounds by itself."""
    alone = config.additions.calibration_steps or config.additions.base_steps
    return not alone and config.federation.client_start == "global" and jax.process_count() == 1


def runs_at_once(config: Config) -> int:
    """How many runs pay off side by side: on accelerators as many as fill one with samples, elsewhere one."""
    lanes, mesh = lanes_and_mesh(config, LANES)
    if mesh.devices.flat[0].platform == "cpu" or not go_together(config):
        return 1
    return max(1, SAMPLES_AT_ONCE * mesh.size // (lanes * config.optimizer.batch_size))


def by_run(f: Callable[..., Any], in_axes: tuple[Any, ...], runs: int, out_axes: Any = 0) -> Callable[..., Any]:
    """``f`` for each of several runs at once."""
    return jax.vmap(f, in_axes, out_axes) if runs > 1 else f


def begun_line(
    run: Run, stage: Stage, number: int, traffic: Traffic, cohort: list[int], reporting: list[int]
) -> dict[str, Any]:
    """A round's line of ``metrics.jsonl``, as it is if nobody reports."""
    return {
        "round": number,
        "stage": stage.number,
        "loss": None,
        "client_distance": None,
        "clients": len(reporting),
        "dropped": len(cohort) - len(reporting),
        "left_out": 0,
        "cannot_afford": int((~run.fleet.can[stage.number]).sum()) if run.fleet else 0,
        "examples": 0,
        "steps": 0,
        "download_bytes": traffic.download(stage, cohort),
        "upload_bytes": len(reporting) * traffic.upload(stage),
        "lane_utilisation": 0.0,
    }


def measured_line(
    run: Run, stage: Stage, work: Round, reporting: list[int], measured: dict[str, Any]
) -> dict[str, Any]:
    """What a round's training adds to its line; ``measured`` as ``finish_round`` gives it."""
    line = {
        "left_out": int(measured["left_out"]),
        "loss": float(measured["loss"]),
        "client_distance": float(measured["client_distance"]) if len(reporting) > 1 else 0.0,
        "examples": int(run.clients.sizes[reporting].sum()) * run.config.federation.local_epochs,
        "steps": work.steps,
        "lane_utilisation": round(work.steps / (work.length * run.lanes), 4),
    }
    if run.config.additions.depth_dropout and stage.trained_before:
        skipped = work.steps * stage.depth - int(measured["layers"])
        line["layers_skipped"] = round(skipped / (work.steps * stage.trained_before), 4)
    return line


def taken_up(run: Run, traffic: Traffic, rounds: int, saved: Tree) -> tuple[Tree, State | None]:
    """What ``Simulator.take_up`` gives of one run, on the host; ``traffic`` hears of the rounds that were."""
    params, server, clients, dictionary = initial_params(run), None, {}, {}
    for stage in run.stages:
        last = stage.first_round + stage.rounds
        for number in range(stage.first_round + 1, min(last, rounds) + 1):
            traffic.download(stage, draw_cohort(run, number)[0])
        if stage.first_round < rounds < last:
            sent = functools.partial(send, stage, rows=stage.rows, depths=stage.depths)
            shapes = jax.eval_shape(lambda p, sent=sent: run.aggregator.init(sent(p)), params)
            server = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
            dictionary = fedca.empty(run.config, run.task)
    if saved:
        params = saved["params"]
        form, no_memory = jax.tree.structure(server), jax.tree.structure(run.no_memory)
        server = jax.tree.unflatten(form, saved["server"]) if server is not None else None
        clients = {int(c): jax.tree.unflatten(no_memory, leaves) for c, leaves in saved["clients"].items()}
        dictionary = saved["dictionary"] if server is not None else {}
    if rounds:
        params, server, dictionary = from_first((params, server, dictionary))
    return params, None if server is None else State(server, clients, dictionary)


def to_save(params: Tree, state: State | None) -> Tree:
    """All that a run needs to continue after a round, as dicts and lists of arrays."""
    server, clients, dictionary = state or State((), {}, {})
    kept = {str(client): jax.tree.leaves(memory) for client, memory in clients.items()}
    return {"params": params, "server": jax.tree.leaves(server), "clients": kept, "dictionary": dictionary}


def send(stage: Stage, params: Tree, rows: Tree, depths: Sequence[ArrayLike]) -> Sent:
    """What the server sends of the global parameters in a stage; the stage's rows and depths may be traced."""
    frozen = jax.tree.map(lambda m, x: x if np.any(m) else None, stage.frozen, params)
    return Sent(tree.take(params, rows), tree.present(params, rows), frozen, *map(jnp.asarray, depths))


def compile_stage(run: Run, stage: Stage, feed: feed.Feed, runs: int = 1) -> Program:
    """Compile a stage's programs ahead of time: they refuse other shapes instead of recompiling.

    Args:
      run: of which they are, or any of those that go together.
      stage: or any of the same shapes.
      feed: gives the images.
      runs: how many go together.
    """

    def start(params: Tree, rows: Tree, depths: tuple[jax.Array, ...], shared: Tree) -> tuple[Sent, Carry]:
        sent = send(stage, params, rows, depths)._replace(shared=shared)
        return sent, start_round(run.task, run.aggregator, sent, run.lanes)

    def steps(
        carry: Carry,
        sent: Sent,
        memory: Memory | None,
        images: jax.Array,
        plan: Plan,
        first: jax.Array,
        count: jax.Array,
        key: jax.Array,
        hyper: Hyper,
    ) -> Carry:
        key = jax.random.wrap_key_data(key)
        static = (run.task, run.aggregator, run.start, run.mesh)
        return run_steps(*static, carry, sent, memory, images, plan, first, count, key, hyper)

    def finish(params: Tree, rows: Tree, state: Tree, sent: Sent, carry: Carry) -> tuple[Tree, Tree, Tree, Tree]:
        new_state, trainable, measured, dictionary = finish_round(run.aggregator, state, sent, carry)
        new = tree.put(params, rows, trainable), new_state, dictionary
        old = params, state, {name: sent.shared[name] for name in dictionary}
        params, state, dictionary = tree.where(carry.total.examples.sum() > 0, new, old)
        return params, state, measured, dictionary

    def shapes(x: Tree, spec: PartitionSpec) -> Tree:
        sharding = NamedSharding(run.mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), x)

    def of_runs(x: Tree, *lanes: int) -> Tree:
        """With an axis for the runs, where there are several, and one for lanes, where these are given."""
        wide = (runs, *lanes) if runs > 1 else lanes
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*wide, *x.shape), x.dtype), x)

    idle = empty_plan(CALL_STEPS, run.lanes, run.config.optimizer.batch_size)
    idle = idle if runs == 1 else next(side_by_side([iter([(idle, 0)])] * runs, idle))[0]
    images, plan, _ = next(feed(iter([(idle, 0)])))
    own_images = 0 if len(images.shape) > 5 else None
    init = by_run(run.aggregator.init, (SENT_BY_RUN,), runs)
    start = by_run(start, (0, None, None, 0), runs, (SENT_BY_RUN, 0))
    steps = by_run(steps, (0, SENT_BY_RUN, 0, own_images, 0, None, None, 0, 0), runs)
    finish = by_run(finish, (0, None, 0, SENT_BY_RUN, 0), runs)

    lanes, plan_lanes = (
        (BY_LANE, PLAN_BY_LANE) if runs == 1 else (PartitionSpec(None, *BY_LANE), PartitionSpec(None, *PLAN_BY_LANE))
    )
    everywhere, by_lane = NamedSharding(run.mesh, ALL), NamedSharding(run.mesh, lanes)
    one = jax.eval_shape(lambda: initial_params(run))
    params, rows = shapes(of_runs(one), ALL), shapes(stage.rows, ALL)
    number = shapes(jax.ShapeDtypeStruct((), np.int32), ALL)
    key = shapes(of_runs(jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))), ALL)
    hyper = shapes(of_runs(jax.tree.map(lambda _: jax.ShapeDtypeStruct((), run.task.dtype), run.task.hyper)), ALL)
    depths = jax.tree.map(lambda _: number, stage.depths)
    trainable = jax.eval_shape(tree.take, one, rows)
    shared = shapes(of_runs(fedca.shapes(run.config, run.task, trainable, len(run.server_images))), ALL)
    sent, carry = jax.eval_shape(start, params, rows, depths, shared)
    sent, carry = shapes(sent, ALL), shapes(carry, lanes)
    state = shapes(jax.eval_shape(init, sent), ALL)
    memory = shapes(of_runs(run.no_memory, run.lanes), lanes)
    return Program(
        start=jax.jit(start, out_shardings=(everywhere, by_lane)).lower(params, rows, depths, shared).compile(),
        steps=jax.jit(steps, donate_argnums=0)
        .lower(carry, sent, memory, images, shapes(plan, plan_lanes), number, number, key, hyper)
        .compile(),
        finish=jax.jit(finish, out_shardings=everywhere).lower(params, rows, state, sent, carry).compile(),
    )


def with_fewer_lanes(run: Run, needed: int, limit: int) -> Run:
    """The run with lanes that should fit, where a program needs more bytes on a device than there are.

    Raises:
      ConfigError: the user has asked for so many, or there is one only.
    """
    fit = min(run.lanes - 1, run.lanes * limit // needed)
    # Fewer CPU devices leave each more of the machine's memory; else every device keeps a lane.
    fewer_devices = run.mesh.devices.flat[0].platform == "cpu" and jax.process_count() == 1
    if fit >= run.mesh.size or not fewer_devices:
        fit = fit // run.mesh.size * run.mesh.size
    if fit and not run.config.runtime.lanes:
        lanes, mesh = lanes_and_mesh(override(run.config, {"runtime.lanes": fit}), LANES, list(run.mesh.devices.flat))
        return run._replace(lanes=lanes, mesh=mesh)
    fewer = f"at most about {fit} lanes, " if fit else ""
    raise ConfigError(
        f"runtime.lanes: {run.lanes} need {needed / GIB:.3g} GiB on each device, which has {limit / GIB:.3g} GiB; "
        f"accepted: {fewer}a smaller optimizer.batch_size, runtime.remat True, or runtime.precision bfloat16"
    )


def check_finite(config: Config, what: str, number: int, values: Any) -> None:
    """Raise ``not_finite`` unless all values are finite."""
    if not np.isfinite(values).all():
        raise not_finite(config, what, number)


def not_finite(config: Config, what: str, number: int) -> FloatingPointError:
    """An error that says what to lower."""
    return FloatingPointError(
        f"{what} in round {number}; lower optimizer.learning_rate ({config.optimizer.learning_rate}) "
        f"or raise objective.temperature ({config.objective.temperature})"
    )


def able(run: Run, number: int) -> np.ndarray:
    """The clients whose devices can take part in a round: all, or those of the fleet that can afford its stage."""
    if not run.fleet:
        return np.arange(run.config.partition.clients)
    stage = next(stage for stage in run.stages if number <= stage.first_round + stage.rounds)
    return np.flatnonzero(run.fleet.can[stage.number])


def draw_cohort(run: Run, number: int) -> tuple[list[int], list[int]]:
    """The clients drawn in a round that have data, and those of them that report."""
    rng = np.random.default_rng([run.config.runtime.seed, SAMPLING_STREAM, number])
    clients = able(run, number)
    cohort = np.sort(rng.choice(clients, min(run.config.cohort_size, len(clients)), replace=False))
    stays = rng.random(len(cohort)) >= run.config.federation.dropout
    has_data = run.clients.sizes[cohort] > 0
    return cohort[has_data].tolist(), cohort[has_data & stays].tolist()


def round_key(seed: int, number: int) -> jax.Array:
    """The key of a round, from which those of its clients and steps come."""
    return jax.random.fold_in(stream_key(seed, ROUND_STREAM), number)


def stream_key(seed: int, stream: int) -> jax.Array:
    """The key of one use of the seed."""
    return jax.random.fold_in(jax.random.key(seed), stream)


def lay_out(run: Run, clients: list[int], number: int) -> Round:
    """The work of these clients in a round, in the run's lanes."""
    return plan_round(
        clients,
        run.clients,
        run.clients.sizes[clients].tolist(),
        run.lanes,
        run.config.optimizer.batch_size,
        run.config.federation.local_epochs,
        CALL_STEPS,
        seed=(run.config.runtime.seed, BATCHES_STREAM, number),
        one_a_call=run.start is not None,
    )


def initial_params(run: Run) -> Tree:
    """The seed's fresh parameters of all layers; a layer keeps them until its stage begins."""
    key = stream_key(run.config.runtime.seed, INIT_STREAM)
    return jax.jit(functools.partial(init_params, run.task))(key)
