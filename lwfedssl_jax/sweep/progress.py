"""Shows the progress of a sweep."""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from lwfedssl_jax.analysis.wording import clock
from lwfedssl_jax.sweep.estimate import Estimate
from lwfedssl_jax.sweep.grid import SweepRun

SHOWN_AS = {"running": "bold", "failed": "red", "finished": "", "waiting": "dim"}


def estimates_table(runs: Sequence[SweepRun], estimates: Sequence[Estimate], finished: Collection[str]) -> Group:
    """Show a sweep before it starts: the estimate for each run, and the time of the remaining ones."""
    table = Table(title="Multiply-adds, and time by what was measured here: a step, its compilation, the probes")
    for column in ("run", "setting", "seed", "operations", "training", "evaluation", "compiling"):
        table.add_column(column, justify="left" if column in ("run", "setting") else "right")
    left = [e for run, e in zip(runs, estimates, strict=True) if run.directory not in finished]
    scale, unit = (1e12, "T") if max((e.operations for e in estimates), default=0) >= 1e12 else (1e9, "G")
    for number, (run, of_run) in enumerate(zip(runs, estimates, strict=True), 1):
        times = (of_run.training, of_run.evaluation, of_run.compiling)
        shown = ["finished", "", ""] if run.directory in finished else [clock(seconds) for seconds in times]
        operations = f"{of_run.operations / scale:,.3g} {unit}"
        table.add_row(str(number), escape(run.label), str(run.seed), operations, *shown)
    training, evaluation, compiling, seconds = (
        clock(sum(getattr(e, name) for e in left)) for name in ("training", "evaluation", "compiling", "seconds")
    )
    text = (
        f"{len(runs)} runs, {len(finished)} finished; about {seconds} left on this machine: "
        f"{training} of training, {evaluation} of evaluation, {compiling} of loading, compiling and ledgers, which the "
        "first of the runs that share them needs. Fine-tuning is not counted; with --jobs, all processes share the "
        "devices."
    )
    return Group(table, text)


class SweepProgress:
    """Shows the runs of a sweep: a live table in a terminal, otherwise a line for each run that ends.

    Args:
      console: to print to.
      runs: all of the sweep.
      costs: of each round, by the run's directory (``estimate.round_costs``).
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
        """Receive an event of a run from a worker (``pool.Pool``)."""
        name, kind = run.directory, event["event"]
        if kind == "started":
            self._state[name], self._text[name] = "running", "loading"
        elif kind == "Compiling":
            self._text[name] = f"compiling {event['what']}"
        elif kind == "FineTuning":
            self._text[name] = event["what"]
        elif kind == "RoundDone":
            line, costs = event["line"], self._costs[name]
            number = line["round"]
            first = self._first.setdefault(name, number - 1)
            self._done[name], self._left[name] = sum(costs[first:number]), sum(costs[number:])
            self._text[name] = f"stage {line['stage']}, round {number}/{len(costs)}"
        elif kind == "Evaluated" and "baseline" not in (line := event["line"]):
            self._accuracy.setdefault(name, {})[line["protocol"]] = line["accuracy"]
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
