"""The simulator: a config, its data and its stages, and the rounds run on the devices."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from lwfedssl_jax import calibration, evaluate, fedca, tree
from lwfedssl_jax.aggregation import Aggregator, make_aggregator
from lwfedssl_jax.checks import check
from lwfedssl_jax.client import Sent, Task, init_params, make_task, param_layers
from lwfedssl_jax.config import Config, ConfigError, override
from lwfedssl_jax.data import feed, sources
from lwfedssl_jax.data.partition import Population, partition, server_examples
from lwfedssl_jax.data.sources import Dataset
from lwfedssl_jax.devices import from_first, lanes_and_mesh, memory_limit, placer, program_memory
from lwfedssl_jax.fleet import Fleet
from lwfedssl_jax.packing import Plan, Round, empty_plan, plan_round
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


class State(NamedTuple):
    """What lasts from round to round of a stage besides the parameters.

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
      steps: ``(carry, sent, memory, images, plan, first, steps, round_key) -> carry``.
      finish: ``(params, rows, state, sent, carry) -> (params with the average put in, state, measured, dictionary)``.
    """

    start: jax.stages.Compiled
    steps: jax.stages.Compiled
    finish: jax.stages.Compiled


def prepare(config: Config, devices: Sequence[Any] | None = None, listener: Listener | None = None) -> Run:
    """Load the data, deal it out, lay out the stages; nothing is compiled.

    Args:
      config: resolved.
      devices: to be used; by default all.
      listener: hears how the data is loaded.

    Raises:
      ConfigError: the data set is not installed or does not serve the partition or a protocol, or
        parts of the config do not go together; the server's images do not fit a device.
    """
    listener = listener or Listener()
    check(config)
    task = make_task(config)
    layers = param_layers(task, jax.eval_shape(lambda: init_params(task, jax.random.key(0))))
    stages = make_stages(config, layers)
    aggregator, start = make_aggregator(config), make_start(config, task)
    dataset = sources.find(config.data).load(config.data, listener.loading, listener.note)
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
        evaluate.make_encode(task.encoder, task.recipe, task.dtype),
        aggregator,
        start,
        no_memory(task, stages[0]) if start else None,
    )


class Simulator:
    """A run on its devices: where the images are, and the programs compiled so far.

    Args:
      run: what is to be run.
      stages: what is compiled now; by default nothing is before it is needed. Lanes that were
        not asked for become fewer where these need more memory than there is.
      listener: hears of compilations and steps.
      between_calls: called after each call of a round's program; may raise to give the round up.

    Attributes:
      run: the run, with as many lanes and devices as are used.

    Raises:
      ConfigError: the lanes that the user asks for, or a single one, do not fit the memory.
    """

    def __init__(
        self,
        run: Run,
        stages: Sequence[Stage] = (),
        listener: Listener | None = None,
        between_calls: Callable[[], None] = lambda: None,
    ) -> None:
        self.run = run
        self._listener = listener or Listener()
        self._between_calls = between_calls
        # Steps of a call; several processes must make the same calls.
        self._pace = 1 if jax.process_count() == 1 else CALL_STEPS
        self._calibrations: dict[str, Callable[..., tuple[Tree, jax.Array]]] = {}
        shapes = jax.eval_shape(lambda: initial_params(run))
        self._traffic = Traffic(
            shapes,
            run.layers,
            len(run.clients),
            calibrated=bool(run.config.additions.calibration_steps),
            dictionary=fedca.dictionary_bytes(run.config),
            base=fedca.has_base(run.config),
        )
        self._set_up()
        while (needed := max((self._needed(stage) for stage in stages), default=0)) > self._limit:
            self.run = with_fewer_lanes(self.run, needed, self._limit)
            self._set_up()

    def _set_up(self) -> None:
        self._programs: dict[str, Program] = {}
        mesh, images, kind = self.run.mesh, self.run.dataset.train_images, self.run.config.runtime.feed
        self._limit = memory_limit(mesh)
        if kind == "resident" or (kind == "auto" and images.nbytes < RESIDENT_SHARE * self._limit):
            self._feed = feed.resident(images, placer(mesh, ALL))
        else:
            self._feed = feed.streamed(images, placer(mesh, BY_LANE))

    def _needed(self, stage: Stage) -> int:
        return program_memory(self.program(stage).steps)

    def place(self, x: Tree) -> Tree:
        """Arrays on all devices, the same on each."""
        return jax.tree.map(placer(self.run.mesh, ALL), x)

    def program(self, stage: Stage) -> Program:
        """The programs of a stage, compiled once for all stages of the same shapes."""
        key = str((jax.tree.map(np.shape, stage.rows), jax.tree.map(np.any, stage.frozen)))
        if key not in self._programs:
            self._listener.compiling(f"the round, {self.run.lanes} lane{'s' * (self.run.lanes > 1)}")
            self._programs[key] = compile_stage(self.run, stage, self._feed)
        return self._programs[key]

    def run_round(
        self, stage: Stage, params: Tree, state: State | None, number: int
    ) -> tuple[Tree, State, dict[str, Any]]:
        """One round: draw the cohort, train the clients that report, aggregate what they trained.

        Args:
          stage: that the round is in.
          params: the global parameters, as ``place`` gives them.
          state: as the round before left it; None in a stage's first round.
          number: of the round, from 1.

        Returns:
          The new global parameters (the old ones if nobody reports), the new state, and the
          round's metrics line. What was passed in stays as it was.

        Raises:
          FloatingPointError: no client's update is finite.
        """
        base = self._base
        began = time.monotonic()
        program, run = self.program(stage), self.run
        cohort, reporting = draw_cohort(run, number)
        dictionary = self.place(fedca.empty(run.config, run.task)) if state is None else state.dictionary
        slots = {"cohort": self.place(fedca.padded(run.config, cohort))} if dictionary else {}
        rows = self.place(stage.rows)
        depths = self.place(stage.depths)
        sent, carry = program.start(params, rows, depths, base | dictionary | slots)
        server, clients = (run.aggregator.init(sent), {}) if state is None else (state.server, dict(state.clients))
        line: dict[str, Any] = {
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
            "download_bytes": self._traffic.download(stage, cohort),
            "upload_bytes": len(reporting) * self._traffic.upload(stage),
            "lane_utilisation": 0.0,
        }
        if len(reporting):
            work = lay_out(run, reporting, number)
            carry = self._train(program, sent, carry, clients, work, number)
            params, server, measured, dictionary = program.finish(params, rows, server, sent, carry)
            left_out = int(measured["left_out"])
            if left_out == len(reporting):
                raise not_finite(run.config, "no client's update is finite", number)
            line |= {
                "left_out": left_out,
                "loss": float(measured["loss"]),
                "client_distance": float(measured["client_distance"]) if len(reporting) > 1 else 0.0,
                "examples": int(run.clients.sizes[reporting].sum()) * run.config.federation.local_epochs,
                "steps": work.steps,
                "lane_utilisation": round(work.steps / (work.length * run.lanes), 4),
            }
            if run.config.additions.depth_dropout and stage.trained_before:
                skipped = work.steps * stage.depth - int(measured["layers"])
                line["layers_skipped"] = round(skipped / (work.steps * stage.trained_before), 4)
            if run.config.additions.calibration_steps:
                key = jax.random.fold_in(stream_key(run.config.runtime.seed, SERVER_STREAM), number)
                steps = run.config.additions.calibration_steps
                calibrated, line["calibration_loss"] = self._calibrate(stage, params, steps, key)
                params = self.place(from_first(calibrated))
                check_finite(run.config, "the calibration's loss is not finite", number, line["calibration_loss"])
        return params, State(server, clients, dictionary), line | {"seconds": round(time.monotonic() - began, 4)}

    def _train(
        self, program: Program, sent: Sent, carry: Carry, clients: dict[int, Memory], work: Round, number: int
    ) -> Carry:
        """The round's local training, call by call; ``clients`` get what they keep of it."""
        key = self.place(np.asarray(jax.random.key_data(round_key(self.run.config.runtime.seed, number))))
        put_plan = placer(self.run.mesh, PLAN_BY_LANE)
        done = 0
        pieces = self._feed(work.calls)
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
                carry = program.steps(carry, sent, memory, images, plan, *which, key)
                if first + count == steps:
                    piece = next(pieces, None)  # made while the device works
                jax.block_until_ready(carry)
                first, done = first + count, done + count
                if jax.process_count() == 1:
                    self._pace = max(1, int(count * SECONDS_OF_A_CALL / (time.monotonic() - asked)))
                self._listener.steps(number, done, work.length)
                self._between_calls()
            self._remember(clients, carry, host_plan)
        return carry

    def take_up(self, rounds: int, saved: Tree) -> tuple[Tree, State | None]:
        """Continue after so many rounds with what ``to_save`` gave; from the beginning where that is empty.

        Returns:
          The parameters, on all devices, and the state, None at a stage's beginning.
        """
        run = self.run
        params, server, clients, dictionary = initial_params(run), None, {}, {}
        for stage in run.stages:
            last = stage.first_round + stage.rounds
            for number in range(stage.first_round + 1, min(last, rounds) + 1):
                self._traffic.download(stage, draw_cohort(run, number)[0])
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
        params, server, dictionary = self.place((params, server, dictionary))
        return params, None if server is None else State(server, clients, dictionary)

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
        program = str((steps, jax.tree.map(np.shape, stage.rows)))
        if program not in self._calibrations:
            self._listener.compiling("the server's training")
            static = run.task, run.config.optimizer.batch_size, steps
            self._calibrations[program] = jax.jit(functools.partial(calibration.calibrate, *static))
        params, loss = self._calibrations[program](
            jax.device_get(params), stage.rows, np.int32(stage.depth), run.server_images, key
        )
        return jax.device_get(params), float(loss)


