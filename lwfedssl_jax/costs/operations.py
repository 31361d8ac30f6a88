"""Multiply-adds of one training sample, by the paper's rule and as executed, counted from shapes."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from lwfedssl_jax import tree
from lwfedssl_jax.config import MODELS, Config, StrategyConfig, override
from lwfedssl_jax.method import terms
from lwfedssl_jax.method.calibration import all_trainable
from lwfedssl_jax.method.client import client_init, client_step
from lwfedssl_jax.method.depth_dropout import PER_ROUND, fewest_skipped
from lwfedssl_jax.method.fedca import embed_images, make_exchange
from lwfedssl_jax.method.pretext import Seen, pretext_of
from lwfedssl_jax.method.programs import ledger_config
from lwfedssl_jax.method.stages import Stage, make_stages
from lwfedssl_jax.method.task import Broadcast, ClientState, init_params, make_task, param_layers
from lwfedssl_jax.models.attention import as_products
from lwfedssl_jax.tree import Tree

LAYER_NORM_OPERATIONS = 5  # per element, as in fvcore

Known = dict[Any, Any]  # results of tracing, by everything that they depend on


class StagePart(NamedTuple):
    """Shapes of the parameters that a client has in a stage.

    Attributes:
      stage: the stage.
      trainable: the trainable parameters.
      frozen: the frozen parameters.
    """

    stage: Stage
    trainable: Tree
    frozen: Tree


Rule = Callable[[Config, StagePart], float]  # multiply-adds per sample


def stage_parts(config: Config) -> list[StagePart]:
    """Return the parameters of a client in each stage of a (resolved) config."""
    params, layers = param_shapes(config)
    return [split_params(params, stage) for stage in make_stages(config, layers)]


def param_shapes(config: Config) -> tuple[Tree, Tree]:
    """Return the shapes of all parameters, and the layer that each belongs to."""
    task = make_task(config)
    params = jax.eval_shape(lambda: init_params(task, jax.random.key(0)))
    return params, param_layers(task, params)


def split_params(params: Tree, stage: Stage) -> StagePart:
    """Return the shapes of the trainable and the frozen parameters of a stage."""

    def take(mask: Tree) -> Tree:
        return jax.eval_shape(lambda p: tree.take(p, tree.rows(mask)), params)

    return StagePart(stage, take(stage.trainable), take(stage.frozen))


def held_part(config: Config, part: StagePart) -> StagePart:
    """Return the shapes of what a client holds at most: without the layers that depth dropout always takes away."""
    count, stage = fewest_skipped(config, part.stage), part.stage
    droppable = min(stage.trained_before, stage.frozen_depth)  # of the frozen layers
    frozen, trainable = max(0, count - (stage.trained_before - droppable)), max(0, count - droppable)

    def fewer(mask: np.ndarray, x: jax.ShapeDtypeStruct | None, rows: int) -> jax.ShapeDtypeStruct | None:
        return (
            jax.ShapeDtypeStruct((x.shape[0] - rows, *x.shape[1:]), x.dtype) if np.ndim(mask) and x is not None else x
        )

    return part._replace(
        trainable=jax.tree.map(lambda m, x: fewer(m, x, trainable), part.stage.trainable, part.trainable),
        frozen=jax.tree.map(lambda m, x: fewer(m, x, frozen), part.stage.frozen, part.frozen),
    )


def operations_per_sample(config: Config, part: StagePart, rule: Rule, known: Known) -> float:
    """Compute the multiply-adds of one training sample in a stage by ``rule``, as their mean under depth dropout.

    Depth dropout skips layers independently, so the mean interpolates between skipping none and all droppable layers.
    """
    stage, rate = part.stage, config.additions.depth_dropout
    all_layers = count_layers(config, part, rule, known)
    if not rate or not stage.trained_before:
        return all_layers
    frozen_depth = stage.frozen_depth - min(stage.trained_before, stage.frozen_depth)
    shortest = stage._replace(depth=stage.depth - stage.trained_before, frozen_depth=frozen_depth)
    return (1 - rate) * all_layers + rate * count_layers(config, part._replace(stage=shortest), rule, known)


def count_layers(config: Config, part: StagePart, rule: Rule, known: Known) -> float:
    """Apply ``rule`` to a stage's layers; equal layers cost the same, so at most two of a kind are traced.

    A program's loops run over the layers that the stage says, whatever the number of layers in the parameters. Terms
    of the loss may use all parameters, so with them each stage is traced.
    """
    frozen_depth, trainable_depth = part.stage.frozen_depth, part.stage.trainable_depth
    plain = override(config, {"additions.depth_dropout": 0.0})
    program = rule, step_config(plain), bool(jax.tree.leaves(part.frozen))

    def once(frozen_depth: int, trainable_depth: int) -> float:
        key = *program, frozen_depth, trainable_depth
        if key not in known:
            stage = part.stage._replace(depth=frozen_depth + trainable_depth, frozen_depth=frozen_depth)
            known[key] = rule(config, part._replace(stage=stage))
        return float(known[key])

    if not MODELS[config.model.name].equal_layers or config.additions.terms:
        return once(frozen_depth, trainable_depth)
    operations = one_layer = once(0, 1)
    if trainable_depth != 1:
        operations += (trainable_depth - 1) * (once(0, 2) - one_layer)
    if frozen_depth:
        operations += frozen_depth * (once(1, 1) - one_layer)
    return operations


def traced(f: Callable[..., Any]) -> Callable[..., Any]:
    """Make ``jax.make_jaxpr(f)`` trace what every device computes, without kernels that only some have."""

    def trace(*args: Any) -> Any:
        with as_products():
            return jax.make_jaxpr(f)(*args)

    return trace


def paper_operations(config: Config, part: StagePart) -> float:
    """Count the multiply-adds of one training sample by the paper's rule (see ``StageCost`` in ledger.py)."""
    frozen_once, trainable_once = paper_passes(config, part)
    return make_task(config).objective.paper_views * (frozen_once + 3 * trainable_once)


