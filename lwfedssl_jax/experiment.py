"""A whole run: rounds, evaluation, checkpoints, work directory, summary. The only module that sees everything."""

import hashlib
import time
from typing import Any

import jax
import numpy as np

from lwfedssl_jax import evaluate, export, finetune, fleet, plan, report, resources
from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.devices import from_all, from_first
from lwfedssl_jax.interrupts import Interrupts
from lwfedssl_jax.simulate import Listener, Run, Simulator, State, check_finite, initial_params, prepare, to_save
from lwfedssl_jax.tree import Tree
from lwfedssl_jax.workdir import WorkDir

SECONDS_BETWEEN_CHECKPOINTS = 60

FINE_TUNE = "fine_tune"  # the protocol's name
MEASURED = "bytes and seconds: all clients, all rounds; flops_executed: a sample, as in the ledger"


def train(config: Config, workdir: WorkDir | None, listener: Listener | None = None) -> dict[str, Any]:
    """Run the experiment, or what is left of it, and write the work directory.

    Args:
      config: resolved.
      workdir: belongs to this config; None in every process but the first of several.
      listener: hears of progress.

    Returns:
      The content of ``summary.json``; nothing where there is no work directory.

    Raises:
      ConfigError: see ``prepare``; the work directory cannot be written or is in use, or none of its checkpoints
        is whole; the device's memory is too small.
      FloatingPointError: no client's update, or what the encoder gives, is finite.
      KeyboardInterrupt: on Ctrl-C or SIGTERM, after the current call; the last finished round has been saved.
      OSError: something cannot be written, such as on a full disk; what was saved before is whole.
    """
    listener = listener or Listener()
    check_same_config(config)
    finished = workdir.summary if workdir else None
    if from_first(np.array(finished is not None)):
        return finished or {}
    try:
        with Interrupts(listener.note) as interrupts:
            interrupts.check()
            if workdir:
                workdir.take()
            run = prepare(config, listener=listener)
            interrupts.check()
            if config.fleet.devices:
                on_devices = plan.fleet_of_clients(config, run.clients.sizes, listener.compiling)
                listener.note(plan.describe_fleet(on_devices, run.clients.sizes))
                run = run._replace(fleet=on_devices)
                interrupts.check()
            found, faults = workdir.restore() if workdir else (None, {})
            for rounds, why in faults.items():
                listener.note(f"checkpoint {rounds} is damaged: {why}")
            done = int(from_first(np.int32(found.rounds if found else 0)))
            left = [stage for stage in run.stages if done < stage.first_round + stage.rounds]
            simulator = Simulator(run, left, listener, interrupts.check)
            run = simulator.run  # with lanes that fit
            params, state = simulator.take_up(done, found.state if found else {})
            interrupts.check()
            if workdir:
                workdir.open(run.lanes, run.mesh.size)
                with workdir.writing("plots"):
                    report.plot_clients(run.dataset.train_labels, run.clients, workdir.path)
                listener.start(run, done)
            if workdir and not done:
                log_evaluation(run, workdir, listener, config.model.depth, 0, params)
            params = run_rounds(simulator, workdir, listener, interrupts, done, params, state)
            summary = finish(run, workdir, params, listener, interrupts) if workdir else {}
            interrupts.check()
            return summary
    finally:
        if workdir:
            workdir.close()


def run_rounds(
    simulator: Simulator,
    workdir: WorkDir | None,
    listener: Listener,
    interrupts: Interrupts,
    done: int,
    params: Tree,
    state: State | None,
) -> Tree:
    """The rounds after the first ``done``; saves after every round of a minute, else every minute, and every stage."""
    run, last_saved = simulator.run, time.monotonic()
    ends = [stage.first_round + stage.rounds for stage in run.stages]
    every = run.config.evaluation.every
    try:
        with interrupts.held_back():
            for stage, last in zip(run.stages, ends, strict=True):
                if done >= last:
                    continue
                listener.stage(stage)
                if done == stage.first_round:
                    state = None
                for number in range(done + 1, last + 1):
                    new_params, new_state, line = simulator.run_round(stage, params, state, number)
                    if workdir:
                        workdir.append(line)
                        listener.round(line)
                        if number == last or (every and number % every == 0):
                            log_evaluation(run, workdir, listener, stage.depth, number, new_params)
                    params, state, done = new_params, new_state, number
                    if workdir and (number == last or time.monotonic() - last_saved > SECONDS_BETWEEN_CHECKPOINTS):
                        workdir.save(done, to_save(params, state), ends)
                        last_saved = time.monotonic()
                    interrupts.check()
    except (KeyboardInterrupt, FloatingPointError):
        if workdir and done:
            workdir.save(done, to_save(params, state), ends)
        raise
    return params


