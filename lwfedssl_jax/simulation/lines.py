"""A round's line of ``metrics.jsonl``."""

from typing import Any, NotRequired, TypedDict, final

import numpy as np

from lwfedssl_jax.costs.traffic import BYTES_PER_PARAMETER, Traffic
from lwfedssl_jax.method.depth_dropout import held_layers
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.simulation.cohort import Cohort, layout_of
from lwfedssl_jax.simulation.packing import PackedRound, embedded
from lwfedssl_jax.simulation.setup import Prepared
from lwfedssl_jax.tree import Tree


@final
class RoundLine(TypedDict):
    """A round's line of ``metrics.jsonl``.

    Attributes:
      round: from 1.
      stage: from 1.
      loss: mean over the samples that were trained on; None if no client reported.
      client_distance: see ``rounds.finish_round``; None if no client reported.
      clients: number of clients that reported.
      dropped: number of clients that were drawn and did not report.
      left_out: number of clients whose update was not finite.
      too_few_examples: number of clients that were drawn and have fewer examples than the objective learns from.
      cannot_afford: number of clients in the population whose device cannot train the stage.
      examples: number that the reporting clients trained on, counted once per local epoch.
      examples_left_out: number of theirs in batches of fewer samples than the objective can learn from.
      steps: optimizer steps of all clients.
      download_bytes, upload_bytes: of all clients.
      lane_utilisation: share of the lanes' steps that trained a client, 0 to 1.
      seconds: that the round took.
      layers_skipped: with depth dropout, the share of droppable layers that steps skipped.
      calibration_loss: with calibration, the mean loss of the server's steps.
      loss_fall: with adaptive pacing, see ``pacing.loss_fall``; None after too few rounds of a stage.
      stage_ends: with adaptive pacing, whether this is the stage's last round.
      epsilon: with noise, of all rounds so far, for the clients that are exposed most; if the encoder is evaluated.
      clip_norm, share_clipped, noise_norm, signal_norm: with a clip, the L2 norm to which updates are clipped, the
        share of them that was longer, and the norms of the noise and of the clipped updates in the mean update; the
        share and the last one are measured without noise.
      wrapped: with a secure sum, how many of its numbers were beyond its range.
      canary_cosines: with canaries, by canary, of its direction and the change of the global model.

    A line also has the numbers that the aggregator measured, by the names it gave them.
    """

    round: int
    stage: int
    loss: float | None
    client_distance: float | None
    clients: int
    dropped: int
    left_out: int
    too_few_examples: int
    cannot_afford: int
    examples: int
    examples_left_out: int
    steps: int
    download_bytes: int
    upload_bytes: int
    lane_utilisation: float
    seconds: NotRequired[float]  # of every line that is written
    layers_skipped: NotRequired[float]
    calibration_loss: NotRequired[float]
    loss_fall: NotRequired[float | None]
    stage_ends: NotRequired[bool]
    epsilon: NotRequired[float]
    clip_norm: NotRequired[float]
    share_clipped: NotRequired[float]
    noise_norm: NotRequired[float]
    signal_norm: NotRequired[float]
    wrapped: NotRequired[int]
    canary_cosines: NotRequired[list[float]]


def empty_line(run: Prepared, stage: Stage, number: int, traffic: Traffic, cohort: Cohort, exchange: Tree) -> RoundLine:
    """Return the line of a round in which no client reports, without its seconds; ``exchange`` is as it begins."""
    reporting = len(cohort.reporting)
    drawn = held_layers(run.config, stage, number, cohort.drawn)
    reports = None if drawn is None else drawn[np.isin(cohort.drawn, cohort.reporting)]
    embedding = run.config.objective.output_dim * BYTES_PER_PARAMETER
    known = int(np.count_nonzero(exchange["filled"])) if exchange else 0
    new = embedded(run.clients.sizes[cohort.reporting], layout_of(run), run.exchange.embeddings)
    return {
        "round": number,
        "stage": stage.number,
        "loss": None,
        "client_distance": None,
        "clients": reporting,
        "dropped": len(cohort.drawn) - reporting,
        "left_out": 0,
        "too_few_examples": cohort.too_few,
        "cannot_afford": int((~run.fleet.can[stage.number]).sum()) if run.fleet else 0,
        "examples": 0,
        "examples_left_out": 0,
        "steps": 0,
        "download_bytes": traffic.download(stage, cohort.drawn, drawn) + len(cohort.drawn) * known * embedding,
        "upload_bytes": traffic.upload(stage, cohort.reporting, reports) + int(new.sum()) * embedding,
        "lane_utilisation": 0.0,
    }


def trained_fields(
    run: Prepared, stage: Stage, work: PackedRound, cohort: Cohort, measured: dict[str, Any]
) -> dict[str, Any]:
    """Return what a round's training adds to its line; ``measured`` is as ``finish_round`` returns it."""
    reporting = cohort.reporting
    examples = int(run.clients.sizes[reporting].sum()) * run.config.federation.local_epochs
    line = {
        "left_out": int(measured["left_out"]),
        "loss": float(measured["loss"]),
        "client_distance": float(measured["client_distance"]) if len(reporting) > 1 else 0.0,
        "examples": work.samples,
        "examples_left_out": examples - work.samples,
        "steps": work.steps,
        "lane_utilisation": round(work.steps / (work.length * run.lanes), 4),
    }
    if run.config.additions.depth_dropout and stage.trained_before:
        skipped = work.steps * stage.depth - int(measured["layers"])
        line["layers_skipped"] = round(skipped / (work.steps * stage.trained_before), 4)
    return line