def paper_passes(config: Config, part: StagePart) -> tuple[int, int]:
    """Count one view's forward pass through the frozen and the trainable part, layer norms at 5 per element."""
    task = make_task(config)
    pretext, frozen_depth, depth = pretext_of(task), part.stage.frozen_depth, part.stage.trainable_depth

    def see(key: jax.Array, images: jax.Array) -> Seen:
        seen = pretext.see(task, key, images)
        return seen._replace(x=jax.tree.map(lambda x: x[:1], seen.x))  # one view

    def frozen_forward(frozen: Tree, seen: Seen) -> Seen:
        return seen._replace(x=task.encoder.frozen_forward(frozen, seen.x, frozen_depth, None))

    def online(trainable: Tree, seen: Seen) -> Any:
        return pretext.online(task, trainable, seen, jnp.ones(1, bool), (depth, None))[0]

    image = jax.ShapeDtypeStruct((1, *task.image_shape), jnp.uint8)
    seen = jax.eval_shape(see, jax.eval_shape(lambda: jax.random.key(0)), image)
    after = jax.eval_shape(frozen_forward, part.frozen, seen)
    frozen_once = count(traced(frozen_forward)(part.frozen, seen), LAYER_NORM_OPERATIONS)
    return frozen_once, count(traced(online)(part.trainable, after), LAYER_NORM_OPERATIONS)


def executed_operations(config: Config, part: StagePart) -> float:
    """Count the multiply-adds of the traced step per sample of a full batch (see ``StageCost`` in ledger.py).

    Without depth dropout, whose loops have no known length; ``operations_per_sample`` accounts for it.
    """
    plain = override(config, {"additions.depth_dropout": 0.0})
    step, (state, broadcast, *data) = traceable_step(plain, part.trainable, part.frozen)
    depth, frozen_depth = part.stage.trainable_depth, part.stage.frozen_depth

    def with_loops_of_known_length(state: ClientState, broadcast: Broadcast, *data: jax.Array) -> Any:
        return step(state, broadcast._replace(depth=depth, frozen_depth=frozen_depth), *data)

    return count(traced(with_loops_of_known_length)(state, broadcast, *data)) / config.optimizer.batch_size


def embedding_operations(config: Config, part: StagePart, known: Known) -> tuple[float, float]:
    """Count a sample's part of FedCA's pass over a client's images after its last step, per round.

    Returns:
      Multiply-adds by the paper's rule, which counts as many views as for training, and as executed, of one view; 0
      without a dictionary.
    """
    if not config.additions.dictionary:
        return 0, 0
    per_round = config.additions.depth_dropout_per == PER_ROUND  # else, all layers embed
    count_all = operations_per_sample if per_round else count_layers
    return count_all(config, part, paper_forward, known), count_all(config, part, executed_embedding, known)


