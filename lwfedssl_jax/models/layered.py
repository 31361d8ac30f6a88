"""Any Flax module with a list of layers as an encoder that can be trained layer by layer."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lwfedssl_jax.config import MODELS, ConfigError, ModelConfig, ModelSize
from lwfedssl_jax.models import ARCHITECTURES
from lwfedssl_jax.models.dense import Dense, is_narrow
from lwfedssl_jax.models.encoder import EVERY_STAGE, Depth, Encoder
from lwfedssl_jax.tree import Tree

Build = Callable[..., nn.Module]
BUILT_IN = frozenset((*MODELS, *ARCHITECTURES))


class Pooled(NamedTuple):
    """Features BxD that the frozen part has pooled already."""

    features_BxD: jax.Array


class Layered(NamedTuple):
    """A module, and which of its parameters belong to what.

    Attributes:
      module: has ``layers``, a list of submodules, and may have ``stem`` and ``pool`` (``add_model``).
      stem, pool: names of the parameters that these use.
      layers: names of the parameters of each layer.
      has_stem, has_pool: whether it has these.
      own_pool: whether layers differ in the shape of what they give, so that each stage needs a pool of its own.
      reshape: linear layer to D features.
      reshaped: stages that need it, by their last layer.
      remat: whether only the input of each layer is kept for the backward pass.
    """

    module: nn.Module
    stem: tuple[str, ...]
    layers: tuple[tuple[str, ...], ...]
    pool: tuple[str, ...]
    has_stem: bool
    has_pool: bool
    own_pool: bool
    reshape: Dense
    reshaped: tuple[int, ...]
    remat: bool


def add_model(name: str, build: Build, *, width: int, depth: int, **sizes: Any) -> None:
    """Make ``model.name NAME`` an encoder of your own.

    Args:
      name: what configs call it.
      build: a class of Flax modules, or a function with keyword arguments that makes one. Of ``width``, ``depth``,
        ``heads``, ``patch_size``, ``image_shape`` (H, W, C) and ``dtype`` (of matrix products' factors) it gets those
        that it has as fields. The module has ``layers``, a list of ``depth`` submodules, each with parameters and
        called with the result of the one before. It may have ``stem``, a submodule or a method, from BxHxWxC
        standardised images to what the first layer takes, which belongs to layer 1; and ``pool``, from what the last
        layer gives to features BxD, which is trained in every stage; without it, features are averaged over all but
        the last axis. Samples must not see each other: no batch normalisation. Layers of other shapes than the last
        one's get, in their stage, a pool and a linear layer to D of their own.
      width, depth: that it has where a config does not set them.
      sizes: further ones that a config may set: ``heads``, ``patch_size``.

    Raises:
      ConfigError: the name is one of this package's, or it knows no such size.
    """
    if name in BUILT_IN:
        raise ConfigError(f"add_model: {name!r} is a name of this package; accepted: another one")
    known = {field.name for field in dataclasses.fields(ModelConfig)} - {"name"}
    if unknown := set(sizes) - known:
        raise ConfigError(f"add_model: unknown size {min(unknown)!r}; accepted: {', '.join(sorted(known))}")
    fields = [(size, type(value), dataclasses.field(default=value)) for size, value in sizes.items()]
    size = dataclasses.make_dataclass(
        "OwnSize", fields, bases=(ModelSize,), namespace={"architecture": name}, frozen=True
    )
    MODELS[name] = size(width, depth)
    ARCHITECTURES[name] = functools.partial(layered, build)


def layered(
    build: Build, config: ModelConfig, image_shape: tuple[int, int, int], dtype: DTypeLike, *, remat: bool = False
) -> Encoder:
    """An encoder of the module that ``build`` makes for a config's sizes (``add_model``).

    Raises:
      ConfigError: the module is not of that form, or cannot compute in the requested precision.
    """
    what = f"model.name: {config.name!r}"
    given = {field: getattr(config, field) for field in ("width", "depth", "heads", "patch_size")}
    given |= {"image_shape": image_shape, "dtype": np.promote_types(dtype, jnp.float32)}
    if is_narrow(dtype):
        given["dtype"] = dtype
    takes = fields_of(build)
    if is_narrow(dtype) and "dtype" not in takes:
        raise ConfigError(f"runtime.precision: {np.dtype(dtype).name} needs a field dtype in {what}; accepted: float32")
    module = build(**{name: value for name, value in given.items() if name in takes})
    has = functools.partial(_ask, module)
    if not has(lambda m: isinstance(getattr(m, "layers", None), list | tuple)):
        raise ConfigError(f"{what}: {type(module).__name__} has no list `layers`; accepted: what add_model describes")
    if (found := has(lambda m: len(m.layers))) != config.depth:
        raise ConfigError(f"model.depth: {config.depth}, but {config.name} has {found} layers; accepted: {found}")
    net = examine(module, config, image_shape, remat)
    return Encoder(
        init=functools.partial(init_layered, net, image_shape),
        layers=functools.partial(numbers_of, net),
        frozen_forward=functools.partial(run_frozen, net),
        trainable_forward=functools.partial(run_trainable, net),
        feature_dim=net.reshape.features,
    )


def fields_of(build: Build) -> set[str]:
    """Names of the fields of a module's class, or of the keyword arguments of a function."""
    return set(inspect.signature(build).parameters)


def _ask(module: nn.Module, question: Callable[[Any], Any]) -> Any:
    """The answer to a question about a module that is set up."""
    return nn.apply(question, module)({})


def examine(module: nn.Module, config: ModelConfig, image_shape: tuple[int, int, int], remat: bool) -> Layered:
    """Find out which parameters a module's parts have.

    Raises:
      ConfigError: parts share parameters, a layer has none, or the module keeps other variables than parameters.
    """
    what, depth = f"model.name: {config.name!r}", config.depth
    has_stem, has_pool = _ask(module, lambda m: [hasattr(m, part) for part in ("stem", "pool")])
    names: dict[str, tuple[str, ...]] = {}
    x = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    shapes = []

    def look(part: str, call: Callable[..., Any], x: Any) -> Any:
        x, variables = jax.eval_shape(functools.partial(module.init_with_output, method=call), jax.random.key(0), x)
        if others := set(variables) - {"params"}:
            raise ConfigError(f"{what}: {part} keeps {min(others)}; accepted: parameters only, such as of LayerNorm")
        names[part] = tuple(variables.get("params", {}))
        return x

    try:
        x = look("stem", _call("stem"), x) if has_stem else x
        for i in range(depth):
            x = look(f"layers[{i}]", _call_layer(i), x)
            shapes.append(x.shape[1:])
        features = [look("pool", _call("pool") if has_pool else _mean, _shape(shape)) for shape in shapes]
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's module raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"{what}: cannot run on images of {image_shape} ({reason}); accepted: a module that does"
        ) from error
    if features[-1].ndim != 2:
        raise ConfigError(f"{what}: features have shape {features[-1].shape[1:]}; accepted: one axis")
    for part in names:
        if part.startswith("layers") and not names[part]:
            raise ConfigError(f"{what}: {part} has no parameters; accepted: layers that can be trained")
        if shared := {n for n in names[part] for other in names if other != part and n in names[other]}:
            raise ConfigError(f"{what}: {part} shares {min(shared)} with another part; accepted: parts of their own")
    width = features[-1].shape[-1]
    return Layered(
        module=module,
        stem=names.get("stem", ()),
        layers=tuple(names[f"layers[{i}]"] for i in range(depth)),
        pool=names["pool"],
        has_stem=has_stem,
        has_pool=has_pool,
        own_pool=bool(names["pool"]) and len(set(shapes)) > 1,
        reshape=Dense(width, jnp.float32, jnp.float32),
        reshaped=tuple(s for s, z in enumerate(features[:-1], 1) if z.shape[-1] != width),
        remat=remat,
    )


