"""The end of a run: summary, ledgers, plots, encoder, report."""

from typing import Any

import jax

from lwfedssl_jax.analysis import run_plots
from lwfedssl_jax.analysis.report import write_report
from lwfedssl_jax.config import Config, override
from lwfedssl_jax.costs import fleet, ledger
from lwfedssl_jax.evaluation import export, finetune, frozen
from lwfedssl_jax.method.programs import ledger_config
from lwfedssl_jax.simulation.events import Listener
from lwfedssl_jax.simulation.setup import Cache, Prepared, check_finite, initial_params
from lwfedssl_jax.system.interrupts import Interrupts
from lwfedssl_jax.tree import Tree
from lwfedssl_jax.workdir import WorkDir

FINE_TUNE = "fine_tune"  # the protocol's name
MEASURED = "bytes and seconds: all clients, all rounds; flops_executed: a sample, as in the ledger"


def log_evaluation(
    run: Prepared, encode: frozen.Encode, workdir: WorkDir, listener: Listener, depth: int, number: int, params: Tree
) -> None:
    """Judge layers L1..L_depth by every protocol and write a line a protocol, unless no image has a label."""
    if not len(run.dataset.labelled):
        return
    params = jax.device_get(params)  # on the mesh, every device would repeat the work
    features = [encode(params, images, depth) for images in (run.dataset.train_images, run.dataset.test_images)]
    for x in features:
        check_finite(run.config, "the encoder's features are not finite", number, x)
    for protocol, result in frozen.evaluate(run.config.evaluation, run.dataset, *features).items():
        line = {"event": "evaluation", "round": number, "depth": depth, "protocol": protocol, **result}
        workdir.append(line)
        listener.evaluation(line)


def log_fine_tuning(
    run: Prepared, encode: frozen.Encode, workdir: WorkDir, listener: Listener, interrupts: Interrupts, params: Tree
) -> None:
    """Fine-tune the trained encoder, and from scratch the initial one; write a line for each that is not there yet."""
    config, depth = run.config, run.config.model.depth
    written = [line["round"] for line in workdir.metrics() if line.get("protocol") == FINE_TUNE]
    scratch = {"baseline": "scratch"}
    for number, start, baseline in ((config.federation.rounds, params, {}), (0, initial_params(run), scratch)):
        if number in written:
            continue

        def say(what: str, start: str = "from scratch: " if baseline else "") -> None:
            interrupts.check()
            listener.fine_tuning(start + what)

        result = finetune.fine_tune(
            run.task,
            encode,
            config.evaluation,
            run.dataset,
            jax.device_get(start),  # on the mesh, every device would repeat the work
            depth,
            config.runtime.seed,
            say,
        )
        line = {"event": "evaluation", "round": number, "depth": depth, "protocol": FINE_TUNE, **baseline, **result}
        workdir.append(line)
        listener.evaluation(line)


def ledgers_of_run(config: Config, listener: Listener, shared: Cache) -> dict[str, ledger.Ledger]:
    """The ledger of every strategy, with peak memory."""
    ledgers = lambda: ledger.all_strategies(config, memory=True, notify=listener.compiling)  # noqa: E731
    return shared.once(("ledgers", override(ledger_config(config), {"strategy.name": ""})), ledgers)


def finish(
    run: Prepared,
    encode: frozen.Encode,
    workdir: WorkDir,
    params: Tree,
    listener: Listener,
    interrupts: Interrupts,
    shared: Cache,
) -> dict[str, Any]:
    """Write the encoder, the summary and the plots of a run whose rounds are done."""
    if run.config.evaluation.fine_tune_epochs:
        log_fine_tuning(run, encode, workdir, listener, interrupts, params)
    lines = workdir.metrics()
    rounds = [line for line in lines if "event" not in line]
    results: dict[int | str, dict[str, Any]] = {}  # by round, or by the baseline's name
    for line in lines:
        if line.get("event") == "evaluation":
            result = {k: v for k, v in line.items() if k not in ("event", "round", "protocol", "baseline")}
            results.setdefault(line.get("baseline", line["round"]), {})[line["protocol"]] = result
    strategies = ledgers_of_run(run.config, listener, shared)
    measured = {key: sum(line[key] for line in rounds) for key in ("download_bytes", "upload_bytes", "seconds")}
    if run.config.additions.depth_dropout:
        measured["flops_executed"] = ledger.measured_operations(run.config, rounds)
    summary = {
        "strategy": run.config.strategy.name,
        "objective": run.config.objective.name,
        "rounds": len(rounds),
        "seconds": round(measured["seconds"], 2),
        "evaluation": results.get(len(rounds), {}),
        "baselines": {"untrained": results.get(0, {})} | {k: v for k, v in results.items() if k == "scratch"},
        "resources": strategies[run.config.strategy.name]
        | {"measured": measured | {"clients": run.config.partition.clients, "scope": MEASURED}},
        "strategies": strategies,
    }
    if run.fleet:
        summary["fleet"] = fleet.summary(run.fleet, run.clients.sizes)
    workdir.save_encoder(export.encoder_files(run.config, run.task, params))
    interrupts.check()
    with workdir.writing("plots"):
        run_plots.plot_metrics(lines, workdir.path)
        plots = workdir.path / "plots"
        run_plots.plot_distance(lines, plots / "client_distance.png")
        run_plots.plot_resources(strategies, run.config.federation.local_epochs, plots / "resources.png")
    workdir.write_json("summary.json", summary)
    try:
        write_report([workdir.path], workdir.path)
    except Exception as error:  # the run is whole without it
        what = " ".join(f"{type(error).__name__}: {error}".split())
        listener.note(f"report.html cannot be written ({what}); `report {workdir.path}` tries it again")
    listener.finished(summary)
    return summary
