"""The ledger: what a strategy costs one client in traffic, operations and memory.

Everything is derived from the stages' masks and from the programs themselves; there is no second list of layer sizes.
Operations are per sample, times rounds and local epochs, since the ledger does not know the number of a client's
images. What depends on that number is measured in a run (``measured`` in experiment/finish.py). A cost may depend only
on fields that ``programs.ledger_config`` keeps.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, TypeVar, cast, get_args

import numpy as np

from lwfedssl_jax import tree
from lwfedssl_jax.config import Config, ConfigError, override
from lwfedssl_jax.costs import stored
from lwfedssl_jax.costs.memory import Notice, lower_step, peak_memory
from lwfedssl_jax.costs.operations import (
    Known,
    StagePart,
    alignment_operations,
    embedding_operations,
    executed_operations,
    held_part,
    operations_per_sample,
    paper_operations,
    param_shapes,
    server_operations,
    stage_parts,
)
from lwfedssl_jax.costs.traffic import stage_bytes
from lwfedssl_jax.method.checks import check_method
from lwfedssl_jax.method.programs import program_config
from lwfedssl_jax.method.stages import STRATEGIES, make_stages, with_fitting_rounds
from lwfedssl_jax.method.stateful_clients import make_client_start
from lwfedssl_jax.method.task import make_task


class StageCost(TypedDict):
    """Costs of one client in all rounds of a stage; one entry of ``Ledger.per_stage``.

    ``peak_memory_bytes`` is of one training step. Operations are multiply-adds per training sample, times local epochs
    and rounds:

    * ``flops_paper_rule``: one forward pass (matrix products, and layer norms at 5 per element); frozen layers once,
      trainable ones three times; two views for simclr and vicreg, one for the others; no target branch (arXiv
      2401.11647).
    * ``flops_executed``: all matrix products of the training step as traced: all views, the target branch, the
      loss's logits, the backward pass with its recomputation, and once per round FedCA's pass over all of a client's
      images. It is a sample's share of a full batch, without the padding of short batches.
    * ``flops_recomputed``: the part of ``flops_executed`` that the backward pass recomputes (``runtime.remat``).
    * ``server_flops_executed``: the server's calibration and base model, as multiply-adds of its whole batches.

    ``frozen_bytes`` are those of the frozen layers, which are not in ``download_bytes``: when a stage begins, a client
    downloads the ones that it does not have. 0 if the server's calibration changes them in every round, in which they
    are then downloaded.
    """

    stage: int
    rounds: int
    depth: int
    trainable_parameters: int
    download_bytes: int
    upload_bytes: int
    frozen_bytes: int
    flops_paper_rule: int
    flops_executed: int
    flops_recomputed: int
    server_flops_executed: int
    peak_memory_bytes: Any  # int, or None unless it was asked for


class Ledger(TypedDict):
    """Costs of one client that takes part in every round under a strategy; `resources --json` prints them.

    All values are sums over the stages, except for ``peak_memory_bytes``, which is the largest of them.
    ``worst_case_total_bytes`` counts the frozen layers in every round's download; ``client_state_bytes`` is what a
    client keeps between rounds (FedU, FedEMA).
    """

    download_bytes: int
    upload_bytes: int
    total_bytes: int
    worst_case_total_bytes: int
    flops_paper_rule: int
    flops_executed: int
    flops_recomputed: int
    server_flops_executed: int
    client_state_bytes: int
    peak_memory_bytes: Any  # int, or None unless it was asked for
    per_stage: list[StageCost]


Summed = Literal[
    "download_bytes", "upload_bytes", "flops_paper_rule", "flops_executed", "flops_recomputed", "server_flops_executed"
]
SUMMED: tuple[Summed, ...] = get_args(Summed)

Key = TypeVar("Key")


def all_strategies(
    config: Config, *, memory: bool, notify: Notice = lambda _: None, known: Known | None = None
) -> dict[str, Ledger]:
    """Make the ledger of each strategy that can run with the rest of a config (``each_strategy``).

    Args:
      config: resolved.
      memory: whether to compile one client's step of every stage for its peak memory.
      notify: called with the name of what is being compiled.
      known: as for ``make_ledger``.
    """
    configs, _ = each_strategy(config)
    return ledgers_of(configs, memory=memory, notify=notify, known=known)


def ledgers_of(
    configs: Mapping[Key, Config], *, memory: bool, notify: Notice = lambda _: None, known: Known | None = None
) -> dict[Key, Ledger]:
    """Make the ledger of each config; steps that they share are traced and compiled once.

    Ledgers with peak memory are kept on disk (``stored.py``).

    Args:
      configs: resolved.
      memory, notify, known: as for ``all_strategies``.
    """
    known = {} if known is None else known
    if not memory:
        return {name: make_ledger(config, known) for name, config in configs.items()}
    kept: dict[Key, Ledger | None] = {name: stored.read(config) for name, config in configs.items()}
    missing = {name: config for name, config in configs.items() if kept[name] is None}
    made = {}
    for number, (name, config) in enumerate(missing.items(), 1):
        notify(f"the steps of option {number} of {len(missing)}")
        made[name] = make_ledger(config, known)
    add_peak_memory(made, missing, notify, known)
    for name, config in missing.items():
        stored.write(config, made[name])
    return {name: kept[name] or made[name] for name in configs}


def add_peak_memory(ledgers: Mapping[Key, Ledger], configs: Mapping[Key, Config], notify: Notice, known: Known) -> None:
    """Set ``peak_memory_bytes`` in ledgers and their stages; compiles one client's step of each stage."""
    # Configs that differ only in numbers become equal, so that they find one compiled program in the cache.
    plain = {name: program_config(config) for name, config in configs.items()}
    steps = {
        name: [lower_step(c, held_part(configs[name], part), known) for part in stage_parts(c)]
        for name, c in plain.items()
    }
    peaks = peak_memory([program for lowered in steps.values() for program, _ in lowered], notify)
    for name, ledger in ledgers.items():
        stage_peaks = [peaks[program.as_text()] + further_rows for program, further_rows in steps[name]]
        for cost, peak in zip(ledger["per_stage"], stage_peaks, strict=True):
            cost["peak_memory_bytes"] = peak
        ledger["peak_memory_bytes"] = max(stage_peaks)


