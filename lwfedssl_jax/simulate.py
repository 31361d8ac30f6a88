"""A whole run: data, stages x rounds, evaluation, work directory. The only module that sees everything."""

import functools
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwfedssl_jax import evaluate, report, resources, tree
from lwfedssl_jax.aggregation import WEIGHTED_MEAN, Aggregator
from lwfedssl_jax.checkpoint import WorkDir
from lwfedssl_jax.client import Sent, Task, init_params, make_task, param_layers
from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.data import feed, sources
from lwfedssl_jax.data.partition import Population, partition
from lwfedssl_jax.data.sources import Dataset
from lwfedssl_jax.devices import lanes_and_mesh, memory_limit, placer, program_memory
from lwfedssl_jax.packing import Plan, Round, empty_plan, plan_round
from lwfedssl_jax.rounds import ALL, BY_LANE, LANES, PLAN_BY_LANE, Carry, finish_round, run_steps, start_round
from lwfedssl_jax.stages import Stage, make_stages
from lwfedssl_jax.tree import Tree

CALL_STEPS = 32  # steps of one call of the round: progress is seen after each
SECONDS_BETWEEN_CHECKPOINTS = 60
GIB = 2**30
RESIDENT_SHARE = 0.25  # of a device's memory that the images may take before they are streamed

# Streams of the seed; clients add round, client and step to theirs.
INIT_STREAM, ROUND_STREAM = 0, 1
SAMPLING_STREAM, BATCHES_STREAM = 1, 2  # of NumPy's generators; 0 is the partition's


class Listener:
    """Hears how a run goes; every method may be overridden."""

    def start(self, run: "Run", finished_rounds: int) -> None:
        """The run begins, or continues after so many rounds."""

    def compiling(self, what: str) -> None:
        """A compilation begins."""

    def stage(self, stage: Stage) -> None:
        """A stage's program is ready and its rounds begin."""

    def steps(self, round_number: int, done: int, total: int) -> None:
        """So many of a round's steps are done."""

    def round(self, line: dict[str, Any]) -> None:
        """A round's line of ``metrics.jsonl``."""

    def evaluation(self, line: dict[str, Any]) -> None:
        """An evaluation's line of ``metrics.jsonl``."""


class Run(NamedTuple):
    """A config and all that is derived from it before anything is compiled."""

    config: Config
    dataset: Dataset
    clients: Population
    task: Task
    stages: list[Stage]
    lanes: int
    mesh: Mesh
    encode: evaluate.Encode
    aggregator: Aggregator = WEIGHTED_MEAN


class Program(NamedTuple):
    """The compiled programs of a stage, and of all stages of the same shapes.

    Attributes:
      start: ``(params, rows, depth, frozen_depth) -> (sent, empty carry)``.
      steps: ``(carry, sent, images, plan, steps, round_key) -> carry``.
      finish: ``(params, rows, state, sent, carry) -> (params with the average put in, state, mean loss)``.
    """

    start: jax.stages.Compiled
    steps: jax.stages.Compiled
    finish: jax.stages.Compiled


def prepare(config: Config, devices: Sequence[Any] | None = None) -> Run:
    """Load the data, deal it out, lay out the stages; nothing is compiled.

    Args:
      config: resolved.
      devices: to be used; by default all.

    Raises:
      ConfigError: the data set is not installed or does not serve the partition or a protocol.
    """
    dataset = sources.find(config.data).load(config.data)
    evaluate.check(config.evaluation, dataset)
    clients = partition(config.partition, dataset.train_labels, config.runtime.seed)
    task = make_task(config)
    layers = param_layers(task, jax.eval_shape(lambda: init_params(task, jax.random.key(0))))
    stages = make_stages(config, layers)
    lanes, mesh = lanes_and_mesh(config, LANES, devices)
    return Run(config, dataset, clients, task, stages, lanes, mesh, evaluate.make_encode(task))


