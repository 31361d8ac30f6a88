"""The trained encoder as files that timm (ViT) and torchvision (ResNet-18) read, and back.

``encoder.safetensors`` has the weights under their names and in their layouts, ``encoder.json`` what is needed to
rebuild the model. An encoder of the user's own has neither's form: its weights are stored by Flax's names.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from PIL import Image

import lwfedssl_jax
from lwfedssl_jax.config import MODELS, Config, ConfigError, ModelConfig, load
from lwfedssl_jax.data.cache import fit
from lwfedssl_jax.data.views import Recipe
from lwfedssl_jax.evaluation.frozen import BATCH, apply, make_encode
from lwfedssl_jax.method.task import Task, make_encoder
from lwfedssl_jax.models import ARCHITECTURES
from lwfedssl_jax.models.dense import factor_type
from lwfedssl_jax.models.resnet import resnet
from lwfedssl_jax.models.vit import vit
from lwfedssl_jax.system.files import with_home
from lwfedssl_jax.tree import Tree

WEIGHTS, ABOUT = "encoder.safetensors", "encoder.json"
CHANNELS = (1, 3, 4)  # gray, RGB, RGB with transparency
METADATA = "lwfedssl_jax"  # key in the metadata of WEIGHTS under which the content of ABOUT is repeated
FORMAT_VERSION = 1
TORCHVISION_WIDTH, TORCHVISION_DEPTH = 64, 4  # of its ResNet-18

# Patterns that turn our names into theirs, applied in order; * is the number of a stacked block.
NAMES = (
    (r"^embedding\.position$", "pos_embed"),
    (r"^embedding\.patch", "patch_embed.proj"),
    (r"^blocks\.(qkv|proj)", r"blocks.*.attn.\1"),
    (r"^blocks\.(fc\d)", r"blocks.*.mlp.\1"),
    (r"^blocks\.(norm\d)", r"blocks.*.\1"),
    (r"^stem\.", ""),
    (r"\.block1\.", ".0."),
    (r"\.block2\.", ".1."),
    (r"conv(\d)\.conv", r"conv\1"),
    (r"conv(\d)\.norm", r"bn\1"),
    (r"downsample\.conv", "downsample.0"),
    (r"downsample\.norm", "downsample.1"),
    (r"\.(kernel|scale)$", ".weight"),
    (r"\.(mean|var)$", r".running_\1"),
)


def has_torch_form(model: ModelConfig) -> bool:
    """Whether timm or torchvision can have the model, which is then stored under their names."""
    return ARCHITECTURES[MODELS[model.name].architecture] in (vit, resnet)


def encoder_files(config: Config, task: Task, params: Tree) -> dict[str, bytes]:
    """Make ``{file name: content}`` of the encoder in ``params`` with all its layers, without heads.

    Args:
      config: of the run, resolved.
      task: of the same run.
      params: trained parameters, with or without heads.
    """
    *size, channels = task.image_shape
    about = {
        "format_version": FORMAT_VERSION,
        "lwfedssl_jax": lwfedssl_jax.__version__,
        "model": vars(config.model),
        "precision": config.runtime.precision,
        "input_size": [channels, *size],
        "mean": [task.recipe.mean] * channels,  # of pixels in [0, 1]
        "std": [task.recipe.std] * channels,
        "num_features": task.encoder.feature_dim,
        "trained": {
            "data": config.data.name,
            "strategy": config.strategy.name,
            "objective": config.objective.name,
            "rounds": config.federation.rounds,
            "layers": task.layers,
        },
        **(rebuilt_in_torch(config.model, size, channels) if has_torch_form(config.model) else {"names": "flax"}),
    }
    metadata = {METADATA: json.dumps(about)}  # one entry only: safetensors writes several in any order
    weights = safetensors.numpy.save(state_dict(config.model, task, params), metadata)
    about["sha256"] = hashlib.sha256(weights).hexdigest()
    return {WEIGHTS: weights, ABOUT: (json.dumps(about, indent=1) + "\n").encode()}


def rebuilt_in_torch(model: ModelConfig, size: list[int], channels: int) -> dict[str, Any]:
    """Return ``{"timm": arguments of timm.create_model}`` or ``{"torchvision": what to change in its ResNet-18}``.

    The latter is None for widths other than 64 and for other architectures.
    """
    architecture = MODELS[model.name].architecture
    if architecture == "vit":
        sizes = {"embed_dim": model.width, "depth": model.depth, "num_heads": model.heads}
        images = {"img_size": size, "patch_size": model.patch_size, "in_chans": channels}
        form = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
        # Any name in timm would do: all that distinguishes them follows.
        return {"timm": {"model_name": "vit_tiny_patch16_224", **images, **sizes, **form}}
    if architecture != "resnet" or model.width != TORCHVISION_WIDTH:
        return {"torchvision": None}
    small = model.stem == "small"
    kernel = {"kernel_size": 3, "stride": 1, "padding": 1} if small else {"kernel_size": 7, "stride": 2, "padding": 3}
    conv1 = {"in_channels": channels, "out_channels": model.width, "bias": False, **kernel}
    absent = [f"layer{s + 1}" for s in range(model.depth, TORCHVISION_DEPTH)] + ["maxpool"] * small
    return {"torchvision": {"conv1": conv1, "identity": [*absent, "fc"]}}


def state_dict(model: ModelConfig, task: Task, params: Tree) -> dict[str, np.ndarray]:
    """The encoder's weights and running averages under their names and in their layouts in timm or torchvision."""
    layers = task.encoder.layers(params)
    theirs = has_torch_form(model)
    params = jax.device_get({kind: params[kind] for kind in layers})
    tensors = {}
    for (path, x), number in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(layers), strict=True):
        if np.all(number < 0):  # a stage's temporary layer
            continue
        name = torch_name(path) if theirs else flax_name(path)
        if not theirs:
            tensors[name] = np.ascontiguousarray(x)
            continue
        for i, one in enumerate(x) if "*" in name else [(0, x)]:
            if name == "patch_embed.proj.weight":
                one = one.reshape(model.patch_size, model.patch_size, -1, model.width)
            axes = {1: (0,), 2: (1, 0), 3: (0, 1, 2), 4: (3, 2, 0, 1)}[one.ndim]
            one = one[None] if name == "pos_embed" else one.transpose(axes)
            tensors[name.replace("*", str(i))] = np.ascontiguousarray(one)
    return tensors


