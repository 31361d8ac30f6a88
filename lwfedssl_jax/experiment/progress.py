"""Progress of a run on a terminal, in a log and in a notebook."""

import time
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from lwfedssl_jax.analysis.wording import clock, percent
from lwfedssl_jax.config.protocols import NOISE_ONLY
from lwfedssl_jax.simulation.events import (
    Compiling,
    Described,
    Evaluated,
    Event,
    FineTuning,
    Finished,
    Loading,
    Note,
    RoundDone,
    StageBegan,
    Started,
    StepsDone,
)

SECONDS_BETWEEN_LINES = 5.0  # where the output is not a terminal
SECONDS_BETWEEN_UPDATES = 0.3  # in a notebook


class ConsoleProgress:
    """Prints the progress of a run; a context manager that owns the live line."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(20), TextColumn("{task.percentage:.0f}%"),
            console=console, transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("starting", total=1.0)
        self._printed = 0.0
        self._status = ""
        self._training = 0.0  # seconds of rounds so far
        self._left = [1.0]  # operations after each number of rounds
        self._number = 0

    def __enter__(self) -> "ConsoleProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def __call__(self, event: Event) -> None:
        """Receive an event of the run."""
        match event:
            case Note(text):
                self.say(text)
            case Started():
                self._start(event)
            case Compiling(what):
                self._show(f"compiling {what}", always=True)
            case StageBegan(stage):
                self._stage = stage
                self._status = f"stage {stage.number}/{self._run.stages}"
            case StepsDone():
                self._show(f"{self._status} · round {event.round}, step {event.done}/{event.total}")
            case RoundDone(line):
                self._round(line)
            case Evaluated(line):
                self._evaluation(line)
            case Described(line):
                self._description(line)
            case Loading(what) | FineTuning(what):
                self._show(what)
            case Finished(summary):
                self._finished(summary)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _start(self, run: Started) -> None:
        self._run, self._number = run, run.finished_rounds
        config, sizes = run.config, run.sizes
        self.say(
            f"{config.strategy.name}, {config.objective.name}: {run.stages} stages, {config.federation.rounds} "
            f"rounds, {len(sizes):,} clients with {sizes.min()} to {sizes.max()} examples, "
            f"{run.lanes} lane{'s' * (run.lanes > 1)} on {run.devices} {jax.devices()[0].device_kind}"
            f" device{'s' * (run.devices > 1)}"
        )
        if run.finished_rounds:
            self.say(f"continuing after round {run.finished_rounds}")
        # A round's cost depends on its stage: progress is measured in operations, not rounds.
        costs = run.operations
        self._left = [sum(costs[i:]) for i in range(len(costs) + 1)]
        self._left_at_start = self._left[run.finished_rounds]

    def _round(self, line: dict[str, Any]) -> None:
        self._number = line["round"]
        seconds = max(line["seconds"], 1e-4)
        self._training += seconds
        loss = "nobody reported" if line["loss"] is None else f"loss {line['loss']:.3f}"
        self._status = (
            f"stage {line['stage']}/{self._run.stages} · round {self._number}/{self._run.config.federation.rounds}"
            f" · {loss} · {line['clients'] / seconds:.3g} clients/s"
            f" · {line['examples'] / seconds:,.0f} samples/s · {self._time_left()} left"
        )
        self._show(self._status, always=True)  # piped, a line for each round

    def _evaluation(self, line: dict[str, Any]) -> None:
        self.say(f"  {encoder_words(line)}: {line['protocol']} {percent(line['accuracy'])}")

    def _description(self, line: dict[str, Any]) -> None:
        self.say(
            f"  {encoder_words(line)}: without labels: effective rank {line['effective_rank']:.1f}, alignment "
            f"{line['alignment']:.2f}, uniformity {line['uniformity']:.2f}, feature std {line['feature_std']:.2f}"
        )

    def _finished(self, summary: dict[str, Any]) -> None:
        """On a terminal, the command prints the summary."""

    def _time_left(self) -> str:
        done = self._left_at_start - self._left[self._number]
        return clock(self._training / done * self._left[self._number])

    def _show(self, text: str, *, always: bool = False) -> None:
        if self._console.is_terminal:
            self._bar.update(self._task, description=text, completed=1 - self._left[self._number] / self._left[0])
            self._bar.start()  # not before there is something to show: tensorflow-datasets shows its own progress bars
        elif always or time.monotonic() - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self.say(text)


def encoder_words(line: dict[str, Any]) -> str:
    """Name the encoder that a line is about."""
    if "baseline" in line:
        return {"scratch": "from scratch", NOISE_ONLY: "noise only, nothing learnt"}[line["baseline"]]
    return f"round {line['round']}, depth {line['depth']}" if line["round"] else "untrained"


class NotebookProgress(ConsoleProgress):
    """The same for a notebook: one cell output that changes in place and ends as a line or two."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        from IPython.display import display

        self._said: list[str] = []
        self._output = display({"text/plain": ""}, raw=True, display_id=True)

    def say(self, text: str) -> None:
        self._said.append(text)
        self._show("", always=True)

    def _evaluation(self, line: dict[str, Any]) -> None:
        """Evaluations are not printed: a run has dozens of them."""

    def _description(self, line: dict[str, Any]) -> None:
        """Nor are these."""

    def _finished(self, summary: dict[str, Any]) -> None:
        self.say(f"{summary['rounds']} rounds in {summary['seconds']:.0f} s")

    def _show(self, text: str, *, always: bool = False) -> None:
        if always or time.monotonic() - self._printed > SECONDS_BETWEEN_UPDATES:
            self._printed = time.monotonic()
            self._output.update({"text/plain": "\n".join([*self._said, text])}, raw=True)