def to_save(params: Tree, state: State | None) -> Tree:
    """All that a run needs to continue after a round, as dicts and lists of arrays."""
    server, clients, dictionary = state or State((), {}, {})
    kept = {str(client): jax.tree.leaves(memory) for client, memory in clients.items()}
    return {"params": params, "server": jax.tree.leaves(server), "clients": kept, "dictionary": dictionary}


def send(stage: Stage, params: Tree, rows: Tree, depths: Sequence[ArrayLike]) -> Sent:
    """What the server sends of the global parameters in a stage; the stage's rows and depths may be traced."""
    frozen = jax.tree.map(lambda m, x: x if np.any(m) else None, stage.frozen, params)
    return Sent(tree.take(params, rows), tree.present(params, rows), frozen, *map(jnp.asarray, depths))


def compile_stage(run: Run, stage: Stage, feed: feed.Feed) -> Program:
    """Compile a stage's programs ahead of time: they refuse other shapes instead of recompiling."""

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
    ) -> Carry:
        key = jax.random.wrap_key_data(key)
        static = (run.task, run.aggregator, run.start, run.mesh)
        return run_steps(*static, carry, sent, memory, images, plan, first, count, key)

    def finish(params: Tree, rows: Tree, state: Tree, sent: Sent, carry: Carry) -> tuple[Tree, Tree, Tree, Tree]:
        state, trainable, measured, dictionary = finish_round(run.aggregator, state, sent, carry)
        return tree.put(params, rows, trainable), state, measured, dictionary

    def shapes(x: Tree, spec: PartitionSpec) -> Tree:
        sharding = NamedSharding(run.mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), x)

    everywhere, by_lane = NamedSharding(run.mesh, ALL), NamedSharding(run.mesh, BY_LANE)
    params, rows = shapes(jax.eval_shape(lambda: initial_params(run)), ALL), shapes(stage.rows, ALL)
    number = shapes(jax.ShapeDtypeStruct((), np.int32), ALL)
    key = shapes(jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))), ALL)
    depths = jax.tree.map(lambda _: number, stage.depths)
    trainable = jax.eval_shape(tree.take, params, rows)
    shared = shapes(fedca.shapes(run.config, run.task, trainable, len(run.server_images)), ALL)
    sent, carry = jax.eval_shape(start, params, rows, depths, shared)
    sent, carry = shapes(sent, ALL), shapes(carry, BY_LANE)
    state = shapes(jax.eval_shape(run.aggregator.init, sent), ALL)
    wide = lambda x: jax.ShapeDtypeStruct((run.lanes, *x.shape), x.dtype)  # noqa: E731
    memory = shapes(jax.tree.map(wide, run.no_memory), BY_LANE)
    idle = empty_plan(CALL_STEPS, run.lanes, run.config.optimizer.batch_size)
    images, plan, _ = next(feed(iter([(idle, 0)])))
    return Program(
        start=jax.jit(start, out_shardings=(everywhere, by_lane)).lower(params, rows, depths, shared).compile(),
        steps=jax.jit(steps, donate_argnums=0)
        .lower(carry, sent, memory, images, shapes(plan, PLAN_BY_LANE), number, number, key)
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
