"""Encoders and heads as pure functions, and the layer that each parameter belongs to."""

from collections.abc import Callable

from lwfedssl_jax.models.encoder import Encoder
from lwfedssl_jax.models.resnet import resnet
from lwfedssl_jax.models.vit import vit

# By ``ModelSize.architecture``: ``(config.model, image_shape, dtype, *, remat) -> Encoder``.
ARCHITECTURES: dict[str, Callable[..., Encoder]] = {"vit": vit, "resnet": resnet}
