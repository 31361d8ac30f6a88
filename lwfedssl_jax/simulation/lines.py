"""A round's line of ``metrics.jsonl``."""

from typing import Any

from lwfedssl_jax.costs.traffic import Traffic
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.simulation.cohort import Cohort
from lwfedssl_jax.simulation.packing import PackedRound
from lwfedssl_jax.simulation.setup import Prepared


def empty_line(run: Prepared, stage: Stage, number: int, traffic: Traffic, cohort: Cohort) -> dict[str, Any]:
    """A round's line as it is if nobody reports."""
    reporting = len(cohort.reporting)
    return {
        "round": number,
        "stage": stage.number,
        "loss": None,
        "client_distance": None,
        "clients": reporting,
        "dropped": len(cohort.drawn) - reporting,
        "left_out": 0,
        "cannot_afford": int((~run.fleet.can[stage.number]).sum()) if run.fleet else 0,
        "examples": 0,
        "steps": 0,
        "download_bytes": traffic.download(stage, cohort.drawn),
        "upload_bytes": reporting * traffic.upload(stage),
        "lane_utilisation": 0.0,
    }


def trained_fields(
    run: Prepared, stage: Stage, work: PackedRound, cohort: Cohort, measured: dict[str, Any]
) -> dict[str, Any]:
    """What a round's training adds to its line; ``measured`` as ``finish_round`` returns it."""
    reporting = cohort.reporting
    line = {
        "left_out": int(measured["left_out"]),
        "loss": float(measured["loss"]),
        "client_distance": float(measured["client_distance"]) if len(reporting) > 1 else 0.0,
        "examples": int(run.clients.sizes[reporting].sum()) * run.config.federation.local_epochs,
        "steps": work.steps,
        "lane_utilisation": round(work.steps / (work.length * run.lanes), 4),
        **{name: float(value) for name, value in measured["aggregator"].items()},
    }
    if run.config.additions.depth_dropout and stage.trained_before:
        skipped = work.steps * stage.depth - int(measured["layers"])
        line["layers_skipped"] = round(skipped / (work.steps * stage.trained_before), 4)
    return line