def from_state_dict(shapes: Tree, layers: Tree, tensors: dict[str, np.ndarray], theirs: bool = True) -> Tree:
    """Make parameters of the given shapes from the tensors of ``state_dict``; temporary layers become None.

    Args:
      shapes: of the encoder's parameters.
      layers: their layer numbers.
      tensors: by name.
      theirs: whether names and layouts are those of timm or torchvision, or Flax's.

    Raises:
      KeyError, ValueError: a tensor is missing or has another size.
    """

    def leaf(path: Any, shape: jax.ShapeDtypeStruct, number: np.ndarray) -> jax.Array | None:
        if np.all(number < 0):
            return None
        if not theirs:
            return jnp.asarray(tensors[flax_name(path)].reshape(shape.shape))
        name = torch_name(path)
        depth = len(number) if "*" in name else 1
        x = np.stack([tensors[name.replace("*", str(i))] for i in range(depth)])
        axes = {2: (0, 1), 3: (0, 2, 1), 4: (0, 1, 2, 3), 5: (0, 3, 4, 2, 1)}[x.ndim]
        return jnp.asarray(x.transpose(axes).reshape(shape.shape))

    return jax.tree.map_with_path(leaf, shapes, layers)


def torch_name(path: Any) -> str:
    """The name in timm or torchvision of the leaf at a path of ``{"encoder": ..., "statistics": ...}``."""
    name = ".".join(str(key.key) for key in path[1:])
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    return name


Picture = str | Path | Image.Image | np.ndarray


def flax_name(path: Any) -> str:
    """The name of a leaf in its Flax module, with ``statistics`` in front where it is no parameter."""
    kind, *names = (str(key.key) for key in path)
    return ".".join(names if kind == "encoder" else [kind, *names])