class Simulator:
    """A run on its devices: where the images are, and the programs compiled so far.

    Attributes:
      run: the run; it gets fewer lanes where they do not fit the device's memory.
      feed: brings a round's images to the device.
    """

    def __init__(self, run: Run, listener: Listener | None = None) -> None:
        self.run = run
        self._listener = listener or Listener()
        self._programs: dict[str, Program] = {}
        self._limit = memory_limit(run.mesh.local_devices[0])
        images, kind = run.dataset.train_images, run.config.runtime.feed
        if kind == "resident" or (kind == "auto" and images.nbytes < RESIDENT_SHARE * self._limit):
            self.feed = feed.resident(images, placer(run.mesh, ALL))
        else:
            self.feed = feed.streamed(images, placer(run.mesh, BY_LANE))

    def place(self, x: Tree) -> Tree:
        """Arrays on all devices, the same on each."""
        return jax.tree.map(placer(self.run.mesh, ALL), x)

    def program(self, stage: Stage) -> Program:
        """The programs of a stage, compiled once for all stages of the same shapes.

        Lanes that were not asked for become fewer where the program needs more memory than there is.

        Raises:
          ConfigError: the lanes that the user asks for, or a single one a device, do not fit.
        """
        key = str((jax.tree.map(np.shape, stage.rows), jax.tree.map(np.any, stage.frozen)))
        while key not in self._programs:
            self._listener.compiling(f"the round, {self.run.lanes} lane{'s' * (self.run.lanes > 1)}")
            program = compile_stage(self.run, stage, self.feed)
            if (needed := program_memory(program.steps)) <= self._limit:
                self._programs[key] = program
            else:
                self.run = self.run._replace(lanes=fewer_lanes(self.run, needed, self._limit))
                self._programs = {}
        return self._programs[key]

    def run_round(self, stage: Stage, params: Tree, state: Tree, number: int) -> tuple[Tree, Tree, dict[str, Any]]:
        """One round: draw the cohort, train the clients that report, aggregate what they trained.

        Args:
          stage: that the round is in.
          params: the global parameters, as ``place`` gives them.
          state: the aggregator's; None in a stage's first round.
          number: of the round, from 1.

        Returns:
          The new global parameters (the old ones if nobody reports), the aggregator's state, and
          the round's metrics line.

        Raises:
          FloatingPointError: the loss is not finite.
        """
        began = time.monotonic()
        program, run = self.program(stage), self.run
        cohort, reporting = draw_cohort(run, number)
        rows = self.place(stage.rows)
        depths = self.place((np.int32(stage.trainable_depth), np.int32(stage.frozen_depth)))
        sent, carry = program.start(params, rows, *depths)
        state = run.aggregator.init(sent.trainable) if state is None else state
        exchanged = tree.nbytes(jax.eval_shape(lambda p: tree.take(p, tree.rows(stage.trainable)), params))
        line: dict[str, Any] = {
            "round": number,
            "stage": stage.number,
            "loss": None,
            "clients": len(reporting),
            "dropped": len(cohort) - len(reporting),
            "examples": 0,
            "steps": 0,
            "download_bytes": len(cohort) * exchanged,
            "upload_bytes": len(reporting) * exchanged,
            "lane_utilisation": 0.0,
        }
        if len(reporting):
            work = lay_out(run, reporting, number)
            key = self.place(np.asarray(jax.random.key_data(round_key(run.config.runtime.seed, number))))
            put_plan = placer(run.mesh, PLAN_BY_LANE)
            done = 0
            calls = self.feed(work.calls)
            call = next(calls, None)
            while call is not None:
                images, plan, steps = call
                plan = jax.tree.map(put_plan, plan)
                carry = program.steps(carry, sent, images, plan, self.place(np.int32(steps)), key)
                call = next(calls, None)  # made while the device works on the one before
                jax.block_until_ready(carry)
                done += steps
                self._listener.steps(number, done, work.length)
            params, state, loss = program.finish(params, rows, state, sent, carry)
            line |= {
                "loss": float(loss),
                "examples": int(run.clients.sizes[reporting].sum()) * run.config.federation.local_epochs,
                "steps": work.steps,
                "lane_utilisation": round(work.steps / (work.length * run.lanes), 4),
            }
            check_finite(run.config, f"the loss is {line['loss']}", number, line["loss"])
        return params, state, line | {"seconds": round(time.monotonic() - began, 4)}


