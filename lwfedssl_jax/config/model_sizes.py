"""Named encoders: each entry has an architecture and its sizes."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a named encoder; a subclass describes an architecture.

    A field has the name of the field of ``ModelConfig`` whose value it gives where a config leaves that at 0 or auto.
    Fields of ``ModelConfig`` that a subclass does not have cannot be set for its models.

    Attributes:
      architecture: its key in ``models.ARCHITECTURES``.
      equal_layers: whether all layers have the same shapes and do the same work. Depth dropout requires it, and the
        ledger then traces at most two layers of a kind.
      max_depth: largest number of layers.
      cpu_lanes: clients per CPU core at a time. Products with separate weights per client are slower there for vision
        transformers and faster for ResNets (``benchmarks/lanes.py``, ``benchmarks/resnet.py``).
      width: embedding width; for a ResNet, channels of the first stage.
      depth: number of layers.
    """

    architecture: ClassVar[str]
    equal_layers: ClassVar[bool] = False
    max_depth: ClassVar[int] = 4096
    cpu_lanes: ClassVar[int] = 1

    width: int
    depth: int


@dataclass(frozen=True)
class VitSize(ModelSize):
    """Sizes of a named vision transformer."""

    architecture = "vit"
    equal_layers = True

    heads: int
    patch_size: int = 4


@dataclass(frozen=True)
class ResNetSize(ModelSize):
    """Sizes of a named residual network, whose layers are its stages."""

    architecture = "resnet"
    max_depth = 4
    cpu_lanes = 4

    stem: str = "imagenet"


MODELS: dict[str, ModelSize] = {
    "vit_micro": VitSize(64, 6, 4),
    "vit_tiny": VitSize(192, 12, 3),
    "vit_small": VitSize(384, 12, 6),
    "resnet18": ResNetSize(64, 4),
}
