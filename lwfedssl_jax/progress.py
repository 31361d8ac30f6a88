"""A run as it goes: a live line in a terminal, else a line every few seconds."""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from lwfedssl_jax import resources
from lwfedssl_jax.simulate import Listener, Run
from lwfedssl_jax.stages import Stage
from lwfedssl_jax.sweep import Estimate, SweepRun

SHOWN_AS = {"running": "bold", "failed": "red", "finished": "", "waiting": "dim"}
SECONDS_BETWEEN_LINES = 5.0  # where the output is no terminal
SECONDS_BETWEEN_UPDATES = 0.3  # in a notebook


def clock(seconds: float) -> str:
    """``minutes:seconds``, with hours where there are some."""
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{hours}:{minutes % 60:02d}:{int(seconds) % 60:02d}" if hours else f"{minutes}:{int(seconds) % 60:02d}"


class ConsoleProgress(Listener):
    """Prints what it hears; a context manager that owns the live line."""

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
        self._left = [1.0]
        self._number = 0

    def __enter__(self) -> "ConsoleProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def loading(self, what: str) -> None:
        self._show(what)

    def note(self, what: str) -> None:
        self.say(what)

    def start(self, run: Run, finished_rounds: int) -> None:
        self._run, self._number = run, finished_rounds
        config, sizes = run.config, run.clients.sizes
        self.say(
            f"{config.strategy.name}, {config.objective.name}: {len(run.stages)} stages, {config.federation.rounds} "
            f"rounds, {len(sizes):,} clients with {sizes.min()} to {sizes.max()} examples, "
            f"{run.lanes} lane{'s' * (run.lanes > 1)} on {run.mesh.size} {jax.devices()[0].device_kind}"
            f" device{'s' * (run.mesh.size > 1)}"
        )
        if finished_rounds:
            self.say(f"continuing after round {finished_rounds}")
        # A round's cost depends on its stage: progress is measured in operations, not rounds.
        per_stage = resources.ledger(config)["per_stage"]
        costs = [row["flops_executed"] / row["rounds"] for row in per_stage for _ in range(row["rounds"])]
        self._left = [sum(costs[i:]) for i in range(len(costs) + 1)]  # after i rounds
        self._left_at_start = self._left[finished_rounds]

    def compiling(self, what: str) -> None:
        self._show(f"compiling {what}", always=True)

    def stage(self, stage: Stage) -> None:
        self._stage = stage
        self._status = f"stage {stage.number}/{len(self._run.stages)}"

    def steps(self, round_number: int, done: int, total: int) -> None:
        self._show(f"{self._status} · round {round_number}, step {done}/{total}")

    def round(self, line: dict[str, Any]) -> None:
        self._number = line["round"]
        seconds = max(line["seconds"], 1e-4)
        self._training += seconds
        loss = "nobody reported" if line["loss"] is None else f"loss {line['loss']:.3f}"
        self._status = (
            f"stage {line['stage']}/{len(self._run.stages)} · round {self._number}/{self._run.config.federation.rounds}"
            f" · {loss} · {line['clients'] / seconds:.3g} clients/s"
            f" · {line['examples'] / seconds:,.0f} samples/s · {self._time_left()} left"
        )
        self._show(self._status, always=self._number == self._stage.first_round + self._stage.rounds)

    def fine_tuning(self, what: str) -> None:
        self._show(what)

    def evaluation(self, line: dict[str, Any]) -> None:
        start = "from scratch" if "baseline" in line else "untrained"
        where = f"round {line['round']}, {line['depth']} layers" if line["round"] else start
        self.say(f"  {where}: {line['protocol']} {100 * line['accuracy']:.1f} %")

    def _time_left(self) -> str:
        done = self._left_at_start - self._left[self._number]
        return clock(self._training / done * self._left[self._number])

    def _show(self, text: str, *, always: bool = False) -> None:
        if self._console.is_terminal:
            self._bar.update(self._task, description=text, completed=1 - self._left[self._number] / self._left[0])
            self._bar.start()  # not before there is something to show: tensorflow-datasets has bars of its own
        elif always or time.monotonic() - self._printed > SECONDS_BETWEEN_LINES:
            self._printed = time.monotonic()
            self.say(text)


def estimates_table(runs: Sequence[SweepRun], estimates: Sequence[Estimate], finished: Collection[str]) -> Group:
    """A sweep before it starts: what each run takes, and the time of those that are left."""
    table = Table(title="Multiply-adds, and seconds of training at the speed of a step timed here")
    for column in ("run", "setting", "seed", "operations", "training"):
        table.add_column(column, justify="right" if column in ("seed", "operations", "training") else "left")
    left = 0.0
    scale, unit = (1e12, "T") if max(e.operations for e in estimates) >= 1e12 else (1e9, "G")
    for number, (run, of_run) in enumerate(zip(runs, estimates, strict=True), 1):
        done = run.directory in finished
        left += 0.0 if done else of_run.seconds
        shown = "finished" if done else clock(of_run.seconds)
        table.add_row(str(number), escape(run.label), str(run.seed), f"{of_run.operations / scale:,.3g} {unit}", shown)
    text = f"{len(runs)} runs, {len(finished)} finished; about {clock(left)} of training left on this machine"
    return Group(table, f"{text}; loading, compiling and judging come on top, and --jobs shares the same devices")


