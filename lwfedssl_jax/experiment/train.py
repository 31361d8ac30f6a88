"""Training of one run, or of several that are stacked: the loop over rounds."""

import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lwfedssl_jax.analysis import run_plots
from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.costs.accountant import epsilon_after
from lwfedssl_jax.experiment import pictures
from lwfedssl_jax.experiment.active import ActiveRun
from lwfedssl_jax.experiment.datasets import load_run_data
from lwfedssl_jax.experiment.evaluations import is_evaluated, lacks_noise_only, log_evaluation, log_noise_only
from lwfedssl_jax.experiment.finish import finish
from lwfedssl_jax.experiment.ledgers import round_operations
from lwfedssl_jax.experiment.trackers import Tracking
from lwfedssl_jax.method.stages import Stage, alike
from lwfedssl_jax.simulation.events import Event, Hear, Note, RoundDone, StageBegan, Started, ignore
from lwfedssl_jax.simulation.setup import Cache, Prepared
from lwfedssl_jax.simulation.simulator import Outcome, Simulator
from lwfedssl_jax.simulation.state import RoundState
from lwfedssl_jax.system.devices import from_all, from_first
from lwfedssl_jax.system.errors import is_out_of_memory
from lwfedssl_jax.system.interrupts import Interrupts
from lwfedssl_jax.tree import Tree
from lwfedssl_jax.workdir import WorkDir

SECONDS_BETWEEN_CHECKPOINTS = 60


def train(config: Config, workdir: WorkDir | None, hear: Hear = ignore, cache: Cache | None = None) -> dict[str, Any]:
    """Run an experiment, or continue it, and write its work directory.

    Args:
      config: resolved.
      workdir: belongs to this config; None in every process except the first of several.
      hear: called with each event.
      cache: shared with other runs of this process.

    Returns:
      The content of ``summary.json``; empty without a work directory.

    Raises:
      ConfigError: see ``prepare``; the work directory cannot be written or is in use, or none of its checkpoints
        is undamaged; the device's memory is too small.
      FloatingPointError: no client's update, or not every feature of the encoder, is finite.
      KeyboardInterrupt: on Ctrl-C or SIGTERM, after the current call; the last finished round has been saved.
      OSError: something cannot be written, for example because the disk is full; what was saved before is undamaged.
    """
    run = ActiveRun(config, workdir, [hear])
    train_together([run], cache)
    if run.error:
        raise run.error
    return run.summary or {}


def train_together(
    runs: Sequence[ActiveRun], cache: Cache | None = None, make: Callable[..., Simulator] = Simulator
) -> None:
    """Run several experiments, or continue them; each ends with a summary or an error.

    Args:
      runs: one, or several with one ``program_config`` that can be stacked (``can_stack``); those that have finished
        different numbers of rounds, or do not fit into memory together, run one after the other.
      cache: shared with other runs of this process.
      make: makes the simulator, with the arguments of the class.

    Raises:
      ConfigError: processes of one run have different configs.
      KeyboardInterrupt: on Ctrl-C or SIGTERM, after the current call; the last finished round has been saved.
    """
    cache = cache or Cache()
    for run in runs:
        check_same_config(run.config)
        finished = run.workdir.summary if run.workdir else None
        if from_first(np.array(finished is not None)):
            with run.catching():
                check_finished(run, cache)
                run.summary = dict(finished or {})
    try:
        with Interrupts(lambda text: runs[0].hear(Note(text))) as interrupts, contextlib.ExitStack() as trackers:
            for run in runs:
                if run.workdir and run.config.runtime.trackers:
                    run.listeners.append(trackers.enter_context(Tracking(run.config, run.workdir, run.hear)))
            interrupts.check()
            for group in load_groups(runs, cache, interrupts):
                train_group(group, cache, interrupts, make)
    except KeyboardInterrupt:
        saved = max((run.workdir.saved_rounds for run in runs if run.workdir), default=0)
        goes_on = f"continues after round {saved}" if saved else "begins again; no round is saved"
        raise KeyboardInterrupt(f"interrupted; the same command {goes_on}") from None
    finally:
        for run in runs:
            if run.workdir:
                run.workdir.close()


def check_finished(run: ActiveRun, cache: Cache) -> None:
    """Refuse data that a finished run was not trained on; if they are no longer there, a note says so.

    Raises:
      ConfigError: the data differ.
    """
    knows_data = bool(run.workdir and run.workdir.data)
    if not from_first(np.array(knows_data)):  # of an earlier version
        return
    try:
        data = load_run_data(run.config, run.hear, cache).fingerprint
    except ConfigError as error:
        run.hear(Note(f"this run is finished, and its data cannot be compared with those of today: {error}"))
        return
    run.check_data(data)