class TrainedEncoder:
    """``images -> features`` of an encoder that a run has written.

    Attributes:
      config: the content of ``encoder.json``.
      image_shape: H, W and C of the images that it was trained on.
      num_features: number D of features.
      params: ``{"encoder": weights, "statistics": running averages}``.
    """

    def __init__(self, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        channels, *size = config["input_size"]
        (mean,), (std,) = set(config["mean"]), set(config["std"])
        precision = config["precision"]
        model = ModelConfig(**config["model"])
        self.config = config
        self.image_shape = (*size, channels)
        self._depth = model.depth
        self._encoder = make_encoder(model, self.image_shape, precision)
        self._recipe, self._dtype = Recipe(mean=mean, std=std), np.promote_types(factor_type(precision), np.float32)
        self._encode = make_encode(self._encoder, self._recipe, self._dtype)
        self.num_features = self._encoder.feature_dim
        shapes = jax.eval_shape(self._encoder.init, jax.random.key(0))
        self.params = from_state_dict(shapes, self._encoder.layers(shapes), tensors, has_torch_form(model))

    def __call__(self, images: "np.ndarray | jax.Array | Iterable[Picture] | Picture") -> np.ndarray:
        """Compute ``features_NxD``, float32, batch by batch.

        Args:
          images: NxHxWxC, floats in [0, 1] of the encoder's size, or uint8 of any size; or pictures of any sizes, one
            by one (``picture``). Other sizes and channels are changed as in training.

        Raises:
          ValueError: the images have another shape or type, or are out of range; a picture cannot be read.
        """
        images = self._fitted(images)
        real = jnp.issubdtype(images.dtype, jnp.floating)
        shown = f"{images.dtype} {images.shape}"
        if images.shape[1:] != self.image_shape or images.ndim != 4 or not (real or images.dtype == np.uint8):
            h, w, c = self.image_shape
            raise ValueError(
                f"images: {shown} does not fit; accepted: uint8 (N, H, W, C), floats in [0, 1] (N, {h}, {w}, {c}), or "
                "a list of pictures"
            )
        if real and images.size and not (images.min() >= 0 and images.max() <= 1):
            raise ValueError(
                f"images: {shown} from {images.min()} to {images.max()}; accepted: floats in [0, 1], not normalised"
            )
        if not len(images):
            return np.zeros((0, self.num_features), np.float32)
        # Few images form a batch of a power of two, so that few programs serve all numbers of images.
        return self._encode(self.params, images, self._depth, min(BATCH, 1 << (len(images) - 1).bit_length()))

    def _fitted(self, images: "np.ndarray | jax.Array | Iterable[Picture] | Picture") -> np.ndarray:
        """An array of images, resized if that can be done."""
        if isinstance(images, np.ndarray | jax.Array):
            images = np.asarray(images)
            resizable = images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in CHANNELS
            if images.shape[1:] == self.image_shape or not resizable:
                return images
        elif isinstance(images, str | Path | Image.Image):
            images = [images]
        with ThreadPoolExecutor() as pool:
            found = list(pool.map(self.picture, images))
        return np.stack(found) if found else np.zeros((0, *self.image_shape), np.uint8)

    def picture(self, picture: Picture) -> np.ndarray:
        """Return a picture as the encoder takes it, HxWxC uint8: upright, resized, gray or RGB, as in training.

        Args:
          picture: a path, an image of Pillow, or uint8 HxW or HxWxC.

        Raises:
          ValueError: it cannot be read, or is none of these.
        """
        *_, channels = self.image_shape
        try:
            if isinstance(picture, str | Path):
                with Image.open(with_home(picture)) as image:
                    return fit(image, self.image_shape[0], channels)
            if not isinstance(picture, Image.Image):
                picture = np.asarray(picture)
                if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
                    raise ValueError(f"{picture.dtype} {picture.shape} is no picture; accepted: uint8, HxW or HxWxC")
            return fit(picture, self.image_shape[0], channels)
        except OSError as error:
            raise ValueError(f"{picture}: cannot be read ({error})") from error

    def apply(self, params: Tree, images_BxHxWxC: jax.Array) -> jax.Array:
        """Compute the same as a pure function of parameters and images, without checks: for jit, grad and vmap."""
        return apply(self._encoder, self._recipe, self._dtype, params, images_BxHxWxC, self._depth)


def load_encoder(directory: str | Path, config_file: str = "") -> TrainedEncoder:
    """Load the encoder that a finished run has written to its work directory.

    Args:
      directory: the work directory.
      config_file: the user's own file that adds the model, if it is not one of this package.

    Raises:
      ConfigError: its files are missing, damaged, of different runs, or of another format; its model is not known.
    """
    if config_file:
        load(config_file)
    weights, about = with_home(directory) / WEIGHTS, with_home(directory) / ABOUT
    try:
        content, config = weights.read_bytes(), json.loads(about.read_text(encoding="utf-8"))
        version = config["format_version"]
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: cannot be read ({error.strerror}); accepted: the work directory of a finished run"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{about}: does not describe an encoder; accepted: the file that a finished run wrote"
        ) from error
    if version != FORMAT_VERSION:
        raise ConfigError(f"{about}: format_version {version!r} is unknown; accepted: {FORMAT_VERSION}")
    if hashlib.sha256(content).hexdigest() != config.get("sha256"):
        raise ConfigError(
            f"{weights}: damaged, or of another run than {ABOUT} (its SHA-256 differs from the one there); "
            "accepted: both files as the run wrote them"
        )
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        stated = json.loads(header["__metadata__"][METADATA])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{weights}: does not contain an encoder; accepted: the file that a finished run wrote"
        ) from error
    if stated != {k: v for k, v in config.items() if k != "sha256"}:
        raise ConfigError(
            f"{about}: differs from the metadata of {WEIGHTS}; accepted: both files as the run wrote them"
        )
    if (name := dict(config.get("model", {})).get("name")) not in MODELS:
        raise ConfigError(
            f"{about}: the model {name!r} is not one of this package; accepted: a model of this package, or the config "
            "file that adds this one: load_encoder(DIRECTORY, FILE), embed --config FILE"
        )
    try:
        return TrainedEncoder(config, safetensors.numpy.load(content))
    except Exception as error:  # of any kind: sizes, names or bytes may be wrong
        what = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ConfigError(
            f"{about}: cannot be rebuilt by lwfedssl_jax {lwfedssl_jax.__version__} ({what}); "
            f"accepted: encoders of this version, found one of version {config.get('lwfedssl_jax')}"
        ) from error
