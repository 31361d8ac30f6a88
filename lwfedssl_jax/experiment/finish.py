"""Writes the results of a finished run: encoder, summary, plots, report."""

from collections.abc import Mapping, Sequence
from typing import Any, get_type_hints

from lwfedssl_jax.analysis import run_plots
from lwfedssl_jax.analysis.report import write_report
from lwfedssl_jax.config import Config, override
from lwfedssl_jax.config.protocols import LABEL_FREE, split_protocol
from lwfedssl_jax.costs import fleet, ledger, privacy
from lwfedssl_jax.costs.audit import audit
from lwfedssl_jax.costs.operations import Known
from lwfedssl_jax.evaluation import export
from lwfedssl_jax.evaluation.label_free import LabelFree
from lwfedssl_jax.experiment import pictures
from lwfedssl_jax.experiment.active import ActiveRun
from lwfedssl_jax.experiment.evaluations import attack_membership, log_fine_tuning
from lwfedssl_jax.experiment.ledgers import known_traces, ledgers_of_run
from lwfedssl_jax.method.pacing import LEAST_FALL
from lwfedssl_jax.simulation.events import Finished, Note
from lwfedssl_jax.simulation.setup import Cache, initial_params
from lwfedssl_jax.system.interrupts import Interrupts
from lwfedssl_jax.tree import Tree
from lwfedssl_jax.workdir import WorkDir

MEASURED = "bytes and seconds: all clients, all rounds; flops_executed: per sample, as in the ledger"


def finish(run: ActiveRun, params: Tree, interrupts: Interrupts, cache: Cache) -> None:
    """Write the encoder, the summary, the plots and the report of a run after its last round."""
    workdir = run.workdir
    if not workdir:
        run.summary = {}
        return
    if run.config.evaluation.fine_tune_epochs:
        log_fine_tuning(run, interrupts, params)
    lines, strategies = workdir.metrics(), ledgers_of_run(run.config, run.hear, cache)
    if run.config.strategy.pacing == "adaptive":
        own = run.config.strategy.name
        strategies = strategies | {own: ledger_of_rounds(run, strategies[own], known_traces(cache))}
    workdir.save_encoder(export.encoder_files(run.config, run.prepared.task, params))
    interrupts.check()
    with workdir.writing("plots"):
        plots = workdir.path / "plots"
        run_plots.plot_metrics(lines, workdir.path)
        pictures.draw(run, params)
        run_plots.plot_distance(lines, plots / "client_distance.png")
        if run.config.strategy.pacing == "adaptive":
            run_plots.plot_pacing(lines, LEAST_FALL, plots / "pacing.png")
        run_plots.plot_resources(strategies, run.config.federation.local_epochs, plots / "resources.png")
    summary = make_summary(run, lines, strategies, known_traces(cache))
    if run.config.evaluation.membership:
        encoders = {"trained": params, "untrained": initial_params(run.prepared)}
        summary["membership"] = attack_membership(run, encoders)
    workdir.write_json("summary.json", summary)
    write_run_report(workdir, run)
    run.hear(Finished(summary))
    run.summary = summary