def load_groups(runs: Sequence[ActiveRun], cache: Cache, interrupts: Interrupts) -> list[list[ActiveRun]]:
    """Load the unfinished runs and group those that have finished the same number of rounds."""
    groups: dict[int, list[ActiveRun]] = {}
    for run in runs:
        with run.catching():
            if run.is_active:
                run.load(cache, interrupts)
                groups.setdefault(run.done, []).append(run)
    return list(groups.values())


def train_group(group: list[ActiveRun], cache: Cache, interrupts: Interrupts, make: Callable[..., Simulator]) -> None:
    """Train the runs of a group: stacked, as many at a time as fit into memory."""
    while group:
        del group[: train_stacked(group, cache, interrupts, make)]


def train_stacked(
    group: Sequence[ActiveRun], cache: Cache, interrupts: Interrupts, make: Callable[..., Simulator]
) -> int:
    """Train the first runs of a group to their end, as many as fit into memory together.

    Returns:
      The number of these runs.
    """
    runs, simulator = list(group), None
    while simulator is None:
        try:
            simulator, position = simulate(runs, cache, interrupts, make)
        except Exception as error:  # before anything of any of them is written
            if len(runs) == 1 or not is_out_of_memory(error):
                fail(runs, error)
                return len(runs)
            runs = runs[: len(runs) // 2]
    try:
        interrupts.check()
        each_active(runs, lambda i: start(runs[i], simulator.stack.select(i, position.params), cache))
        run_rounds(simulator, runs, interrupts, position)
        log_noise(simulator, runs)
        each_active(runs, lambda i: finish(runs[i], simulator.stack.select(i, position.params), interrupts, cache))
        interrupts.check()
    except Exception as error:  # of all of them, such as of the device
        fail(runs, error)
    return len(runs)


def each_active(runs: Sequence[ActiveRun], do: Callable[[int], None]) -> None:
    """Call a function for every active run, with its index; an error ends only that run."""
    for number, run in enumerate(runs):
        if run.is_active:
            with run.catching():
                do(number)


def fail(runs: Sequence[ActiveRun], error: Exception) -> None:
    """End all runs that are still active with an error."""
    for run in runs:
        if run.is_active:
            run.error = error


@dataclass
class Position:
    """Progress of runs that are trained together.

    Attributes:
      done: how many rounds are finished.
      params, state: after these rounds (``Simulator``).
      saved: when the last checkpoint was written.
    """

    done: int
    params: Tree
    state: RoundState | None
    saved: float

    def save(self, simulator: Simulator, runs: Sequence[ActiveRun], number: int) -> None:
        """Write a checkpoint of one of the runs."""
        params, state = simulator.stack.select(number, (self.params, self.state))
        runs[number].save(self.done, params, state)


def simulate(
    runs: Sequence[ActiveRun], cache: Cache, interrupts: Interrupts, make: Callable[..., Simulator]
) -> tuple[Simulator, Position]:
    """Make a simulator of the runs, with the programs of all remaining stages, and the position where it continues."""

    def hear(event: Event) -> None:
        for run in runs:
            run.hear(event)

    done = runs[0].done
    left = [stage for stage in runs[0].prepared.stages if done < stage.last_round]
    simulator = make([run.prepared for run in runs], left, hear, interrupts.check, cache)
    params, state = simulator.resume(done, [run.saved for run in runs], runs[0].losses)
    for run, prepared in zip(runs, simulator.runs, strict=True):
        run.prepared, run.saved, run.losses = prepared, {}, []
    return simulator, Position(done, params, state, time.monotonic())


def start(run: ActiveRun, params: Tree, cache: Cache) -> None:
    """Create or reopen the work directory, and evaluate the untrained encoder of a new run."""
    prepared = run.prepared
    if not run.workdir:
        return
    run.workdir.open(prepared.lanes, prepared.mesh.size, run.data.fingerprint)
    if prepared.clients.is_here:
        plot_clients(run.workdir, prepared)
    run.hear(
        Started(
            config=run.config,
            stages=len(prepared.stages),
            sizes=prepared.clients.sizes,
            lanes=prepared.lanes,
            devices=prepared.mesh.size,
            finished_rounds=run.done,
            operations=round_operations(run.config, cache),
        )
    )
    if same := alike(run.config):
        run.hear(Note(same))
    if not run.done:
        log_evaluation(run, run.config.model.depth, 0, params)


def plot_clients(workdir: WorkDir, prepared: Prepared) -> None:
    """Draw which classes the clients' images have."""
    with workdir.writing("plots"):
        dataset, names = prepared.dataset, pictures.names_of_clients(prepared)
        run_plots.plot_clients(dataset.train_labels, prepared.clients, workdir.path, dataset.class_names, names)


def run_rounds(simulator: Simulator, runs: Sequence[ActiveRun], interrupts: Interrupts, position: Position) -> None:
    """Run all remaining rounds; on Ctrl-C or SIGTERM, save the last finished round and end.

    Raises:
      KeyboardInterrupt: on Ctrl-C or SIGTERM.
    """
    try:
        with interrupts.held_back():
            while position.done < simulator.run.stages[-1].last_round and any(run.is_active for run in runs):
                run_stage(simulator, runs, interrupts, position)
    except KeyboardInterrupt:
        for number in [i for i, run in enumerate(runs) if run.is_active]:
            position.save(simulator, runs, number)
        raise


def run_stage(simulator: Simulator, runs: Sequence[ActiveRun], interrupts: Interrupts, position: Position) -> None:
    """Run the remaining rounds of the next stage that is not finished, as long as any run is active."""
    stage = next(stage for stage in simulator.run.stages if position.done < stage.last_round)
    for run in runs:
        run.hear(StageBegan(stage))
    if position.done == stage.first_round:
        position.state = None
    while position.done < stage.last_round and any(run.is_active for run in runs):
        stage = run_round(simulator, runs, position, stage)
        save_if_due(simulator, runs, position, stage)
        interrupts.check()


def run_round(simulator: Simulator, runs: Sequence[ActiveRun], position: Position, stage: Stage) -> Stage:
    """Run the next round; a run whose round is not finite ends with a checkpoint of the round before.

    Returns:
      The stage, which may end with this round.
    """
    result = simulator.run_rounds(stage, position.params, position.state, position.done + 1)
    for run, prepared in zip(runs, simulator.runs, strict=True):
        run.prepared = prepared

    def record_round(number: int) -> None:
        try:
            record(runs[number], result.stage, result.outcomes[number], simulator.stack.select(number, result.params))
        except FloatingPointError:
            position.save(simulator, runs, number)
            raise

    each_active(runs, record_round)
    position.done, position.params, position.state = position.done + 1, result.params, result.state
    return result.stage


def save_if_due(simulator: Simulator, runs: Sequence[ActiveRun], position: Position, stage: Stage) -> None:
    """Write checkpoints at the end of a stage, and otherwise if the last ones are older than a minute."""
    if position.done < stage.last_round and time.monotonic() - position.saved <= SECONDS_BETWEEN_CHECKPOINTS:
        return

    def save(number: int) -> None:
        position.save(simulator, runs, number)
        position.saved = time.monotonic()

    each_active(runs, save)


def record(run: ActiveRun, stage: Stage, outcome: Outcome, params: Tree) -> None:
    """Write a round's line, and evaluate the encoder if that is due.

    Raises:
      FloatingPointError: no client's update, or not every feature of the encoder, is finite.
    """
    if outcome.error:
        raise outcome.error
    if run.workdir:
        line, number = outcome.line, outcome.line["round"]
        if evaluated := is_evaluated(stage, run.config.evaluation.every, number):
            line = line | spent(run, number)
        run.workdir.append(line)
        run.hear(RoundDone(line))
        if evaluated:
            log_evaluation(run, stage.depth, number, params)


def spent(run: ActiveRun, rounds: int) -> dict[str, float]:
    """Return the epsilon of a run's first rounds, for the line of the last of these; empty without noise."""
    prepared = run.prepared
    if not prepared.noise_multiplier:
        return {}
    multiplier, stages, fleet = prepared.noise_multiplier, prepared.stages, prepared.fleet
    return {"epsilon": epsilon_after(run.config, multiplier, stages, fleet, rounds)}


def log_noise(simulator: Simulator, runs: Sequence[ActiveRun]) -> None:
    """Evaluate what the noise of private runs makes of an encoder that no client trains."""
    noisy = [run.is_active and run.prepared.noise_multiplier > 0 and lacks_noise_only(run) for run in runs]
    if not any(noisy):
        return
    params = simulator.noise_only([run.of_rounds("clip_norm") for run in runs])
    each_active(runs, lambda i: log_noise_only(runs[i], simulator.stack.select(i, params)) if noisy[i] else None)


def check_same_config(config: Config) -> None:
    """Refuse processes of one run with different configs.

    Raises:
      ConfigError: in all of them.
    """
    digest = hashlib.sha256(repr(config).encode()).digest()
    if len(set(from_all(int.from_bytes(digest[:7], "big")))) > 1:
        raise ConfigError(
            "--processes: the configs of the processes differ; accepted: the same CONFIG and options for each"
        )
