"""Residual networks of basic blocks (He et al., 2016, arXiv 1512.03385), split into a frozen and a trainable part.

ResNet-18 as in torchvision, channels last: a stem and up to four layers of two blocks each. The stem belongs to
layer 1. Layers differ in width, so each training stage has a program of its own, and the layers that run are those that
have parameters, whatever the depth.
"""

import functools
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lwfedssl_jax.config import ModelConfig
from lwfedssl_jax.models.dense import Dense, contract, is_narrow
from lwfedssl_jax.models.encoder import Depth, Encoder
from lwfedssl_jax.tree import Tree

FAN_OUT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # torchvision's kaiming_normal_


def convolve(x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int, dtype: DTypeLike) -> jax.Array:
    """Convolution by ``kernel`` (k, k, C, D), factors and result rounded to ``dtype``.

    Padding keeps the size, or divides it by the stride and rounds up.
    """
    # On a CPU inside a loop, as a round's steps are, gradients of XLA's convolutions take up to 70 times as long.
    if jax.default_backend() == "cpu":
        return convolve_as_product(x_BxHxWxC, kernel, stride, dtype)
    pad = len(kernel) // 2
    return jax.lax.conv_general_dilated(
        x_BxHxWxC.astype(dtype),
        kernel.astype(dtype),
        (stride, stride),
        [(pad, pad)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="default" if is_narrow(dtype) else None,
    )


# Otherwise the backward pass would keep the input once for each of the kernel's pixels.
@functools.partial(jax.checkpoint, static_argnums=(2, 3))
def convolve_as_product(x_BxHxWxC: jax.Array, kernel: jax.Array, stride: int, dtype: DTypeLike) -> jax.Array:
    """``convolve`` as one matrix product of the image patches and the kernel."""
    _, h, w, _ = x_BxHxWxC.shape
    k, pad = len(kernel), len(kernel) // 2
    x = jnp.pad(x_BxHxWxC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    x = jnp.concatenate([x[:, :, j : j + w : stride] for j in range(k)], axis=-1)
    x = jnp.concatenate([x[:, i : i + h : stride] for i in range(k)], axis=-1)
    y = contract("nd,de->ne", dtype, x.reshape(-1, x.shape[-1]), kernel.reshape(x.shape[-1], -1))
    return y.reshape(*x.shape[:3], -1)


class Conv(nn.Module):
    """Convolution with a square kernel and no bias."""

    features: int
    size: int
    stride: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x_BxHxWxC.shape[-1], self.features)
        return convolve(x_BxHxWxC, self.param("kernel", FAN_OUT, shape, self.param_dtype), self.stride, self.dtype)


class ConvNorm(nn.Module):
    """Convolution, then batch normalisation: by running averages, or by those of the samples that a mask selects."""

    features: int
    size: int
    stride: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, mask_Bx1x1x1: jax.Array | None) -> jax.Array:
        wide: dict[str, Any] = {"dtype": self.param_dtype, "param_dtype": self.param_dtype}
        conv = Conv(self.features, self.size, self.stride, self.dtype, self.param_dtype, name="conv")
        norm = nn.BatchNorm(
            use_running_average=mask_Bx1x1x1 is None,
            momentum=0.9,
            epsilon=1e-5,
            use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where the mean is large
            force_float32_reductions=False,  # it computes in float32 or wider already
            name="norm",
            **wide,
        )
        return norm(conv(x_BxHxWxC).astype(self.param_dtype), mask=mask_Bx1x1x1).astype(self.dtype)


class Stem(nn.Module):
    """Images to the first feature map: at a quarter of their size (``imagenet``) or at full size (``small``)."""

    kind: str
    features: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, mask_Bx1x1x1: jax.Array | None) -> jax.Array:
        size, stride = (7, 2) if self.kind == "imagenet" else (3, 1)
        convolve = ConvNorm(self.features, size, stride, self.dtype, self.param_dtype, name="conv1")
        x = nn.relu(convolve(x_BxHxWxC, mask_Bx1x1x1))
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))) if self.kind == "imagenet" else x


class ResidualBlock(nn.Module):
    """Basic block: two 3x3 convolutions beside the identity, or beside a 1x1 one where the shape changes."""

    features: int
    stride: int
    dtype: DTypeLike
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, mask_Bx1x1x1: jax.Array | None) -> jax.Array:
        types: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = ConvNorm(self.features, 3, self.stride, name="conv1", **types)(x_BxHxWxC, mask_Bx1x1x1)
        y = ConvNorm(self.features, 3, 1, name="conv2", **types)(nn.relu(y), mask_Bx1x1x1)
        x = x_BxHxWxC
        if self.stride > 1:
            x = ConvNorm(self.features, 1, self.stride, name="downsample", **types)(x, mask_Bx1x1x1)
        return nn.relu(x + y)


class Layer(nn.Module):
    """Two basic blocks, the first of them with the stride."""

    features: int
    stride: int
    dtype: DTypeLike
    param_dtype: DTypeLike
    remat: bool

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array, mask_Bx1x1x1: jax.Array | None) -> jax.Array:
        block = nn.remat(ResidualBlock) if self.remat else ResidualBlock
        x = x_BxHxWxC
        for i, stride in enumerate((self.stride, 1), 1):
            x = block(self.features, stride, self.dtype, self.param_dtype, name=f"block{i}")(x, mask_Bx1x1x1)
        return x