def each_strategy(config: Config) -> tuple[dict[str, Config], dict[str, str]]:
    """Return the config by strategy, and why the other strategies cannot run with the rest of it (``checks.check``).

    Where ``strategy.rounds_per_stage`` does not fit a strategy's stages, its rounds are spread evenly.
    """
    configs, refused = {}, {}
    for name in STRATEGIES:
        strategy_config = with_fitting_rounds(override(config, {"strategy.name": name}))
        if len(STRATEGIES[name](config.model.depth, config.strategy.layers_per_stage)) == 1:
            # It has no layers to skip: compare with the strategy without depth dropout.
            strategy_config = override(strategy_config, {"additions.depth_dropout": 0.0})
        try:
            check_method(strategy_config)
            configs[name] = strategy_config
        except ConfigError as error:
            refused[name] = str(error)
    return configs, refused


def make_ledger(config: Config, known: Known | None = None) -> Ledger:
    """Make the ledger of a (resolved) config without peak memory, which needs compilation (``ledgers_of``).

    Args:
      config: resolved.
      known: results of tracing that ledgers share when they are given the same dict.
    """
    known, parts = {} if known is None else known, stage_parts(config)
    per_stage = [stage_cost(config, part, known) for part in parts]
    totals: dict[str, int] = {key: sum(cost[key] for cost in per_stage) for key in SUMMED}
    ledger: dict[str, Any] = {
        **totals,
        "total_bytes": totals["download_bytes"] + totals["upload_bytes"],
        "worst_case_total_bytes": sum(stage_bytes(config, part).worst_case for part in parts),
        "client_state_bytes": client_state_bytes(config),
        "peak_memory_bytes": None,
        "per_stage": per_stage,
    }
    return cast(Ledger, ledger)


def stage_cost(config: Config, part: StagePart, known: Known) -> StageCost:
    """Compute the costs of one client in a stage, without peak memory."""
    stage, traffic = part.stage, stage_bytes(config, part)
    samples = config.federation.local_epochs * stage.rounds
    plain = override(config, {"runtime.remat": False})
    by_rule = operations_per_sample(config, part, paper_operations, known)
    executed = operations_per_sample(config, part, executed_operations, known)
    not_recomputed = operations_per_sample(plain, part, executed_operations, known)
    by_rule += alignment_operations(config, part, known)
    embedding_by_rule, embedding = embedding_operations(config, part, known)
    return {
        "stage": stage.number,
        "rounds": stage.rounds,
        "depth": stage.depth,
        "trainable_parameters": tree.size(part.trainable),
        "download_bytes": traffic.download,
        "upload_bytes": traffic.upload,
        "frozen_bytes": traffic.frozen,
        "flops_paper_rule": round(samples * by_rule + stage.rounds * embedding_by_rule),
        "flops_executed": round(samples * executed + stage.rounds * embedding),
        "flops_recomputed": round(samples * (executed - not_recomputed)),
        "server_flops_executed": server_operations(config, part, known),
        "peak_memory_bytes": None,
    }


def measured_operations(config: Config, rounds: Sequence[Mapping[str, Any]], known: Known | None = None) -> int:
    """Compute ``flops_executed`` of a run, with the layers that depth dropout actually skipped.

    Args:
      config: resolved.
      rounds: lines of ``metrics.jsonl``, with ``layers_skipped``.
      known: as for ``make_ledger``.
    """
    known = {} if known is None else known
    never, always = (
        make_ledger(override(config, {"additions.depth_dropout": rate}), known)["per_stage"] for rate in (0.0, 1.0)
    )
    total = 0.0
    for all_layers, fewest in zip(never, always, strict=True):
        lines = [line for line in rounds if line["stage"] == all_layers["stage"]]
        skipped = np.mean([line["layers_skipped"] for line in lines if "layers_skipped" in line] or [0.0])
        total += all_layers["flops_executed"] + skipped * (fewest["flops_executed"] - all_layers["flops_executed"])
    return round(total)


def client_state_bytes(config: Config) -> int:
    """Return the bytes that a client keeps between rounds."""
    _, layers = param_shapes(config)
    return tree.nbytes(make_client_start(config, make_task(config), make_stages(config, layers)[0]).empty_memory)