def paper_forward(config: Config, part: StagePart) -> float:
    """Count the forward passes of one training sample by the paper's rule."""
    return make_task(config).objective.paper_views * sum(paper_passes(config, part))


def executed_embedding(config: Config, part: StagePart) -> float:
    """Count the multiply-adds of the traced embedding of a batch, per sample."""
    _, (_, broadcast, *data) = traceable_step(config, part.trainable, part.frozen)
    depth, frozen_depth = part.stage.trainable_depth, part.stage.frozen_depth

    def embed_batch(broadcast: Broadcast, images: jax.Array, mask: jax.Array, key: jax.Array) -> jax.Array:
        routes = (depth, None), (frozen_depth, None)
        return embed_images(make_task(config), broadcast, broadcast.trainable, images, mask, key, routes)

    return count(traced(embed_batch)(broadcast, *data)) / config.optimizer.batch_size


def alignment_operations(config: Config, part: StagePart, known: Known) -> float:
    """Count representation alignment by the paper's rule, per sample: two forward passes of each layer trained before.

    The paper states only its sums, which this gives; it does not state the rule (docs/paper_figures.md).
    """
    aligned = any(term is terms.alignment for term, _ in terms.terms_of(config))
    if not aligned or not MODELS[config.model.name].equal_layers:
        return 0
    plain = override(config, {"additions.terms": ()})
    first, second = (
        count_layers(plain, part._replace(stage=part.stage._replace(depth=depth, frozen_depth=0)), paper_forward, known)
        for depth in (1, 2)
    )
    one_layer = (second - first) / make_task(config).objective.paper_views
    return 2 * (1 - config.additions.depth_dropout) * part.stage.trained_before * one_layer


def server_operations(config: Config, part: StagePart, known: Known) -> int:
    """Count the multiply-adds of the server's training in a stage, whose batches are as large as a client's.

    The server trains in the calibration after each round, and trains FedCA's base model.
    """
    steps = config.additions.calibration_steps * part.stage.rounds + config.additions.base_steps
    if not steps:
        return 0
    params, layers = param_shapes(config)
    off = {"additions.terms": (), "additions.depth_dropout": 0.0, "additions.dictionary": 0, "additions.base_steps": 0}
    everything = split_params(params, all_trainable(part.stage, layers))
    per_sample = count_layers(override(config, off), everything, executed_operations, known)
    return steps * round(per_sample * config.optimizer.batch_size)


def count(jaxpr: ClosedJaxpr, layer_norm_operations: int = 0) -> int:
    """Count the multiply-adds of a traced program: matrix products, convolutions and layer norms.

    A loop counts as often as it runs, and a ``cond`` as its most expensive branch.

    Args:
      jaxpr: the program.
      layer_norm_operations: per element of a layer norm.

    Raises:
      ValueError: a matrix product is in a loop whose number of iterations is not in the program.
    """

    def visit(jaxpr: Jaxpr) -> int:
        return sum(visit_equation(eqn) for eqn in jaxpr.eqns)

    def visit_equation(eqn: Any) -> int:
        name = eqn.primitive.name
        if name == "conv_general_dilated":
            numbers, kernel = eqn.params["dimension_numbers"], eqn.invars[1].aval.shape
            taps = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
            # Most elements of a dilated input are zeros.
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


def step_config(config: Config) -> Config:
    """Return one representative of all configs with the same steps, which stages and their rounds do not change."""
    return dataclasses.replace(ledger_config(config), strategy=StrategyConfig(name=""))


def traceable_step(config: Config, trainable: Tree, frozen: Tree) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a client's training step, and the shapes of its arguments."""
    task, b = make_task(config), config.optimizer.batch_size
    number: Any = jax.ShapeDtypeStruct((), jnp.int32)
    broadcast = Broadcast(
        trainable,
        present=jax.tree.map(lambda _: jax.ShapeDtypeStruct((), bool), trainable),
        frozen=frozen,
        depth=number,
        frozen_depth=number,
        droppable=number,
        extras=make_exchange(config, task).shapes(trainable, b),  # a client does not need more public images at once
    )
    return functools.partial(client_step, task), (
        jax.eval_shape(lambda t: client_init(task, t), trainable),
        broadcast,
        jax.ShapeDtypeStruct((b, *task.image_shape), jnp.uint8),
        jax.ShapeDtypeStruct((b,), bool),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