class SweepProgress:
    """A sweep's runs as they go: a live table in a terminal, else a line for each that ends.

    Args:
      console: to print to.
      runs: all of the sweep.
      costs: of each round, by the run's directory (``sweep.round_costs``).
      finished: directories of those that were finished before.
    """

    def __init__(
        self,
        console: Console,
        runs: Sequence[SweepRun],
        costs: Mapping[str, Sequence[float]],
        finished: Collection[str],
    ) -> None:
        self._console, self._runs, self._costs = console, runs, costs
        self._state = {run.directory: "finished" if run.directory in finished else "waiting" for run in runs}
        self._text = {run.directory: "before" if run.directory in finished else "" for run in runs}
        self._done = dict.fromkeys(self._state, 0.0)  # work of this command
        self._first: dict[str, int] = {}  # round before the first of this command
        self._left = {run.directory: 0.0 if run.directory in finished else sum(costs[run.directory]) for run in runs}
        self._accuracy: dict[str, dict[str, float]] = {}
        self._began = time.monotonic()
        self._live = Live(get_renderable=self._table, console=console, refresh_per_second=2, transient=True)

    def __enter__(self) -> "SweepProgress":
        if self._console.is_terminal:
            self._live.start()
        else:
            self._console.print(self._counts(), highlight=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def hear(self, run: SweepRun, event: Mapping[str, Any]) -> None:
        """What a worker says of a run (``workers.Pool``)."""
        name, kind = run.directory, event["event"]
        if kind == "started":
            self._state[name], self._text[name] = "running", "loading"
        elif kind == "compiling":
            self._text[name] = f"compiling {event['what']}"
        elif kind == "round":
            number, costs = event["round"], self._costs[name]
            first = self._first.setdefault(name, number - 1)
            self._done[name], self._left[name] = sum(costs[first:number]), sum(costs[number:])
            self._text[name] = f"stage {event['stage']}, round {number}/{len(costs)}"
        elif kind == "evaluation":
            self._accuracy.setdefault(name, {})[event["protocol"]] = event["accuracy"]
        elif kind in ("finished", "failed"):
            self._state[name], self._left[name] = kind, 0.0
            scores = [f"{p} {100 * a:.1f} %" for p, a in self._accuracy.get(name, {}).items()]
            self._text[name] = event["why"] if kind == "failed" else ", ".join(scores)
            if not self._console.is_terminal:
                text = f"{self._counts()}: {run.label}, seed {run.seed} {kind}: {self._text[name]}"
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _counts(self) -> str:
        states = list(self._state.values())
        counts = [f"{states.count(s)} {s}" for s in ("finished", "running", "failed", "waiting") if s in states]
        done, left = sum(self._done.values()), sum(self._left.values())
        if done and left:
            counts.append(f"about {clock((time.monotonic() - self._began) / done * left)} left")
        return ", ".join(counts)

    def _table(self) -> Table:
        table = Table(title=self._counts(), expand=True)
        for column, width, ratio in (("setting", None, 2), ("seed", 6, None), ("state", 9, None), ("", None, 3)):
            table.add_column(column, width=width, ratio=ratio, no_wrap=True, overflow="ellipsis")
        order = ("running", "failed", "finished", "waiting")
        rows = sorted(self._runs, key=lambda run: order.index(self._state[run.directory]))
        room = max(4, self._console.height - 8)
        for run in rows[:room]:
            state, text = self._state[run.directory], self._text[run.directory]
            table.add_row(escape(run.label), str(run.seed), state, escape(text), style=SHOWN_AS[state])
        if len(rows) > room:
            table.add_row(f"and {len(rows) - room} more", "", "", "")
        return table


class NotebookProgress(ConsoleProgress):
    """The same as one output of a notebook's cell, which changes in place and ends in a line or two."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        from IPython.display import display

        self._said: list[str] = []
        self._output = display({"text/plain": ""}, raw=True, display_id=True)

    def say(self, text: str) -> None:
        self._said.append(text)
        self._show("", always=True)

    def evaluation(self, line: dict[str, Any]) -> None:
        """Said by no line: a run has dozens."""

    def finished(self, summary: dict[str, Any]) -> None:
        self.say(f"{summary['rounds']} rounds in {summary['seconds']:.0f} s")

    def _show(self, text: str, *, always: bool = False) -> None:
        if always or time.monotonic() - self._printed > SECONDS_BETWEEN_UPDATES:
            self._printed = time.monotonic()
            self._output.update({"text/plain": "\n".join([*self._said, text])}, raw=True)
