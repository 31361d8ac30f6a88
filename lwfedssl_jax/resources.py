"""The ledger: what a strategy costs one client in traffic, operations and memory.

Everything is derived from the stages' masks and from the programs themselves; there is no
second list of layer sizes.
"""

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from lwfedssl_jax import fedca, tree
from lwfedssl_jax.calibration import whole
from lwfedssl_jax.checks import check
from lwfedssl_jax.client import (
    ClientState,
    Sent,
    Task,
    client_init,
    client_step,
    embed,
    init_params,
    make_task,
    param_layers,
    program_config,
)
from lwfedssl_jax.config import Config, ConfigError, override
from lwfedssl_jax.devices import program_memory
from lwfedssl_jax.stages import STRATEGIES, Stage, make_stages
from lwfedssl_jax.starts import make_start, no_memory
from lwfedssl_jax.tree import Tree

BYTES_PER_PARAMETER = 4
LAYER_NORM_OPERATIONS = 5  # an element, fvcore's convention

Ledger = dict[str, Any]
Notify = Callable[[str], None]
Key = TypeVar("Key")
Known = dict[Any, Any]  # what has been traced, by all that it depends on


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
    ledgers = {name: ledger(c, known) for name, c in configs.items()}
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
            check(of_strategy)
            configs[name] = of_strategy
        except ConfigError as error:
            refused[name] = str(error)
    return configs, refused


def ledger(config: Config, known: Known | None = None) -> Ledger:
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
    never, always = (ledger(override(config, {"additions.depth_dropout": rate}))["per_stage"] for rate in (0.0, 1.0))
    total = 0.0
    for all_, none in zip(never, always, strict=True):
        of_stage = [line for line in rounds if line["stage"] == all_["stage"]]
        skipped = np.mean([line["layers_skipped"] for line in of_stage if "layers_skipped" in line] or [0.0])
        total += all_["flops_executed"] + skipped * (none["flops_executed"] - all_["flops_executed"])
    return round(total)


class StagePart(NamedTuple):
    """Shapes of what a client has in a stage.

    Attributes:
      stage: the stage.
      trainable: its trainable parameters.
      frozen: what it has frozen.
    """

    stage: Stage
    trainable: Tree
    frozen: Tree


def stage_parts(config: Config) -> list[StagePart]:
    """What a client has in each stage of a (resolved) config."""
    params, layers = _shapes(config)
    return [_part(params, stage) for stage in make_stages(config, layers)]


def all_trained(config: Config, stage: Stage) -> StagePart:
    """What the server has in a stage: everything that exists, trainable."""
    params, layers = _shapes(config)
    return _part(params, whole(stage, layers))


def _shapes(config: Config) -> tuple[Tree, Tree]:
    task = make_task(config)
    params = jax.eval_shape(lambda: init_params(task, jax.random.key(0)))
    return params, param_layers(task, params)


def _part(params: Tree, stage: Stage) -> StagePart:
    take = lambda mask: jax.eval_shape(lambda p: tree.take(p, tree.rows(mask)), params)  # noqa: E731
    return StagePart(stage, take(stage.trainable), take(stage.frozen))


def expected(config: Config, part: StagePart, operations: Callable[[StagePart], float]) -> float:
    """``operations`` under depth dropout: layers are skipped one by one, so its mean lies between all and none."""
    before, rate = part.stage.trained_before, config.additions.depth_dropout
    if not rate or not before:
        return operations(part)
    in_frozen = min(before, part.stage.frozen_depth)
    stage = part.stage._replace(
        depth=part.stage.depth - before, frozen_depth=part.stage.frozen_depth - in_frozen, trained_before=0
    )
    return (1 - rate) * operations(part) + rate * operations(part._replace(stage=stage))


def operations_of_a_sample(config: Config, part: StagePart, rule: functools.partial[Any], known: Known) -> float:
    """``expected`` by a rule, once for all stages of the same depths."""
    stage = part.stage
    before = stage.trained_before if config.additions.depth_dropout else 0
    key = rule.func, _of_a_step(config), stage.depth, stage.frozen_depth, before
    if key not in known:
        known[key] = expected(config, part, rule)
    return float(known[key])


def paper_operations(task: Task, part: StagePart) -> int:
    """Multiply-adds of one training sample by the paper's rule (see ``ledger``)."""
    image = jax.ShapeDtypeStruct((1, *task.image_shape), task.dtype)
    frozen_depth, depth = part.stage.frozen_depth, part.stage.trainable_depth
    frozen_forward = lambda frozen, image: task.encoder.frozen_forward(frozen, image, frozen_depth, None)  # noqa: E731
    x = jax.eval_shape(frozen_forward, part.frozen, image)

    def online(trainable: Tree, x: jax.Array) -> jax.Array:
        return embed(task, trainable, x, jnp.ones(1, bool), (depth, None), list(task.heads))[0][-1]

    frozen_once = count(jax.make_jaxpr(frozen_forward)(part.frozen, image), LAYER_NORM_OPERATIONS)
    trainable_once = count(jax.make_jaxpr(online)(part.trainable, x), LAYER_NORM_OPERATIONS)
    return task.objective.paper_views * (frozen_once + 3 * trainable_once)


def executed_operations(config: Config, part: StagePart) -> float:
    """Multiply-adds of the traced training step per sample of a full batch (see ``ledger``)."""
    # Depth dropout's loops have no known length; `expected` counts them.
    plain = override(config, {"additions.depth_dropout": 0.0})
    step, (state, sent, *data) = _step(plain, part.trainable, part.frozen)
    depth, frozen_depth = part.stage.trainable_depth, part.stage.frozen_depth

    def with_loops_of_known_length(state: ClientState, sent: Sent, *data: jax.Array) -> Any:
        return step(state, sent._replace(depth=depth, frozen_depth=frozen_depth), *data)

    return count(jax.make_jaxpr(with_loops_of_known_length)(state, sent, *data)) / config.optimizer.batch_size


