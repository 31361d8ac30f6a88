"""The ledger: what a strategy costs one client in traffic, operations and memory.

Everything is derived from the stages' masks and from the programs themselves; there is no
second list of layer sizes.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from lwfedssl_jax import tree
from lwfedssl_jax.client import Task, client_init, client_step, embed, init_params, make_task, param_layers
from lwfedssl_jax.config import Config, StrategyName, with_strategy
from lwfedssl_jax.stages import make_stages
from lwfedssl_jax.tree import Tree

BYTES_PER_PARAMETER = 4
LAYER_NORM_OPERATIONS = 5  # an element, fvcore's convention
STRATEGIES: tuple[StrategyName, ...] = ("end_to_end", "layerwise", "progressive")

Ledger = dict[str, Any]
Notify = Callable[[str], None]


def all_strategies(config: Config, *, memory: bool, notify: Notify = lambda _: None) -> dict[str, Ledger]:
    """The ledger of each strategy for this (resolved) config."""
    known: dict[str, int] = {}  # strategies share programs: compile each one once
    return {
        name: ledger(with_strategy(config, name), memory=memory, notify=notify, known_peaks=known)
        for name in STRATEGIES
    }


def ledger(
    config: Config, *, memory: bool, notify: Notify = lambda _: None, known_peaks: dict[str, int] | None = None
) -> Ledger:
    """Traffic, operations and peak memory of one client over the whole run.

    Args:
      config: resolved.
      memory: also compile one client's step for each stage and read its peak memory
        (``peak_memory_bytes`` is None otherwise).
      notify: told what is being compiled.
      known_peaks: cache of peaks by program, to share between strategies.

    Returns:
      The contract's dictionary (DESIGN.md "resources --json"). Bytes and operations of
      ``per_stage`` are totals of that stage for one client that takes part in every round.
      Operations are multiply-adds for one training sample, times local epochs and rounds:

      * ``flops_paper_rule``: one forward pass (matrix products, layer norms at 5 an element);
        frozen layers once, trainable ones three times; two views for simclr, one for the
        others; no target branch (METHOD.md, arXiv 2401.11647).
      * ``flops_executed``: all matrix products of the training step as traced: both views,
        the target branch, the loss's logits, the backward pass with its recomputation.
    """
    task = make_task(config)
    params = jax.eval_shape(lambda: init_params(task, jax.random.key(0)))
    stages = make_stages(config, param_layers(task, params))
    known_peaks = {} if known_peaks is None else known_peaks
    per_stage: list[dict[str, Any]] = []
    worst_case = 0
    for stage in stages:
        trainable, frozen, present = (
            jax.eval_shape(lambda p, m=mask: tree.take(p, m), params)
            for mask in (stage.trainable, stage.frozen, stage.present)
        )
        peak = 0
        if memory:
            notify(f"compiling one client's step: {config.strategy.name} stage {stage.number} of {len(stages)}")
            peak = peak_memory(config, task, trainable, frozen["encoder"], known_peaks)
        exchanged = BYTES_PER_PARAMETER * tree.size(trainable) * stage.rounds
        worst_case += BYTES_PER_PARAMETER * tree.size(present) * stage.rounds + exchanged
        samples = config.federation.local_epochs * stage.rounds
        per_stage.append(
            {
                "stage": stage.number,
                "rounds": stage.rounds,
                "depth": stage.depth,
                "trainable_parameters": tree.size(trainable),
                "download_bytes": exchanged,
                "upload_bytes": exchanged,
                "flops_paper_rule": samples * paper_operations(task, trainable, frozen["encoder"]),
                "flops_executed": round(samples * executed_operations(config, task, trainable, frozen["encoder"])),
                "peak_memory_bytes": peak if memory else None,
            }
        )
    totals = {
        key: sum(row[key] for row in per_stage)
        for key in ("download_bytes", "upload_bytes", "flops_paper_rule", "flops_executed")
    }
    return {
        "download_bytes": totals["download_bytes"],
        "upload_bytes": totals["upload_bytes"],
        "total_bytes": totals["download_bytes"] + totals["upload_bytes"],
        "worst_case_total_bytes": worst_case,
        "flops_paper_rule": totals["flops_paper_rule"],
        "flops_executed": totals["flops_executed"],
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in per_stage) if memory else None,
        "per_stage": per_stage,
    }


def paper_operations(task: Task, trainable: Tree, frozen: Tree) -> int:
    """Multiply-adds of one training sample by the paper's rule (see ``ledger``)."""
    image = jax.ShapeDtypeStruct((1, *task.image_shape), task.dtype)
    x = jax.eval_shape(task.encoder.frozen_forward, frozen, image)

    def online(trainable: Tree, x: jax.Array) -> jax.Array:
        return embed(task, trainable, x, jnp.ones(1, bool), list(task.heads))

    frozen_once = count(jax.make_jaxpr(task.encoder.frozen_forward)(frozen, image), LAYER_NORM_OPERATIONS)
    trainable_once = count(jax.make_jaxpr(online)(trainable, x), LAYER_NORM_OPERATIONS)
    return task.objective.paper_views * (frozen_once + 3 * trainable_once)


