"""Adaptive pacing: a stage ends when more rounds of it no longer pay, and later stages get the rounds that are left.

The signal is one that a server has anyway: the mean training loss that the clients report. Other work freezes layers
by how far their averaged weights still move: effective movement (ProFL, arXiv 2404.13349), block perturbation
(SmartFreeze, arXiv 2408.09101).
"""

import math
from collections.abc import Sequence

import numpy as np

from lwfedssl_jax.config import Config
from lwfedssl_jax.method.stages import Stage

LEAST_FALL = 0.2  # of the loss in all of a run's rounds, at the present pace: below it, a stage ends
WINDOW_SHARE = 1 / 2  # of the rounds of an even stage, over which the pace is measured
LEAST_WINDOW = 4  # rounds


def paced_stages(config: Config, stages: Sequence[Stage], losses: Sequence[float]) -> list[Stage]:
    """Return the stages of a run after its first rounds: those that are over, and how long the others may last.

    A stage may last as long as each later one still gets a round. With ``strategy.pacing`` fixed, all last as planned.

    Args:
      config: resolved.
      stages: as planned.
      losses: mean training loss of each round so far; NaN if no client reported.
    """
    if config.strategy.pacing == "fixed":
        return list(stages)
    paced = _share_what_is_left(stages, [])
    for number in range(1, len(losses) + 1):
        paced = end_stage(paced, losses[:number])
    return paced


def end_stage(stages: Sequence[Stage], losses: Sequence[float]) -> list[Stage]:
    """End the stage of the latest round with this round, if more rounds of it no longer pay.

    Args:
      stages: as ``paced_stages`` returned them before this round.
      losses: of all rounds so far.
    """
    done = len(losses)
    stage = next(stage for stage in stages if done <= stage.last_round)
    pace = loss_fall(stages, losses)
    if pace is None or pace >= LEAST_FALL or stage.number == len(stages):
        return list(stages)
    lengths = [s.rounds for s in stages[: stage.number - 1]]
    return _share_what_is_left(stages, [*lengths, done - stage.first_round])


def loss_fall(stages: Sequence[Stage], losses: Sequence[float]) -> float | None:
    """Return the share of the loss by which all rounds of a run would lower it, at the pace of the latest rounds.

    The pace is the slope of a line through the losses of the latest rounds of the stage, relative to their mean. It
    is measured against all rounds, so that it does not depend on how much work a round is.

    Returns:
      The share, or None if the stage has had too few rounds in which clients reported.
    """
    total = stages[-1].last_round
    window = max(LEAST_WINDOW, math.ceil(total / len(stages) * WINDOW_SHARE))
    stage = next(stage for stage in stages if len(losses) <= stage.last_round)
    y = np.array(losses[stage.first_round :][-window:], float)
    x = np.arange(len(y))[known := np.isfinite(y)]
    y = y[known]
    if len(y) < LEAST_WINDOW // 2 or len(losses) - stage.first_round < window or not y.mean():
        return None
    return float(-np.polyfit(x, y, 1)[0] * total / abs(y.mean()))


def _share_what_is_left(stages: Sequence[Stage], ended: Sequence[int]) -> list[Stage]:
    """Give the stage that begins all rounds that are left except for one for each of the later stages."""
    later = len(stages) - len(ended) - 1
    lengths = [*ended, stages[-1].last_round - sum(ended) - later, *([1] * later)]
    firsts = [sum(lengths[:s]) for s in range(len(stages))]
    return [s._replace(first_round=first, rounds=n) for s, first, n in zip(stages, firsts, lengths, strict=True)]