def make_summary(
    run: ActiveRun, lines: Sequence[Mapping[str, Any]], strategies: Mapping[str, ledger.Ledger], known: Known
) -> dict[str, Any]:
    """Return the content of ``summary.json``.

    Args:
      run: after its last round.
      lines: of ``metrics.jsonl``.
      strategies: the ledger of each strategy.
      known: what ledgers have traced so far.
    """
    config, rounds = run.config, [line for line in lines if "event" not in line]
    results = evaluations_by_round(lines)
    without, trained = label_free_by_round(lines), results.get(len(rounds), {})
    measured: dict[str, Any] = {
        key: sum(line[key] for line in rounds) for key in ("download_bytes", "upload_bytes", "seconds")
    }
    measured["rounds_per_stage"] = rounds_per_stage(run)
    if config.additions.depth_dropout:
        measured["flops_executed"] = ledger.measured_operations(config_of_rounds(run), rounds, known)
    scope = {"clients": config.partition.clients, "scope": MEASURED}
    summary = {
        "strategy": config.strategy.name,
        "objective": config.objective.name,
        "rounds": len(rounds),
        "seconds": round(measured["seconds"], 2),
        "evaluation": {name: result for name, result in trained.items() if not split_protocol(name)[1]},
        "transfer": transfer(trained),
        "label_free": {"trained": without.get(len(rounds), {}), "untrained": without.get(0, {})}
        | {k: v for k, v in without.items() if isinstance(k, str)},
        "baselines": {"untrained": results.get(0, {})} | {k: v for k, v in results.items() if isinstance(k, str)},
        "resources": strategies[config.strategy.name] | {"measured": measured | scope},
        "strategies": strategies,
    }
    if run.prepared.fleet:
        summary["fleet"] = fleet.summary(run.prepared.fleet, run.prepared.clients.sizes)
    if config.privacy.clip:
        own, stages = strategies[config.strategy.name]["per_stage"], run.prepared.stages
        promise = privacy.promise(config, stages, own, run.prepared.fleet)
        if config.privacy.canaries:
            promise["audit"] = dict(audit(config, stages, rounds, promise["epsilon"], promise["delta"]))
        summary["privacy"] = promise
    return summary


def rounds_per_stage(run: ActiveRun) -> list[int]:
    """Return how many rounds each stage of a finished run had."""
    return [stage.rounds for stage in run.prepared.stages]


def config_of_rounds(run: ActiveRun) -> Config:
    """Return a finished run's config, with adaptive pacing with the rounds that its stages had as a fixed plan."""
    if run.config.strategy.pacing == "fixed":
        return run.config
    changes = {"strategy.pacing": "fixed", "strategy.rounds_per_stage": tuple(rounds_per_stage(run))}
    return override(run.config, changes)


def ledger_of_rounds(run: ActiveRun, planned: ledger.Ledger, known: Known) -> ledger.Ledger:
    """Return the ledger of an adaptive run with the rounds that its stages had; ``planned`` has the peak memory."""
    used = ledger.make_ledger(config_of_rounds(run), known)
    for cost, plan in zip(used["per_stage"], planned["per_stage"], strict=True):
        cost["peak_memory_bytes"] = plan["peak_memory_bytes"]
    used["peak_memory_bytes"] = planned["peak_memory_bytes"]
    return used


def evaluations_by_round(lines: Sequence[Mapping[str, Any]]) -> dict[int | str, dict[str, Any]]:
    """Group evaluation results by round, or by the name of a baseline, and then by protocol."""
    results: dict[int | str, dict[str, Any]] = {}
    for line in lines:
        if "accuracy" in line:
            result = {k: v for k, v in line.items() if k not in ("event", "round", "protocol", "baseline")}
            results.setdefault(line.get("baseline", line["round"]), {})[line["protocol"]] = result
    return results


def transfer(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the results on each data set of ``evaluation.data``, by its name and then by protocol."""
    found: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        protocol, data = split_protocol(name)
        if data:
            found.setdefault(data, {})[protocol] = dict(result)
    return found


def label_free_by_round(lines: Sequence[Mapping[str, Any]]) -> dict[int | str, dict[str, float]]:
    """Return the label-free metrics by round, or by the name of a baseline."""
    names = get_type_hints(LabelFree)
    described = [line for line in lines if line.get("protocol") == LABEL_FREE]
    return {line.get("baseline", line["round"]): {name: line[name] for name in names} for line in described}


def write_run_report(workdir: WorkDir, run: ActiveRun) -> None:
    """Write ``report.html``; if that fails, a note says so, since the run is complete without it."""
    try:
        write_report([workdir.path], workdir.path)
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        run.hear(Note(f"report.html cannot be written ({what}); `report {workdir.path}` tries it again"))
