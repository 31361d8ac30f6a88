"""The ledger: what a strategy costs one client in traffic, operations and memory.

Everything is derived from the stages' masks and from the programs themselves; there is no
second list of layer sizes.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from lwfedssl_jax import tree
from lwfedssl_jax.config import Config, ConfigError, override
from lwfedssl_jax.costs.memory import Notify, lower_step, peak_memory
from lwfedssl_jax.costs.operations import (
    Known,
    executed_operations,
    operations_of_a_sample,
    paper_operations,
    param_shapes,
    server_operations,
    server_steps,
    stage_parts,
)
from lwfedssl_jax.method import fedca
from lwfedssl_jax.method.checks import check_method
from lwfedssl_jax.method.programs import program_config
from lwfedssl_jax.method.stages import STRATEGIES, make_stages
from lwfedssl_jax.method.stateful_clients import make_client_start
from lwfedssl_jax.method.task import make_task

BYTES_PER_PARAMETER = 4

Ledger = dict[str, Any]

Key = TypeVar("Key")


def all_strategies(config: Config, *, memory: bool, notify: Notify = lambda _: None) -> dict[str, Ledger]:
    """The ledger of each strategy that can run with the rest of this (resolved) config; see ``each_strategy``.

    Args:
      config: resolved.
      memory: also compile one client's step of every stage and read its peak memory
        (``peak_memory_bytes`` is None otherwise).
      notify: told what is being compiled.
    """
    configs, _ = each_strategy(config)
    return ledgers_of(configs, memory=memory, notify=notify)


def ledgers_of(configs: Mapping[Key, Config], *, memory: bool, notify: Notify = lambda _: None) -> dict[Key, Ledger]:
    """The ledger of each config; a step that stages of several have in common is traced and compiled once."""
    known: Known = {}
    ledgers = {name: make_ledger(c, known) for name, c in configs.items()}
    if memory:
        # As `program_config` has it, for runs that differ in numbers alone to find one compiled program in the cache.
        alike = {name: program_config(c) for name, c in configs.items()}
        programs = {name: [lower_step(c, part, known) for part in stage_parts(c)] for name, c in alike.items()}
        peaks = peak_memory([p for of_config in programs.values() for p, _ in of_config], notify)
        for name, result in ledgers.items():
            for row, (program, unseen) in zip(result["per_stage"], programs[name], strict=True):
                row["peak_memory_bytes"] = peaks[program.as_text()] + unseen
            result["peak_memory_bytes"] = max(row["peak_memory_bytes"] for row in result["per_stage"])
    return ledgers


def each_strategy(config: Config) -> tuple[dict[str, Config], dict[str, str]]:
    """The config by strategy, and, of those that cannot run with the rest of it, why (``checks.check``)."""
    configs, refused = {}, {}
    for name in STRATEGIES:
        of_strategy = override(config, {"strategy.name": name})
        if len(STRATEGIES[name](config.model.depth, config.strategy.layers_per_stage)) == 1:
            of_strategy = override(of_strategy, {"additions.depth_dropout": 0.0})  # nothing to skip: the plain rival
        try:
            check_method(of_strategy)
            configs[name] = of_strategy
        except ConfigError as error:
            refused[name] = str(error)
    return configs, refused


def make_ledger(config: Config, known: Known | None = None) -> Ledger:
    """Traffic and operations of one client that takes part in every round of a (resolved) config.

    Args:
      config: resolved.
      known: ledgers that are given the same dict trace what they have in common once.

    Returns:
      What `resources --json` prints of one strategy, without peak memory, which needs compilations
      (``all_strategies``). Bytes and operations of ``per_stage`` are totals of that stage.
      Operations are multiply-adds for one training sample, times local epochs and rounds:

      * ``flops_paper_rule``: one forward pass (matrix products, layer norms at 5 an element);
        frozen layers once, trainable ones three times; two views for simclr, one for the
        others; no target branch (arXiv 2401.11647).
      * ``flops_executed``: all matrix products of the training step as traced: both views,
        the target branch, the loss's logits, the backward pass with its recomputation. A
        sample's share of a full batch: what padding of short batches adds is not in it.
      * ``client_state_bytes``: what a client keeps between rounds (FedU, FedEMA).
      * ``server_flops_executed``: of the server's calibration and base model in all, its whole batches counted.
      * ``flops_recomputed``: what of ``flops_executed`` the backward pass recomputes (``runtime.remat``).
    """
    task, known = make_task(config), {} if known is None else known
    keeping = override(config, {"runtime.remat": False})
    per_stage: list[dict[str, Any]] = []
    worst_case = 0
    for part in stage_parts(config):
        stage, trainable = part.stage, part.trainable
        exchanged = BYTES_PER_PARAMETER * tree.size(trainable) * stage.rounds
        everything = BYTES_PER_PARAMETER * tree.size((trainable, part.frozen)) * stage.rounds
        by_rule = operations_of_a_sample(config, part, functools.partial(paper_operations, task), known)
        executed, kept = (
            operations_of_a_sample(c, part, functools.partial(executed_operations, c), known) for c in (config, keeping)
        )
        from_dictionary, to_dictionary = (stage.rounds * n for n in fedca.dictionary_bytes(config))
        base = BYTES_PER_PARAMETER * tree.size(trainable) * fedca.has_base(config)  # a single stage: fetched once
        worst_case += everything + exchanged + from_dictionary + to_dictionary + base
        calibrated = config.additions.calibration_steps
        samples = config.federation.local_epochs * stage.rounds
        per_stage.append(
            {
                "stage": stage.number,
                "rounds": stage.rounds,
                "depth": stage.depth,
                "trainable_parameters": tree.size(trainable),
                "download_bytes": (everything if calibrated else exchanged) + from_dictionary + base,
                "upload_bytes": exchanged + to_dictionary,
                "flops_paper_rule": round(samples * by_rule),
                "flops_executed": round(samples * executed),
                "flops_recomputed": round(samples * (executed - kept)),
                "server_flops_executed": server_steps(config, stage) * server_operations(config, part),
                "peak_memory_bytes": None,
            }
        )
    totals = {
        key: sum(row[key] for row in per_stage)
        for key in (
            "download_bytes",
            "upload_bytes",
            "flops_paper_rule",
            "flops_executed",
            "flops_recomputed",
            "server_flops_executed",
        )
    }
    return {
        "download_bytes": totals["download_bytes"],
        "upload_bytes": totals["upload_bytes"],
        "total_bytes": totals["download_bytes"] + totals["upload_bytes"],
        "worst_case_total_bytes": worst_case,
        "flops_paper_rule": totals["flops_paper_rule"],
        "flops_executed": totals["flops_executed"],
        "flops_recomputed": totals["flops_recomputed"],
        "server_flops_executed": totals["server_flops_executed"],
        "client_state_bytes": client_state(config),
        "peak_memory_bytes": None,
        "per_stage": per_stage,
    }


def measured_operations(config: Config, rounds: Sequence[Mapping[str, Any]]) -> int:
    """``flops_executed`` with the layers that depth dropout really skipped (``layers_skipped`` of metrics.jsonl)."""
    never, always = (
        make_ledger(override(config, {"additions.depth_dropout": rate}))["per_stage"] for rate in (0.0, 1.0)
    )
    total = 0.0
    for all_, none in zip(never, always, strict=True):
        of_stage = [line for line in rounds if line["stage"] == all_["stage"]]
        skipped = np.mean([line["layers_skipped"] for line in of_stage if "layers_skipped" in line] or [0.0])
        total += all_["flops_executed"] + skipped * (none["flops_executed"] - all_["flops_executed"])
    return round(total)


def client_state(config: Config) -> int:
    """Bytes that a client keeps between rounds."""
    _, layers = param_shapes(config)
    return tree.nbytes(make_client_start(config, make_task(config), make_stages(config, layers)[0]).empty_memory)
