"""Multiply-adds of a sample, by the paper's rule and as executed, counted from shapes."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from lwfedssl_jax import tree
from lwfedssl_jax.config import Config, override
from lwfedssl_jax.method.calibration import all_trainable
from lwfedssl_jax.method.client import client_init, client_step, embed
from lwfedssl_jax.method.fedca import make_exchange
from lwfedssl_jax.method.stages import Stage, make_stages
from lwfedssl_jax.method.task import Broadcast, ClientState, Task, init_params, make_task, param_layers
from lwfedssl_jax.tree import Tree

LAYER_NORM_OPERATIONS = 5  # an element, fvcore's convention

Known = dict[Any, Any]  # what has been traced, by all that it depends on


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
    params, layers = param_shapes(config)
    return [_part(params, stage) for stage in make_stages(config, layers)]


def server_part(config: Config, stage: Stage) -> StagePart:
    """What the server has in a stage: everything that exists, trainable."""
    params, layers = param_shapes(config)
    return _part(params, all_trainable(stage, layers))


def param_shapes(config: Config) -> tuple[Tree, Tree]:
    """Shapes of all parameters, and the layer that each belongs to."""
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
    key = rule.func, step_operations(config), stage.depth, stage.frozen_depth, before
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
    step, (state, sent, *data) = lowered_step(plain, part.trainable, part.frozen)
    depth, frozen_depth = part.stage.trainable_depth, part.stage.frozen_depth

    def with_loops_of_known_length(state: ClientState, sent: Broadcast, *data: jax.Array) -> Any:
        return step(state, sent._replace(depth=depth, frozen_depth=frozen_depth), *data)

    return count(jax.make_jaxpr(with_loops_of_known_length)(state, sent, *data)) / config.optimizer.batch_size


def server_steps(config: Config, stage: Stage) -> int:
    """How many steps the server trains in a stage."""
    return config.additions.calibration_steps * stage.rounds + config.additions.base_steps


def server_operations(config: Config, part: StagePart) -> int:
    """Multiply-adds of one step of the server's training, of a batch as large as a client's."""
    if not server_steps(config, part.stage):
        return 0
    off = {"additions.terms": (), "additions.depth_dropout": 0.0, "additions.dictionary": 0, "additions.base_steps": 0}
    plain = override(config, off)
    return round(executed_operations(plain, server_part(config, part.stage)) * config.optimizer.batch_size)


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


def step_operations(config: Config) -> Config:
    """A config without what no single step depends on: how stages follow each other."""
    return override(config, {"strategy.name": "", "strategy.layers_per_stage": 1})


def lowered_step(config: Config, trainable: Tree, frozen: Tree) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A client's training step, and the shapes of its arguments."""
    task, b = make_task(config), config.optimizer.batch_size
    number: Any = jax.ShapeDtypeStruct((), jnp.int32)
    return lambda *arguments: client_step(task, *arguments), (
        jax.eval_shape(lambda t: client_init(task, t), trainable),
        Broadcast(
            trainable,
            jax.tree.map(lambda _: jax.ShapeDtypeStruct((), bool), trainable),
            frozen,
            number,
            number,
            number,
            make_exchange(config, task).shapes(trainable, b),  # a client needs no more public images at once
        ),
        jax.ShapeDtypeStruct((b, *task.image_shape), jnp.uint8),
        jax.ShapeDtypeStruct((b,), bool),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