def client_state(config: Config) -> int:
    """Bytes that a client keeps between rounds."""
    task = make_task(config)
    if make_start(config, task) is None:
        return 0
    _, layers = _shapes(config)
    return tree.nbytes(no_memory(task, make_stages(config, layers)[0]))


def server_steps(config: Config, stage: Stage) -> int:
    """How many steps the server trains in a stage."""
    return config.additions.calibration_steps * stage.rounds + config.additions.base_steps


def server_operations(config: Config, part: StagePart) -> int:
    """Multiply-adds of one step of the server's training, of a batch as large as a client's."""
    if not server_steps(config, part.stage):
        return 0
    off = {"additions.terms": (), "additions.depth_dropout": 0.0, "additions.dictionary": 0, "additions.base_steps": 0}
    plain = override(config, off)
    return round(executed_operations(plain, all_trained(config, part.stage)) * config.optimizer.batch_size)


def lower_step(config: Config, part: StagePart, known: Known | None = None) -> tuple[jax.stages.Lowered, int]:
    """One client's training step at the config's batch size, its state donated as in the round.

    Returns:
      The program, with a single row of each stacked frozen leaf, and the bytes of the other rows:
      frozen layers are arguments that a loop reads one by one, so all stages can share it.
    """
    stacked = lambda m, x: m.ndim and x is not None  # noqa: E731
    one_row = jax.tree.map(
        lambda m, x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype) if stacked(m, x) else x,
        part.stage.frozen,
        part.frozen,
    )
    known = {} if known is None else known
    key = lower_step, _of_a_step(config), str((part.trainable, one_row))
    if key not in known:
        step, arguments = _step(config, part.trainable, one_row)
        known[key] = jax.jit(step, donate_argnums=0).lower(*arguments)
    return known[key], tree.nbytes(part.frozen) - tree.nbytes(one_row)


def peak_memory(programs: Iterable[jax.stages.Lowered], notify: Notify) -> dict[str, int]:
    """Peak bytes of each program by its text: arguments + outputs + temporaries - aliased.

    These are the compiler's numbers for this device.
    """
    distinct = {program.as_text(): program for program in programs}  # strategies share programs
    # On a CPU the effort goes into machine code, and this one is never run; its memory is the same.
    options: dict[str, str | bool] | None = (
        {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
    )

    def peak(item: tuple[int, jax.stages.Lowered]) -> int:
        number, program = item
        notify(f"one client's step for its peak memory, program {number} of {len(distinct)}")
        return program_memory(program.compile(options))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(distinct, pool.map(peak, enumerate(distinct.values(), 1)), strict=True))


def step_rate(config: Config, repeats: int = 5) -> float:
    """Multiply-adds a second of one client's step here, in the last stage; compiles it and takes the median."""
    plain = override(config, {"additions.depth_dropout": 0.0})
    part = stage_parts(plain)[-1]
    step, (state, sent, images, mask, _) = _step(plain, part.trainable, part.frozen)
    zeros = lambda tree_: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree_)  # noqa: E731
    depths = {"depth": part.stage.trainable_depth, "frozen_depth": part.stage.frozen_depth}
    sent = zeros(sent)._replace(**{name: jnp.int32(depth) for name, depth in depths.items()})
    arguments = zeros(state), sent, zeros(images), jnp.ones(mask.shape, bool), jax.random.key(0)
    program, seconds = jax.jit(step).lower(*arguments).compile(), []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        seconds.append(time.perf_counter() - began)
    return executed_operations(plain, part) * config.optimizer.batch_size / float(np.median(seconds[1:]))


def count(jaxpr: ClosedJaxpr, layer_norm_operations: int = 0) -> int:
    """Multiply-adds of a traced program: its matrix products, convolutions, and so many an element of a layer norm.

    Loops count as often as they run; of a ``cond``'s branches the dearest counts.

    Raises:
      ValueError: a matrix product inside a loop whose trip count is not in the program.
    """

    def visit(jaxpr: Jaxpr) -> int:
        return sum(visit_equation(eqn) for eqn in jaxpr.eqns)

    def visit_equation(eqn: Any) -> int:
        name = eqn.primitive.name
        if name == "conv_general_dilated":
            numbers, kernel = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape
            taps = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            # Of a dilated input most elements are zeros.
            return tree.size(eqn.outvars[0].aval) * taps // math.prod(eqn.params["lhs_dilation"])
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


def _of_a_step(config: Config) -> Config:
    """A config without what no single step depends on: how stages follow each other."""
    return override(config, {"strategy.name": "", "strategy.layers_per_stage": 1})


def _step(config: Config, trainable: Tree, frozen: Tree) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    task, b = make_task(config), config.optimizer.batch_size
    number: Any = jax.ShapeDtypeStruct((), jnp.int32)
    return lambda *arguments: client_step(task, *arguments), (
        jax.eval_shape(lambda t: client_init(task, t), trainable),
        Sent(
            trainable,
            jax.tree.map(lambda _: jax.ShapeDtypeStruct((), bool), trainable),
            frozen,
            number,
            number,
            number,
            fedca.shapes(config, task, trainable, b),  # a client needs no more public images at once
        ),
        jax.ShapeDtypeStruct((b, *task.image_shape), jnp.uint8),
        jax.ShapeDtypeStruct((b,), bool),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