class ResNet(NamedTuple):
    """The parts of a residual network by name.

    Attributes:
      modules: stem and layers, in the order in which they run.
      reshape: a linear layer to the whole encoder's width, which each layer but the last has of its own.
      widths: channels of each layer.
      numbers: layer number of each part (see ``Encoder.layers``).
    """

    modules: dict[str, nn.Module]
    reshape: Dense
    widths: list[int]
    numbers: dict[str, int]


def resnet(config: ModelConfig, image_shape: tuple[int, int, int], dtype: DTypeLike, *, remat: bool = False) -> Encoder:
    """A residual network of the config's size for images of shape (H, W, C).

    Features are the last layer's, averaged over the image. While a layer before the last ends the encoder and is
    trained, a linear layer that exists in that stage alone brings them to the whole encoder's width D.

    Args:
      config: resolved sizes (no zeros, no auto).
      image_shape: height, width, channels.
      dtype: of what convolutions and products take and give; everything else is computed in float32 or wider.
      remat: keep only each trainable block's input for the backward pass and recompute the rest.
    """
    wide = np.promote_types(dtype, jnp.float32)
    widths = [config.width * 2**s for s in range(config.depth)]
    modules: dict[str, nn.Module] = {"stem": Stem(config.stem, config.width, dtype, wide)}
    for s, width in enumerate(widths, 1):
        modules[f"layer{s}"] = Layer(width, 1 if s == 1 else 2, dtype, wide, remat)
    numbers = {"stem": 1} | {f"layer{s}": s for s in range(1, config.depth + 1)}
    numbers |= {f"reshape{s}": -s for s in range(1, config.depth)}
    net = ResNet(modules, Dense(widths[-1], dtype, wide), widths, numbers)
    return Encoder(
        functools.partial(init_resnet, net, image_shape),
        functools.partial(resnet_layers, net),
        functools.partial(run_frozen, net),
        functools.partial(run_trainable, net),
        widths[-1],
    )


def init_resnet(net: ResNet, image_shape: tuple[int, int, int], key: jax.Array) -> Tree:
    """Fresh parameters."""
    keys = dict(zip(net.numbers, jax.random.split(key, len(net.numbers)), strict=True))
    encoder, statistics = {}, {}
    x = jnp.zeros((1, *image_shape), net.reshape.param_dtype)
    for name, module in net.modules.items():
        x, variables = module.init_with_output(keys[name], x, None)
        encoder[name], statistics[name] = variables["params"], variables["batch_stats"]
    for s, width in enumerate(net.widths[:-1], 1):
        features = jnp.zeros((1, width), x.dtype)
        encoder[f"reshape{s}"] = net.reshape.init(keys[f"reshape{s}"], features)["params"]
    return {"encoder": encoder, "statistics": statistics}


def resnet_layers(net: ResNet, params: Tree) -> Tree:
    """The layer number of each parameter and statistic."""
    return {
        kind: {name: jax.tree.map(lambda _, n=net.numbers[name]: np.array(n), part) for name, part in parts.items()}
        for kind, parts in params.items()
        if kind in ("encoder", "statistics")
    }


def run_frozen(net: ResNet, frozen: Tree, images: jax.Array, depth: Depth, order: jax.Array | None = None) -> jax.Array:
    """``Encoder.frozen_forward``: the parts with parameters run, whatever ``depth`` and ``order`` are."""
    del depth, order
    x = images
    for name in present_modules(net, frozen):
        x = cast(jax.Array, net.modules[name].apply(variables_of(frozen, name), x, None))
    return x


def run_trainable(
    net: ResNet, trainable: Tree, x: jax.Array, mask_B: jax.Array, depth: Depth, order: jax.Array | None = None
) -> tuple[jax.Array, Tree]:
    """``Encoder.trainable_forward``: the parts with parameters run, whatever ``depth`` and ``order`` are."""
    del depth, order

    def run_view(x_BxHxWxC: jax.Array) -> tuple[jax.Array, Tree]:
        mask = mask_B[:, None, None, None]
        # Padding repeats a real sample: another's distance from the mean would overflow, layer by layer, where the
        # real ones do not vary.
        x = jnp.where(mask, x_BxHxWxC, jax.lax.dynamic_index_in_dim(x_BxHxWxC, mask_B.argmax()))
        statistics = {}
        for name in present_modules(net, trainable):
            x, updated = net.modules[name].apply(variables_of(trainable, name), x, mask, mutable=["batch_stats"])
            statistics[name] = updated["batch_stats"]
        return x.astype(net.reshape.param_dtype).mean(axis=(1, 2)), statistics

    z_VxBxD, statistics_V = jax.vmap(run_view)(x.reshape(-1, len(mask_B), *x.shape[1:]))
    z = z_VxBxD.reshape(-1, z_VxBxD.shape[-1])
    for s in range(1, len(net.widths)):
        if jax.tree.leaves(trainable["encoder"][f"reshape{s}"]):
            z = cast(jax.Array, net.reshape.apply({"params": trainable["encoder"][f"reshape{s}"]}, z))
    return z.astype(net.reshape.param_dtype), trainable["statistics"] | jax.tree.map(lambda x: x.mean(0), statistics_V)


def present_modules(net: ResNet, part: Tree) -> list[str]:
    """Names of the modules whose parameters ``part`` has, in order."""
    return [name for name in net.modules if jax.tree.leaves(part["encoder"][name])]


def variables_of(part: Tree, name: str) -> Tree:
    """A module's parameters and statistics as Linen has them."""
    return {"params": part["encoder"][name], "batch_stats": part["statistics"][name]}
