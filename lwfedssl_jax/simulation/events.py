"""Progress events of a run: one small type per event, and one function that receives them all."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lwfedssl_jax.config import Config
from lwfedssl_jax.method.stages import Stage


class Loading(NamedTuple):
    """Progress of loading the data set."""

    what: str


class Note(NamedTuple):
    """Something that the user should know."""

    text: str


class Started(NamedTuple):
    """The run begins, or continues after ``finished_rounds``.

    Attributes:
      config: resolved.
      stages: how many there are.
      sizes: N, the number of each client's examples.
      lanes, devices: how many are used.
      finished_rounds: how many rounds were finished before.
      operations: of each round, multiply-adds per sample, to measure progress by.
    """

    config: Config
    stages: int
    sizes: np.ndarray
    lanes: int
    devices: int
    finished_rounds: int
    operations: list[float]


class Compiling(NamedTuple):
    """A compilation begins."""

    what: str


class StageBegan(NamedTuple):
    """A stage's rounds begin."""

    stage: Stage


class StepsDone(NamedTuple):
    """Progress within a round."""

    round: int
    done: int
    total: int


class RoundDone(NamedTuple):
    """A round's line of ``metrics.jsonl``."""

    line: dict[str, Any]


class FineTuning(NamedTuple):
    """An epoch of fine-tuning begins."""

    what: str


class Evaluated(NamedTuple):
    """An evaluation's line of ``metrics.jsonl``."""

    line: dict[str, Any]


class Described(NamedTuple):
    """A line of ``metrics.jsonl`` with label-free metrics."""

    line: dict[str, Any]


class Finished(NamedTuple):
    """The run is finished and its summary is written."""

    summary: dict[str, Any]


Event = (
    Loading | Note | Started | Compiling | StageBegan | StepsDone | RoundDone
    | FineTuning | Evaluated | Described | Finished
)  # fmt: skip
Hear = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Ignore all events."""
