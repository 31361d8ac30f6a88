"""A whole run: data, stages x rounds, evaluation, work directory. The only module that sees everything."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lwfedssl_jax import evaluate, report, resources, tree
from lwfedssl_jax.checkpoint import WorkDir
from lwfedssl_jax.client import Task, init_params, make_task, param_layers
from lwfedssl_jax.config import Config
from lwfedssl_jax.data import sources
from lwfedssl_jax.data.partition import partition
from lwfedssl_jax.data.sources import Dataset
from lwfedssl_jax.packing import Plan, chunks, plan_round
from lwfedssl_jax.rounds import Carry, finish_round, run_steps, start_round
from lwfedssl_jax.stages import Stage, make_stages
from lwfedssl_jax.tree import Tree

CALL_STEPS = 32  # steps of one call of the round: progress is seen after each
SECONDS_BETWEEN_CHECKPOINTS = 60
CPU_LANES = 1
SAMPLES_AT_ONCE = 2048  # of all lanes together, elsewhere

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
    clients: list[np.ndarray]
    task: Task
    stages: list[Stage]
    lanes: int
    encode: evaluate.Encode


class Program(NamedTuple):
    """A stage's compiled programs.

    Attributes:
      start: ``params -> (trainable, frozen, empty carry)``.
      steps: ``(carry, frozen, trainable, images, plan, steps, round_key) -> carry``.
      finish: ``(params, carry, examples) -> (params with the average put in, mean loss)``.
    """

    start: Callable[[Tree], tuple[Tree, Tree, Carry]]
    steps: Callable[[Carry, Tree, Tree, jax.Array, Plan, jax.Array, jax.Array], Carry]
    finish: Callable[[Tree, Carry, jax.Array], tuple[Tree, jax.Array]]


def prepare(config: Config) -> Run:
    """Load the data, deal it out, lay out the stages; nothing is compiled.

    Args:
      config: resolved.

    Raises:
      ConfigError: the data set is not installed or does not serve the partition or a protocol.
    """
    dataset = sources.find(config.data).load(config.data)
    evaluate.check(config.evaluation, dataset)
    clients = partition(config.partition, dataset.train_labels, config.runtime.seed)
    task = make_task(config)
    layers = param_layers(task, jax.eval_shape(lambda: init_params(task, jax.random.key(0))))
    stages = make_stages(config, layers)
    encode = evaluate.make_encode(task, layers["encoder"])
    return Run(config, dataset, clients, task, stages, choose_lanes(config), encode)


def choose_lanes(config: Config) -> int:
    """``runtime.lanes``, or what the device suggests, never more than the cohort.

    On a CPU batched matrix products with per-client weights are slower than one client at a time.
    """
    elsewhere = max(1, SAMPLES_AT_ONCE // config.optimizer.batch_size)
    default = CPU_LANES if jax.default_backend() == "cpu" else elsewhere
    return min(config.runtime.lanes or default, config.cohort_size)


def train(config: Config, workdir: WorkDir, listener: Listener | None = None) -> dict[str, Any]:
    """Run the experiment, or what is left of it, and write the work directory.

    Args:
      config: resolved.
      workdir: belongs to this config.
      listener: hears of progress.

    Returns:
      The content of ``summary.json``.

    Raises:
      ConfigError: see ``prepare``; the work directory cannot be written.
      FloatingPointError: the loss, or what the encoder gives, is not finite.
      KeyboardInterrupt: passed on after the last finished round has been saved.
    """
    listener = listener or Listener()
    if workdir.summary is not None:
        return workdir.summary
    run = prepare(config)
    workdir.open(run.lanes)
    report.plot_clients(run.dataset.train_labels, run.clients, workdir.path)
    params = initial_params(run)
    done, params = workdir.restore(params) or (0, params)
    listener.start(run, done)
    if not done:
        log_evaluation(run, workdir, listener, config.model.depth, 0, params)
    images = jnp.asarray(run.dataset.train_images)
    saved = time.monotonic()
    try:
        for stage in run.stages:
            last = stage.first_round + stage.rounds
            if done >= last:
                continue
            listener.compiling(f"stage {stage.number} of {len(run.stages)}")
            program = compile_stage(run, stage, params, images)
            listener.stage(stage)
            for number in range(max(done, stage.first_round) + 1, last + 1):
                new_params, line = run_round(run, stage, program, params, images, number, listener)
                workdir.append(line)
                listener.round(line)
                if number == last or (config.evaluation.every and number % config.evaluation.every == 0):
                    log_evaluation(run, workdir, listener, stage.depth, number, new_params)
                params, done = new_params, number
                if number == last or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                    workdir.save(done, params)
                    saved = time.monotonic()
    except KeyboardInterrupt:
        if done:
            workdir.save(done, params)
        raise
    return finish(run, workdir, params, listener)


def initial_params(run: Run) -> Tree:
    """The seed's fresh parameters of all layers; a layer keeps them until its stage begins."""
    key = jax.random.fold_in(jax.random.key(run.config.runtime.seed), INIT_STREAM)
    return jax.jit(functools.partial(init_params, run.task))(key)