def compile_stage(run: Run, stage: Stage, feed: feed.Feed) -> Program:
    """Compile a stage's programs ahead of time: they refuse other shapes instead of recompiling."""

    def start(params: Tree, rows: Tree, depth: jax.Array, frozen_depth: jax.Array) -> tuple[Sent, Carry]:
        frozen = jax.tree.map(lambda m, x: x if np.any(m) else None, stage.frozen["encoder"], params["encoder"])
        sent = Sent(tree.take(params, rows), tree.present(params, rows), frozen, depth, frozen_depth)
        return sent, start_round(run.task, run.aggregator, sent, run.lanes)

    def steps(carry: Carry, sent: Sent, images: jax.Array, plan: Plan, count: jax.Array, key: jax.Array) -> Carry:
        key = jax.random.wrap_key_data(key)
        return run_steps(run.task, run.aggregator, run.mesh, carry, sent, images, plan, count, key)

    def finish(params: Tree, rows: Tree, state: Tree, sent: Sent, carry: Carry) -> tuple[Tree, Tree, jax.Array]:
        state, trainable, loss = finish_round(run.aggregator, state, sent, carry)
        return tree.put(params, rows, trainable), state, loss

    def shapes(x: Tree, spec: PartitionSpec) -> Tree:
        sharding = NamedSharding(run.mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), x)

    everywhere, by_lane = NamedSharding(run.mesh, ALL), NamedSharding(run.mesh, BY_LANE)
    params, rows = shapes(jax.eval_shape(lambda: initial_params(run)), ALL), shapes(stage.rows, ALL)
    number = shapes(jax.ShapeDtypeStruct((), np.int32), ALL)
    key = shapes(jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))), ALL)
    sent, carry = jax.eval_shape(start, params, rows, number, number)
    sent, carry = shapes(sent, ALL), shapes(carry, BY_LANE)
    state = shapes(jax.eval_shape(run.aggregator.init, sent.trainable), ALL)
    idle = empty_plan(CALL_STEPS, run.lanes, run.config.optimizer.batch_size)
    images, plan, _ = next(feed(iter([(idle, 0)])))
    return Program(
        start=jax.jit(start, out_shardings=(everywhere, by_lane)).lower(params, rows, number, number).compile(),
        steps=jax.jit(steps, donate_argnums=0)
        .lower(carry, sent, images, shapes(plan, PLAN_BY_LANE), number, key)
        .compile(),
        finish=jax.jit(finish, out_shardings=everywhere).lower(params, rows, state, sent, carry).compile(),
    )