def _shape(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *shape), jnp.float32)


def _call(part: str) -> Callable[[Any, Any], Any]:
    return lambda module, x: getattr(module, part)(x)


def _call_layer(i: int) -> Callable[[Any, Any], Any]:
    return lambda module, x: module.layers[i](x)


def _mean(module: Any, x: jax.Array) -> jax.Array:
    del module
    return x.mean(tuple(range(1, x.ndim - 1)))


def init_layered(net: Layered, image_shape: tuple[int, int, int], key: jax.Array) -> Tree:
    """Fresh parameters, by Flax's names, and those of single stages."""
    x, weights = jnp.zeros((1, *image_shape)), dict[str, Any]()
    stem_key, pool_key, reshape_key, *keys = jax.random.split(key, 3 + len(net.layers))

    def start(key: jax.Array, call: Callable[..., Any], x: jax.Array) -> tuple[jax.Array, Tree]:
        x, variables = net.module.init_with_output(key, x, method=call)
        return x, variables.get("params", {})

    if net.has_stem:
        x, weights = start(stem_key, _call("stem"), x)
    for i, layer_key in enumerate(keys):
        x, params = start(layer_key, _call_layer(i), x)
        z, pool = start(jax.random.fold_in(pool_key, i), _call("pool") if net.has_pool else _mean, x)
        weights = {**weights, **params}
        last = i + 1 == len(net.layers)
        if net.own_pool and not last:
            weights[f"stage{i + 1}_pool"] = pool
        elif last:
            weights = {**weights, **pool}
        if i + 1 in net.reshaped:
            weights[f"stage{i + 1}_reshape"] = net.reshape.init(jax.random.fold_in(reshape_key, i), z)["params"]
    return {"encoder": weights, "statistics": {}}