def compile_stage(run: Run, stage: Stage, params: Tree, images: jax.Array) -> Program:
    """Compile a stage's round, once: compiled programs refuse other shapes instead of recompiling."""

    def start(params: Tree) -> tuple[Tree, Tree, Carry]:
        trainable = tree.take(params, stage.trainable)
        frozen = tree.take(params, stage.frozen)["encoder"]
        return trainable, frozen, start_round(run.task, trainable, run.lanes)

    def finish(params: Tree, carry: Carry, examples: jax.Array) -> tuple[Tree, jax.Array]:
        average, loss = finish_round(carry, examples)
        return tree.put(params, stage.trainable, average), loss

    trainable, frozen, carry = jax.eval_shape(start, params)
    # Any cohort's plan, cut into calls, has this shape.
    first = run.clients[int(np.argmax([len(c) for c in run.clients]))]
    plan = chunks(make_plan(run, [0], [first], 0), CALL_STEPS)[0][0]
    steps = jax.jit(functools.partial(run_steps, run.task), donate_argnums=0)
    count = jnp.array(0, jnp.int32)
    return Program(
        start=jax.jit(start).lower(params).compile(),
        steps=steps.lower(carry, frozen, trainable, images, plan, count, jax.random.key(0)).compile(),
        finish=jax.jit(finish).lower(params, carry, count).compile(),
    )


def run_round(
    run: Run, stage: Stage, program: Program, params: Tree, images: jax.Array, number: int, listener: Listener
) -> tuple[Tree, dict[str, Any]]:
    """One round: draw the cohort, train the clients that report, average what they trained.

    Returns:
      The new global parameters (the old ones if nobody reports) and the round's metrics line.

    Raises:
      FloatingPointError: the loss is not finite.
    """
    began = time.monotonic()
    cohort, reporting = draw_cohort(run, number)
    trainable, frozen, carry = program.start(params)
    exchanged = tree.nbytes(trainable)
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
    if reporting:
        plan = make_plan(run, reporting, run.clients, number)
        key = jax.random.fold_in(jax.random.key(run.config.runtime.seed), ROUND_STREAM)
        key = jax.random.fold_in(key, number)
        steps_done = 0
        for part, steps in chunks(plan, CALL_STEPS):
            carry = program.steps(carry, frozen, trainable, images, part, jnp.array(steps, jnp.int32), key)
            jax.block_until_ready(carry)
            steps_done += steps
            listener.steps(number, steps_done, len(plan.busy))
        weight = sum(len(run.clients[c]) for c in reporting)
        params, loss = program.finish(params, carry, jnp.array(weight, jnp.int32))
        line |= {
            "loss": float(loss),
            "examples": weight * run.config.federation.local_epochs,
            "steps": int(plan.busy.sum()),
            "lane_utilisation": round(float(plan.busy.mean()), 4),
        }
        check_finite(run.config, f"the loss is {line['loss']}", number, line["loss"])
    return params, line | {"seconds": round(time.monotonic() - began, 4)}


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
    has_data = np.array([len(run.clients[c]) > 0 for c in cohort])
    return cohort[has_data].tolist(), cohort[has_data & stays].tolist()


def make_plan(run: Run, clients: list[int], examples: list[np.ndarray], number: int) -> Plan:
    """The plan of these clients' round."""
    return plan_round(
        clients,
        examples,
        run.lanes,
        run.config.optimizer.batch_size,
        run.config.federation.local_epochs,
        seed=(run.config.runtime.seed, BATCHES_STREAM, number),
    )


def log_evaluation(run: Run, workdir: WorkDir, listener: Listener, depth: int, number: int, params: Tree) -> None:
    """Judge layers L1..L_depth by every protocol and write a line a protocol."""
    listener.compiling(f"evaluation of {depth} layers" if number else "evaluation of the untrained encoder")
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
