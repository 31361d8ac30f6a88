"""A whole run: rounds, evaluation, checkpoints, work directory, summary. The only module that sees everything."""

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lwfedssl_jax.analysis import run_plots
from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.costs import fleet, ledger
from lwfedssl_jax.evaluation import frozen
from lwfedssl_jax.experiment.checks import check
from lwfedssl_jax.experiment.finish import finish, log_evaluation
from lwfedssl_jax.experiment.trackers import Tracking
from lwfedssl_jax.method.programs import ledger_config, program_config
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.simulation.events import Listener
from lwfedssl_jax.simulation.setup import Cache, Prepared, prepare
from lwfedssl_jax.simulation.simulator import Simulator
from lwfedssl_jax.simulation.state import RoundState, state_to_save
from lwfedssl_jax.system.devices import from_all, from_first
from lwfedssl_jax.system.errors import is_out_of_memory
from lwfedssl_jax.system.interrupts import Interrupts
from lwfedssl_jax.tree import Tree
from lwfedssl_jax.workdir import WorkDir

SECONDS_BETWEEN_CHECKPOINTS = 60


@dataclass
class ActiveRun:
    """A run on its way to its end.

    Attributes:
      config: resolved.
      workdir: belongs to this config; None in every process but the first of several.
      listener: hears of progress.
      done: rounds that are finished.
      saved: what the checkpoint after them holds.
      summary: the content of ``summary.json``, once the run is finished; nothing where there is no work directory.
      error: why it ended before.
    """

    config: Config
    workdir: WorkDir | None
    listener: Listener = field(default_factory=Listener)
    encode: frozen.Encode = field(default=None)  # type: ignore[assignment]  # once it has begun
    done: int = 0
    saved: Tree = field(default_factory=dict)
    summary: dict[str, Any] | None = None
    error: Exception | None = None

    @property
    def is_going(self) -> bool:
        """Neither finished nor failed."""
        return self.summary is None and self.error is None

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Keeps the error of this run alone, for the others to go on."""
        try:
            yield
        except Exception as error:
            self.error = error


class Everyone(Listener):
    """What is done for several runs at once, told to the listeners of all."""

    def __init__(self, members: Sequence[ActiveRun]) -> None:
        self._members = members

    def compiling(self, what: str) -> None:
        for member in self._members:
            member.listener.compiling(what)

    def steps(self, round_number: int, done: int, total: int) -> None:
        for member in self._members:
            member.listener.steps(round_number, done, total)


def train(
    config: Config, workdir: WorkDir | None, listener: Listener | None = None, shared: Cache | None = None
) -> dict[str, Any]:
    """Run the experiment, or what is left of it, and write the work directory.

    Args:
      config: resolved.
      workdir: belongs to this config; None in every process but the first of several.
      listener: hears of progress.
      shared: with other runs of this process.

    Returns:
      The content of ``summary.json``; nothing where there is no work directory.

    Raises:
      ConfigError: see ``prepare``; the work directory cannot be written or is in use, or none of its checkpoints
        is whole; the device's memory is too small.
      FloatingPointError: no client's update, or what the encoder gives, is finite.
      KeyboardInterrupt: on Ctrl-C or SIGTERM, after the current call; the last finished round has been saved.
      OSError: something cannot be written, such as on a full disk; what was saved before is whole.
    """
    member = ActiveRun(config, workdir, listener or Listener())
    train_together([member], shared)
    if member.error:
        raise member.error
    return member.summary or {}


def train_together(members: Sequence[ActiveRun], shared: Cache | None = None) -> None:
    """Run several experiments, or what is left of them, side by side; they end with a summary or an error each.

    Args:
      members: one, or several with one ``program_config`` for which ``go_together``; those that have not come equally
        far, and more than fit the memory, run one after the other.
      shared: with other runs of this process.

    Raises:
      ConfigError: processes of one run have different configs.
      KeyboardInterrupt: on Ctrl-C or SIGTERM, after the current call; the last finished round has been saved.
    """
    shared = shared or Cache()
    for member in members:
        check_same_config(member.config)
        finished = member.workdir.summary if member.workdir else None
        if from_first(np.array(finished is not None)):
            member.summary = finished or {}
    try:
        with Interrupts(members[0].listener.note) as interrupts, contextlib.ExitStack() as trackers:
            for member in members:
                member.listener = trackers.enter_context(Tracking(member.config, member.workdir, member.listener))
            interrupts.check()
            waiting: dict[int, list[tuple[ActiveRun, Prepared]]] = {}
            for member in members:
                with member.failing():
                    if member.is_going:
                        run = begin(member, shared, interrupts)
                        waiting.setdefault(member.done, []).append((member, run))
            for group in waiting.values():
                while group:
                    count = run_group(group, shared, interrupts)
                    del group[:count]
    finally:
        for member in members:
            if member.workdir:
                member.workdir.close()


def begin(member: ActiveRun, shared: Cache, interrupts: Interrupts) -> Prepared:
    """Take the work directory, load what the run needs and find out how far it has come."""
    workdir, listener = member.workdir, member.listener
    if workdir:
        workdir.take()
    check(member.config)
    run = prepare(member.config, listener=listener, shared=shared)
    frozen.check(member.config.evaluation, run.dataset)
    task = run.task
    member.encode = shared.once(
        ("encode", program_config(run.config)), lambda: frozen.make_encode(task.encoder, task.recipe, task.dtype)
    )
    interrupts.check()
    if member.config.fleet.devices:
        run = on_fleet(run, listener, shared)
        interrupts.check()
    found, faults = workdir.restore() if workdir else (None, {})
    for rounds, why in faults.items():
        listener.note(f"checkpoint {rounds} is damaged: {why}")
    member.done = int(from_first(np.int32(found.rounds if found else 0)))
    member.saved = found.state if found else {}
    return run


def on_fleet(run: Prepared, listener: Listener, shared: Cache) -> Prepared:
    """The run with its clients on the devices of its fleet.

    Raises:
      ConfigError: see ``plan.fleet_of_clients``.
    """
    config = run.config
    priced = lambda: ledger.ledgers_of({"": config}, memory=True, notify=listener.compiling)[""]  # noqa: E731
    per_stage = shared.once(("ledger", ledger_config(config)), priced)["per_stage"]
    on_devices = fleet.fleet_of_clients(config, per_stage, run.clients.sizes)
    listener.note(fleet.fleet_line(fleet.summary(on_devices, run.clients.sizes), len(per_stage)))
    return run._replace(fleet=on_devices)


def run_group(group: Sequence[tuple[ActiveRun, Prepared]], shared: Cache, interrupts: Interrupts) -> int:
    """Run as many of a group, the first ones, as fit the memory side by side, to their end.

    Returns:
      How many these are.
    """
    count, simulator = len(group), None
    while simulator is None:
        members, (run, *others) = [member for member, _ in group[:count]], [run for _, run in group[:count]]
        done = members[0].done
        left = [stage for stage in run.stages if done < stage.first_round + stage.rounds]
        try:
            simulator = Simulator(run, left, Everyone(members), interrupts.check, shared, others)
            params, state = simulator.take_up(done, *[member.saved for member in members])
        except Exception as error:  # before anything of any of them is written
            if count > 1 and is_out_of_memory(error):
                count, simulator = count // 2, None
                continue
            for member in members:
                member.error = error
            return count
    try:
        interrupts.check()
        for number, (member, run) in enumerate(zip(members, simulator.runs, strict=True)):
            member.saved = {}
            with member.failing():
                open_run(member, run, simulator.of_run(number, params))
        params = run_rounds(simulator, members, interrupts, done, params, state)
        for number, (member, run) in enumerate(zip(members, simulator.runs, strict=True)):
            with member.failing():
                if member.is_going:
                    of_run = simulator.of_run(number, params)
                    member.summary = (
                        finish(run, member.encode, member.workdir, of_run, member.listener, interrupts, shared)
                        if member.workdir
                        else {}
                    )
        interrupts.check()
    except Exception as error:  # of all of them, such as of the device
        for member in members:
            member.error = member.error or (error if member.is_going else None)
    return count


def open_run(member: ActiveRun, run: Prepared, params: Tree) -> None:
    """Make the work directory, or go on with it, and judge the encoder that nothing has trained yet."""
    workdir, listener = member.workdir, member.listener
    if workdir:
        workdir.open(run.lanes, run.mesh.size)
        with workdir.writing("plots"):
            run_plots.plot_clients(run.dataset.train_labels, run.clients, workdir.path)
        listener.start(run, member.done)
        if not member.done:
            log_evaluation(run, member.encode, workdir, listener, run.config.model.depth, 0, params)


def run_rounds(
    simulator: Simulator,
    members: Sequence[ActiveRun],
    interrupts: Interrupts,
    done: int,
    params: Tree,
    state: RoundState | None,
) -> Tree:
    """The rounds after the first ``done``; saves after every round of a minute, else every minute, and every stage."""
    run, last_saved = simulator.run, time.monotonic()
    ends = [stage.first_round + stage.rounds for stage in run.stages]

    def save(number: int) -> None:
        member = members[number]
        if member.workdir and done:
            of_run = state_to_save(simulator.of_run(number, params), simulator.of_run(number, state))
            member.workdir.save(done, of_run, ends)

    try:
        with interrupts.held_back():
            for stage, last in zip(run.stages, ends, strict=True):
                if done >= last:
                    continue
                for member in members:
                    member.listener.stage(stage)
                if done == stage.first_round:
                    state = None
                while done < last and any(member.is_going for member in members):
                    new_params, new_state, lines = simulator.run_rounds(stage, params, state, done + 1)
                    for number, (member, line) in enumerate(zip(members, lines, strict=True)):
                        if not member.is_going:
                            continue
                        with member.failing():
                            log_round(member, simulator.runs[number], stage, line, simulator.of_run(number, new_params))
                        if isinstance(member.error, FloatingPointError):
                            with member.failing():
                                save(number)
                    params, state, done = new_params, new_state, done + 1
                    due = done == last or time.monotonic() - last_saved > SECONDS_BETWEEN_CHECKPOINTS
                    for number, member in enumerate(members):
                        with member.failing():
                            if due and member.is_going:
                                save(number)
                                last_saved = time.monotonic()
                    interrupts.check()
    except KeyboardInterrupt:
        for number, member in enumerate(members):
            if member.is_going:
                save(number)
        raise
    return params


def log_round(
    member: ActiveRun, run: Prepared, stage: Stage, line: dict[str, Any] | FloatingPointError, params: Tree
) -> None:
    """Write a round's line, and judge the encoder where that is due; ``line`` as ``Simulator.run_rounds`` gives it."""
    if isinstance(line, FloatingPointError):
        raise line
    if member.workdir:
        member.workdir.append(line)
        member.listener.round(line)
        number, every = line["round"], run.config.evaluation.every
        if number == stage.first_round + stage.rounds or (every and number % every == 0):
            log_evaluation(run, member.encode, member.workdir, member.listener, stage.depth, number, params)


def check_same_config(config: Config) -> None:
    """Refuse processes of one run with different configs.

    Raises:
      ConfigError: in all of them.
    """
    digest = hashlib.sha256(repr(config).encode()).digest()
    if len(set(from_all(int.from_bytes(digest[:7], "big")))) > 1:
        raise ConfigError("--processes: they have different configs; accepted: the same CONFIG and options for each")