def numbers_of(net: Layered, params: Tree) -> Tree:
    """The layer number of each parameter."""
    numbers = dict.fromkeys(net.stem, 1) | dict.fromkeys(net.pool, len(net.layers) if net.own_pool else EVERY_STAGE)
    for s, names in enumerate(net.layers, 1):
        numbers |= dict.fromkeys(names, s)
        numbers |= {f"stage{s}_pool": -s, f"stage{s}_reshape": -s}
    weights = {
        name: jax.tree.map(lambda _, n=numbers[name]: np.array(n), part) for name, part in params["encoder"].items()
    }
    return {"encoder": weights, "statistics": {}}


def _has(weights: Tree, names: tuple[str, ...]) -> bool:
    return bool(names) and bool(jax.tree.leaves({name: weights[name] for name in names}))


def run_layers(net: Layered, weights: Tree, x: jax.Array) -> jax.Array:
    """Run the layers whose parameters are here; the stem goes with the first of them."""

    def run(names: tuple[str, ...], call: Callable[..., Any], x: jax.Array) -> jax.Array:
        part = {"params": {name: weights[name] for name in names}}
        apply = functools.partial(net.module.apply, method=call)
        return cast(jax.Array, (jax.checkpoint(apply) if net.remat else apply)(part, x))

    for i, names in enumerate(net.layers):
        if _has(weights, names):
            if i == 0 and net.has_stem:
                x = run(net.stem, _call("stem"), x)
            x = run(names, _call_layer(i), x)
    return x


def pool(net: Layered, params: Tree, x: jax.Array) -> jax.Array:
    """Features BxD of what a layer gives."""
    return cast(jax.Array, net.module.apply({"params": params}, x, method=_call("pool") if net.has_pool else _mean))


def run_frozen(net: Layered, frozen: Tree, images: Any, depth: Depth, order: jax.Array | None = None) -> Any:
    """``Encoder.frozen_forward``: the parts with parameters run, whatever ``depth`` and ``order`` are."""
    del depth, order
    weights = frozen["encoder"]
    x = run_layers(net, weights, images)
    return Pooled(pool(net, {name: weights[name] for name in net.pool}, x)) if _has(weights, net.pool) else x


def run_trainable(
    net: Layered, trainable: Tree, x: Any, mask_B: jax.Array, depth: Depth, order: jax.Array | None = None
) -> tuple[jax.Array, Tree]:
    """``Encoder.trainable_forward``: the parts with parameters run, whatever ``depth`` and ``order`` are."""
    del mask_B, depth, order  # samples do not see each other
    if isinstance(x, Pooled):
        return x.features_BxD, {}
    weights = trainable["encoder"]
    x = run_layers(net, weights, x)
    stage = next((s for s in range(1, len(net.layers)) if _has(weights, present(weights, s))), 0)
    if net.own_pool and not _has(weights, net.pool):
        own = weights.get(f"stage{stage}_pool")
        z = pool(net, own, x) if stage and own else _mean(None, x)
    else:
        z = pool(net, {name: weights[name] for name in net.pool}, x)
    if stage in net.reshaped:
        z = cast(jax.Array, net.reshape.apply({"params": weights[f"stage{stage}_reshape"]}, z))
    return z, {}


def present(weights: Tree, stage: int) -> tuple[str, ...]:
    """Names of what a stage has of its own."""
    return tuple(name for name in (f"stage{stage}_pool", f"stage{stage}_reshape") if name in weights)