def executed_operations(config: Config, task: Task, trainable: Tree, frozen: Tree) -> float:
    """Multiply-adds of the traced training step per sample of a full batch (see ``ledger``)."""
    jaxpr = jax.make_jaxpr(lambda *args: client_step(task, *args))(*_step_arguments(config, task, trainable, frozen))
    return count(jaxpr) / config.optimizer.batch_size


def peak_memory(config: Config, task: Task, trainable: Tree, frozen: Tree, known: dict[str, int]) -> int:
    """Bytes of one client's compiled training step: arguments + outputs + temporaries - aliased.

    This is the compiler's number for this device; the state is donated, as in the round.
    """
    arguments = _step_arguments(config, task, trainable, frozen)
    lowered = jax.jit(lambda *args: client_step(task, *args), donate_argnums=0).lower(*arguments)
    program = lowered.as_text()
    if program not in known:
        m: Any = lowered.compile().memory_analysis()
        known[program] = (
            m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
        )
    return known[program]


def count(jaxpr: ClosedJaxpr, layer_norm_operations: int = 0) -> int:
    """Multiply-adds of all matrix products in a traced program, plus so many for an element of each layer norm.

    Loops count as often as they run; of a ``cond``'s branches the dearest counts.

    Raises:
      ValueError: a matrix product inside a loop whose trip count is not in the program.
    """

    def visit(jaxpr: Jaxpr) -> int:
        return sum(visit_equation(eqn) for eqn in jaxpr.eqns)

    def visit_equation(eqn: Any) -> int:
        name = eqn.primitive.name
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            return tree.size(eqn.outvars[0].aval) * math.prod(shape[i] for i in contracted)
        if layer_norm_operations and eqn.params.get("name") == "layer_norm":
            return layer_norm_operations * tree.size(eqn.outvars[0].aval)
        inner = [visit(j) for j in _inner_jaxprs(eqn.params)]
        if name == "while" and sum(inner):
            raise ValueError("a matrix product in a loop of unknown length cannot be counted")
        if name == "cond":
            return max(inner)
        return sum(inner) * (eqn.params["length"] if name == "scan" else 1)

    return visit(jaxpr.jaxpr)


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _step_arguments(config: Config, task: Task, trainable: Tree, frozen: Tree) -> tuple[Any, ...]:
    b = config.optimizer.batch_size
    return (
        jax.eval_shape(lambda t: client_init(task, t), trainable),
        frozen,
        jax.ShapeDtypeStruct((b, *task.image_shape), jnp.uint8),
        jax.ShapeDtypeStruct((b,), bool),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