def check_same_config(config: Config) -> None:
    """Refuse processes of one run with different configs.

    Raises:
      ConfigError: in all of them.
    """
    digest = hashlib.sha256(repr(config).encode()).digest()
    if len(set(from_all(int.from_bytes(digest[:7], "big")))) > 1:
        raise ConfigError("--processes: they have different configs; accepted: the same CONFIG and options for each")


def log_evaluation(run: Run, workdir: WorkDir, listener: Listener, depth: int, number: int, params: Tree) -> None:
    """Judge layers L1..L_depth by every protocol and write a line a protocol, unless no image has a label."""
    if not len(run.dataset.labelled):
        return
    params = jax.device_get(params)  # on the mesh, every device would repeat the work
    features = [run.encode(params, images, depth) for images in (run.dataset.train_images, run.dataset.test_images)]
    for x in features:
        check_finite(run.config, "the encoder's features are not finite", number, x)
    for protocol, result in evaluate.judge(run.config.evaluation, run.dataset, *features).items():
        line = {"event": "evaluation", "round": number, "depth": depth, "protocol": protocol, **result}
        workdir.append(line)
        listener.evaluation(line)


def log_fine_tuning(run: Run, workdir: WorkDir, listener: Listener, interrupts: Interrupts, params: Tree) -> None:
    """Fine-tune the trained encoder, and from scratch the initial one; write a line for each that is not there yet."""
    config, depth = run.config, run.config.model.depth
    written = [line["round"] for line in workdir.metrics() if line.get("protocol") == FINE_TUNE]
    scratch = {"baseline": "scratch"}
    for number, start, baseline in ((config.federation.rounds, params, {}), (0, initial_params(run), scratch)):
        if number in written:
            continue

        def say(what: str, start: str = "from scratch: " if baseline else "") -> None:
            interrupts.check()
            listener.fine_tuning(start + what)

        result = finetune.fine_tune(
            run.task,
            run.encode,
            config.evaluation,
            run.dataset,
            jax.device_get(start),  # on the mesh, every device would repeat the work
            depth,
            config.runtime.seed,
            say,
        )
        line = {"event": "evaluation", "round": number, "depth": depth, "protocol": FINE_TUNE, **baseline, **result}
        workdir.append(line)
        listener.evaluation(line)


def finish(run: Run, workdir: WorkDir, params: Tree, listener: Listener, interrupts: Interrupts) -> dict[str, Any]:
    """Write the encoder, the summary and the plots of a run whose rounds are done."""
    if run.config.evaluation.fine_tune_epochs:
        log_fine_tuning(run, workdir, listener, interrupts, params)
    lines = workdir.metrics()
    rounds = [line for line in lines if "event" not in line]
    results: dict[int | str, dict[str, Any]] = {}  # by round, or by the baseline's name
    for line in lines:
        if line.get("event") == "evaluation":
            result = {k: v for k, v in line.items() if k not in ("event", "round", "protocol", "baseline")}
            results.setdefault(line.get("baseline", line["round"]), {})[line["protocol"]] = result
    strategies = resources.all_strategies(run.config, memory=True, notify=listener.compiling)
    measured = {key: sum(line[key] for line in rounds) for key in ("download_bytes", "upload_bytes", "seconds")}
    if run.config.additions.depth_dropout:
        measured["flops_executed"] = resources.measured_operations(run.config, rounds)
    summary = {
        "strategy": run.config.strategy.name,
        "objective": run.config.objective.name,
        "rounds": len(rounds),
        "seconds": round(measured["seconds"], 2),
        "evaluation": results.get(len(rounds), {}),
        "baselines": {"untrained": results.get(0, {})} | {k: v for k, v in results.items() if k == "scratch"},
        "resources": strategies[run.config.strategy.name]
        | {"measured": measured | {"clients": run.config.partition.clients, "scope": MEASURED}},
        "strategies": strategies,
    }
    if run.fleet:
        summary["fleet"] = fleet.summary(run.fleet, run.clients.sizes)
    workdir.save_encoder(export.encoder_files(run.config, run.task, params))
    interrupts.check()
    with workdir.writing("plots"):
        report.plot_metrics(lines, workdir.path)
        plots = workdir.path / "plots"
        report.plot_distance(lines, plots / "client_distance.png")
        report.plot_resources(strategies, run.config.federation.local_epochs, plots / "resources.png")
    workdir.write_json("summary.json", summary)
    return summary