def fewer_lanes(run: Run, needed: int, limit: int) -> int:
    """Lanes that should fit where a program needs more bytes than there are.

    Raises:
      ConfigError: the user has asked for so many, or not even one a device fits.
    """
    devices = run.mesh.size
    fit = min(run.lanes - 1, run.lanes * limit // needed) // devices * devices
    if fit and not run.config.runtime.lanes:
        return fit
    fewer = f"at most about {fit} lanes, " if fit else ""
    raise ConfigError(
        f"runtime.lanes: {run.lanes} need {needed / GIB:.3g} GiB on each device, which has {limit / GIB:.3g} GiB; "
        f"accepted: {fewer}a smaller optimizer.batch_size, runtime.remat True, or runtime.precision bfloat16"
    )


def train(config: Config, workdir: WorkDir | None, listener: Listener | None = None) -> dict[str, Any]:
    """Run the experiment, or what is left of it, and write the work directory.

    Args:
      config: resolved.
      workdir: belongs to this config; None in every process but the first of several.
      listener: hears of progress.

    Returns:
      The content of ``summary.json``; nothing where there is no work directory.

    Raises:
      ConfigError: see ``prepare``; the work directory cannot be written; the device's memory is too small.
      FloatingPointError: the loss, or what the encoder gives, is not finite.
      KeyboardInterrupt: passed on after the last finished round has been saved.
    """
    listener = listener or Listener()
    finished = workdir.summary if workdir else None
    if from_first(np.array(finished is not None)):
        return finished or {}
    run = prepare(config)
    if workdir:
        workdir.open(run.lanes, run.mesh.size)
    params = initial_params(run)
    restored = workdir.restore(params) if workdir else None
    done, params = from_first(restored or (0, params))
    done = int(done)
    simulator = Simulator(run, listener)
    if done < config.federation.rounds:
        simulator.program(next(s for s in run.stages if done < s.first_round + s.rounds))
    run = simulator.run  # with lanes that fit
    if workdir:
        workdir.record(lanes=run.lanes)
        report.plot_clients(run.dataset.train_labels, run.clients, workdir.path)
        listener.start(run, done)
        if not done:
            log_evaluation(run, workdir, listener, config.model.depth, 0, params)
    params, state = simulator.place(params), None
    saved = time.monotonic()
    try:
        for stage in run.stages:
            last = stage.first_round + stage.rounds
            if done >= last:
                continue
            simulator.program(stage)
            listener.stage(stage)
            state = None
            for number in range(max(done, stage.first_round) + 1, last + 1):
                new_params, state, line = simulator.run_round(stage, params, state, number)
                if workdir:
                    workdir.append(line)
                    listener.round(line)
                due = config.evaluation.every and number % config.evaluation.every == 0
                if workdir and (number == last or due):
                    log_evaluation(run, workdir, listener, stage.depth, number, new_params)
                params, done = new_params, number
                if workdir and (number == last or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS):
                    workdir.save(done, params)
                    saved = time.monotonic()
    except KeyboardInterrupt:
        if workdir and done:
            workdir.save(done, params)
        raise
    return finish(run, workdir, params, listener) if workdir else {}


def check_finite(config: Config, what: str, number: int, values: Any) -> None:
    """Raise a FloatingPointError that says what to lower, unless all values are finite."""
    if not np.isfinite(values).all():
        raise FloatingPointError(
            f"{what} in round {number}; lower optimizer.learning_rate ({config.optimizer.learning_rate}) "
            f"or raise objective.temperature ({config.objective.temperature})"
        )


def draw_cohort(run: Run, number: int) -> tuple[list[int], list[int]]:
    """The clients drawn in a round that have data, and those of them that report."""
    rng = np.random.default_rng([run.config.runtime.seed, SAMPLING_STREAM, number])
    cohort = np.sort(rng.choice(run.config.partition.clients, run.config.cohort_size, replace=False))
    stays = rng.random(len(cohort)) >= run.config.federation.dropout
    has_data = run.clients.sizes[cohort] > 0
    return cohort[has_data].tolist(), cohort[has_data & stays].tolist()


def round_key(seed: int, number: int) -> jax.Array:
    """The key of a round, from which those of its clients and steps come."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), ROUND_STREAM), number)


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
    )


def initial_params(run: Run) -> Tree:
    """The seed's fresh parameters of all layers; a layer keeps them until its stage begins."""
    key = jax.random.fold_in(jax.random.key(run.config.runtime.seed), INIT_STREAM)
    return jax.jit(functools.partial(init_params, run.task))(key)


def from_first(x: Tree) -> Tree:
    """The first process's value in all of them."""
    return multihost_utils.broadcast_one_to_all(x) if jax.process_count() > 1 else x


def log_evaluation(run: Run, workdir: WorkDir, listener: Listener, depth: int, number: int, params: Tree) -> None:
    """Judge layers L1..L_depth by every protocol and write a line a protocol."""
    params = jax.device_get(params)  # on the mesh, every device would repeat the work
    features = [run.encode(params, images, depth) for images in (run.dataset.train_images, run.dataset.test_images)]
    for x in features:
        check_finite(run.config, "the encoder's features are not finite", number, x)
    for protocol, result in evaluate.judge(run.config.evaluation, run.dataset, *features).items():
        line = {"event": "evaluation", "round": number, "depth": depth, "protocol": protocol, **result}
        workdir.append(line)
        listener.evaluation(line)


def finish(run: Run, workdir: WorkDir, params: Tree, listener: Listener) -> dict[str, Any]:
    """Write the encoder, the summary and the plots of a run whose rounds are done."""
    lines = workdir.metrics()
    rounds = [line for line in lines if "event" not in line]
    results: dict[int, dict[str, Any]] = {}
    for line in lines:
        if line.get("event") == "evaluation":
            result = {k: v for k, v in line.items() if k not in ("event", "round", "protocol")}
            results.setdefault(line["round"], {})[line["protocol"]] = result
    strategies = resources.all_strategies(run.config, memory=True, notify=listener.compiling)
    measured = {key: sum(line[key] for line in rounds) for key in ("download_bytes", "upload_bytes", "seconds")}
    summary = {
        "strategy": run.config.strategy.name,
        "objective": run.config.objective.name,
        "rounds": len(rounds),
        "seconds": round(measured["seconds"], 2),
        "evaluation": results[max(results)],
        "baselines": {"untrained": results[0]},
        "resources": strategies[run.config.strategy.name]
        | {"measured": measured | {"clients": run.config.partition.clients, "scope": "all clients, all rounds"}},
        "strategies": strategies,
    }
    workdir.save_encoder(params["encoder"])
    report.plot_metrics(lines, workdir.path)
    workdir.write_json("summary.json", summary)
    return summary
