"""The experiment as frozen dataclasses, and every check a single config allows.

Each field's docstring is its help text on the command line. ``validate`` runs before
anything is compiled or written; checks that need the data or the disk come later, in
the module that first knows them, and raise the same ``ConfigError``.
"""

import ast
import csv
import dataclasses
import difflib
import hashlib
import json
import math
import os.path
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin

from lwfedssl_jax import fleet

# In a checkout the named configs lie beside the package, in a wheel inside it.
CONFIG_DIR = next(
    (d for d in (Path(__file__).parent.parent / "configs", Path(__file__).parent / "configs") if d.is_dir()),
    Path("configs"),
)


SWEEPS = "sweeps"  # its folder that has sweeps
REPLACED = "replaced.csv"  # its table of configs that were removed, and what gives the same runs


class ConfigError(ValueError):
    """Bad input: one line that names the field, the value and what is accepted."""


class Range(NamedTuple):
    """Closed interval a number must lie in; ``above`` and ``below`` exclude its ends."""

    low: float
    high: float = float("inf")
    above: bool = False
    below: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, int | float)
        at_open_end = (self.above and value == self.low) or (self.below and value == self.high)
        return self.low <= value <= self.high and not at_open_end

    def __str__(self) -> str:
        low = f"above {self.low}" if self.above else f"at least {self.low}"
        high = f"below {self.high}" if self.below else f"at most {self.high}"
        return low if self.high == float("inf") else f"{low} and {high}"


LARGEST, LARGEST_FLOAT = 2**31 - 1, 3.4e38  # programs have int32 and float32
AtLeast1 = Annotated[int, Range(1, LARGEST)]
AtLeast0 = Annotated[int, Range(0, LARGEST)]
Size = Annotated[int, Range(1, 2**20)]  # products of larger ones crash the compiler
SizeOr0 = Annotated[int, Range(0, 2**20)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]


class VitSize(NamedTuple):
    """Sizes of a named vision transformer."""

    width: int
    depth: int
    heads: int
    patch_size: int = 4


class ResNetSize(NamedTuple):
    """Sizes of a named residual network; ``width`` is that of its first stage, ``depth`` its stages."""

    width: int
    depth: int
    stem: str = "imagenet"


MODELS: dict[str, VitSize | ResNetSize] = {
    "vit_micro": VitSize(64, 6, 4),
    "vit_tiny": VitSize(192, 12, 3),
    "vit_small": VitSize(384, 12, 6),
    "resnet18": ResNetSize(64, 4),
}


@dataclass(frozen=True)
class DataConfig:
    """What the clients' images are."""

    name: str = "digits"
    """digits (scikit-learn's, embedded), synthetic (generated), fashion_mnist or fashion_mnist:PATH (idx files),
    tfds:NAME[/CONFIG] (tensorflow-datasets), npz:PATH (MedMNIST's format), or folder:PATH (images by class)."""
    image_size: Annotated[int, Range(1, 4096)] = 16
    """Height and width in pixels; images are resized once."""
    client_column: str = ""
    """tfds and folder only: feature, or column of clients.csv, that says whose an image is; by default client,
    client_id or user_id, if there is one."""
    views: Literal["auto", "digits", "natural", "fashion"] = "auto"
    """Augmentation recipe; auto takes the data set's own."""
    synthetic_examples: AtLeast1 = 2000
    """synthetic only: training images generated (a quarter as many for testing)."""
    synthetic_classes: Annotated[int, Range(2, LARGEST)] = 10
    """synthetic only: number of classes."""


@dataclass(frozen=True)
class PartitionConfig:
    """Which client owns which example."""

    kind: str = "iid"
    """iid: shares at random; dirichlet: class shares drawn from Dirichlet(beta); shards: a few pieces of the images
    sorted by class (McMahan et al., 2017); quantity: at random, sizes drawn from Dirichlet(beta); natural: the data
    set's own clients; shared: every client draws its own examples from all, so that any number of clients can be
    had."""
    clients: AtLeast1 = 10
    """Clients in the population; natural: so many of the data set's, drawn where there are more."""
    beta: Annotated[float, Range(1e-6)] = 0.5
    """dirichlet and quantity only: concentration; smaller is more skewed."""
    shards_per_client: AtLeast1 = 2
    """shards only: pieces of a client, each of one class or two neighbouring ones."""
    allow_empty: bool = False
    """Let clients end up without data (they then never report)."""
    examples_per_client: AtLeast1 = 100
    """shared only: examples of a client, the median where sizes differ."""
    size_sigma: Annotated[float, Range(0, 10)] = 0.0
    """shared and iid only: clients' sizes are log-normal with this sigma; 0 makes them equal."""
    server_share: Fraction = 0.0
    """Share of the training images that the server holds, without labels, for calibration or a base model; no client
    owns them, used or not, so that runs with and without can be compared."""


@dataclass(frozen=True)
class ModelConfig:
    """The encoder. Sizes of 0 stand for the named model's own."""

    name: Literal["vit_micro", "vit_tiny", "vit_small", "resnet18"] = "vit_tiny"
    """Named size: vit_micro 64 wide, 6 deep; vit_tiny 192, 12; vit_small 384, 12; resnet18 64, 4 stages."""
    patch_size: SizeOr0 = 0
    """vit only: patch height and width in pixels (4)."""
    width: SizeOr0 = 0
    """Embedding width D; resnet: channels of the first stage, doubled by each later one."""
    depth: Annotated[int, Range(0, 4096)] = 0
    """Layers L: transformer blocks; resnet: stages of two residual blocks, at most 4."""
    heads: SizeOr0 = 0
    """vit only: attention heads."""
    stem: Literal["auto", "imagenet", "small"] = "auto"
    """resnet only: imagenet (7x7 stride 2, then max pool; auto) or small (3x3)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The self-supervised objective and its heads."""

    name: str = "mocov3"
    """simclr, byol or mocov3."""
    temperature: Positive = 0.05
    """Softmax temperature of simclr and mocov3; byol has none."""
    momentum: Fraction = 0.99
    """Target branch of byol and mocov3: target <- m * target + (1 - m) * online; simclr has none."""
    hidden_dim: Size = 512
    """Hidden width of the heads."""
    output_dim: Size = 256
    """Output width of the heads."""


@dataclass(frozen=True)
class StrategyConfig:
    """How the encoder is trained over the rounds."""

    name: str = "layerwise"
    """layerwise (LW-FedSSL), progressive (Prog-FedSSL) or end_to_end (FedSSL)."""
    layers_per_stage: AtLeast1 = 1
    """Layers a stage adds; the last stage takes the remainder. end_to_end has one stage of all layers."""


@dataclass(frozen=True)
class FederationConfig:
    """Rounds and who takes part in them."""

    rounds: AtLeast1 = 180
    """Rounds in all, spread over the stages (earlier stages take what does not divide)."""
    local_epochs: AtLeast1 = 3
    """Passes over its own data that a client makes in a round."""
    clients_per_round: AtLeast0 = 0
    """Clients drawn each round; 0 draws all."""
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Probability that a drawn client never reports back."""
    aggregator: str = "fedavg"
    """What the server makes of the clients' models: fedavg, fedavgm, fedadam or ldawa."""
    server_learning_rate: NonNegative = 0.0
    """fedavgm, fedadam: step size on the averaged change; 0 takes 1 for fedavgm and 0.01 for fedadam."""
    server_momentum: Annotated[float, Range(0, 1, below=True)] = 0.9
    """fedavgm: momentum; fedadam: decay of the first moment."""
    server_epsilon: Positive = 1e-3
    """fedadam: added to the root of the second moment."""
    client_start: str = "global"
    """How a client takes the global model in: global (as it is), fedu or fedema, which keep a model on each client."""
    divergence: NonNegative = 0.0
    """fedu: distance below which a client takes the global predictor; fedema: the autoscaler's tau; 0: 0.4 or 0.7."""


@dataclass(frozen=True)
class AdditionsConfig:
    """What can be added to each stage; all off by default."""

    depth_dropout: Fraction = 0.0
    """Probability that a step skips a layer that an earlier stage has trained (Guo et al., 2023)."""
    terms: tuple[str, ...] = ()
    """Terms of the local loss as NAME=WEIGHT: proximal (FedProx), alignment (to the global model's representations),
    base (FedCA: to those of a base model that the server has trained)."""
    calibration_steps: AtLeast0 = 0
    """Steps that the server trains L1..Ls end to end after averaging, on its own images (partition.server_share)."""
    dictionary: AtLeast0 = 0
    """FedCA: embeddings each client uploads; the next round's clients get all of them as further negatives."""
    base_steps: AtLeast0 = 0
    """FedCA, term base: steps that the server trains the base model on its own images before the first round."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The clients' AdamW; its state starts afresh each round."""

    batch_size: Annotated[int, Range(2, LARGEST)] = 512
    """Local batch size B; a client's last batch of an epoch may be shorter."""
    learning_rate: Positive = 1.5e-4
    """Base learning rate, scaled by batch_size / 256."""
    weight_decay: NonNegative = 1e-5
    """Decoupled weight decay."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Which protocols judge the encoder, and when."""

    labels_per_class: tuple[AtLeast0, ...] = (5, 20, 0)
    """Linear probes: labelled training images per class; 0 takes all of them."""
    draws: AtLeast1 = 5
    """Random label subsets averaged by each few-label probe."""
    neighbours: AtLeast0 = 20
    """kNN: neighbours that vote; 0 leaves kNN out."""
    every: AtLeast0 = 0
    """Evaluate every so many rounds as well as at each stage's end; 0: only there."""
    fine_tune_epochs: AtLeast0 = 0
    """Fine-tuning after the last round, all of the encoder with all labels: epochs (the paper: 40); 0 leaves it out."""
    fine_tune_warmup_epochs: AtLeast0 = 10
    """Fine-tuning: of these, epochs in which the learning rate rises; then it falls to 0 as a cosine."""
    fine_tune_learning_rate: Positive = 1e-3
    """Fine-tuning: AdamW's learning rate after the warm-up."""
    fine_tune_weight_decay: NonNegative = 1e-5
    """Fine-tuning: decoupled weight decay."""
    fine_tune_batch_size: AtLeast1 = 256
    """Fine-tuning: batch size."""


@dataclass(frozen=True)
class RuntimeConfig:
    """How the simulation runs; apart from seed and precision, results change by float rounding only."""

    seed: Seed = 0
    """Seed of everything random."""
    lanes: AtLeast0 = 0
    """Clients trained side by side over all devices, rounded up to a multiple of these; 0 chooses by device."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Type of the matrix products' factors; their sums, parameters, losses and averages are float32."""
    remat: bool = False
    """Keep only each trainable block's input and recompute it in the backward pass: less memory, more operations;
    on a CPU also a little faster."""
    feed: Literal["auto", "resident", "streamed"] = "auto"
    """resident: all images on the device; streamed: those of the next steps, while these run; auto: resident if they
    fit."""
    trackers: tuple[str, ...] = ()
    """Besides the work directory: tensorboard (event files in DIR/tensorboard), wandb (Weights & Biases)."""


@dataclass(frozen=True)
class FleetConfig:
    """The devices that the clients run on; without any, each client can do everything."""

    devices: tuple[str, ...] = ()
    """Each class as "NAME count=30 memory_gb=2 gflops=50 uplink_mbps=10 downlink_mbps=50 watts=3", the last four where
    known; or one path to a CSV file with these columns and name. Clients whose class cannot afford a stage take no
    part in it."""
    deadline_seconds: NonNegative = 0.0
    """A device that would need longer for a round of a stage takes no part in it either; 0: no deadline."""


@dataclass(frozen=True)
class Config:
    """One experiment."""

    data: DataConfig = field(default_factory=DataConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    additions: AdditionsConfig = field(default_factory=AdditionsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)

    @property
    def cpu_lanes(self) -> int:
        """Lanes of one CPU core. Products with weights of their own for each client pay there for ResNets only.

        See ``benchmarks/lanes.py`` and ``benchmarks/resnet.py``.
        """
        return 4 if isinstance(MODELS[self.model.name], ResNetSize) else 1

    @property
    def cohort_size(self) -> int:
        """Clients K drawn each round."""
        return self.federation.clients_per_round or self.partition.clients

    @property
    def learning_rate(self) -> float:
        """Learning rate the optimizer runs at: base * batch_size / 256."""
        return self.optimizer.learning_rate * self.optimizer.batch_size / 256


Entry = TypeVar("Entry")


def choose(field: str, name: str, entries: Mapping[str, Entry]) -> Entry:
    """The entry that a field names.

    Raises:
      ConfigError: there is none of that name.
    """
    if name not in entries:
        raise ConfigError(f"{field}: unknown {name!r}; accepted: {', '.join(entries)}")
    return entries[name]


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """``config`` with ``{"section.field": value}`` replaced; not validated beyond the names.

    Raises:
      ConfigError: no such section or field.
    """
    for name, value in changes.items():
        section, _, field_name = name.partition(".")
        part: Any = getattr(config, section, None)
        if field_name not in getattr(part, "__dataclass_fields__", {}):
            raise ConfigError(f"{name}: no such field; accepted: section.field as `train --help` lists them")
        part = dataclasses.replace(part, **{field_name: value})
        replaced: Any = {section: part}
        config = dataclasses.replace(config, **replaced)
    return config


def resolve(config: Config) -> Config:
    """Validate ``config``, fill in the named model's sizes, and put a CSV file's device classes in its place.

    Raises:
      ConfigError: a value is of the wrong type, outside its range or choices, or does
        not fit another field.
    """
    _check_fields(config)
    size = MODELS[config.model.name]._asdict()
    for name, unset in (("patch_size", 0), ("heads", 0), ("stem", "auto")):
        if name not in size and (value := getattr(config.model, name)) != unset:
            raise ConfigError(f"model.{name}: {config.model.name} has none, found {value!r}; accepted: leave it out")
    given = {k: getattr(config.model, k) for k in size}
    chosen = {k: default if given[k] in (0, "auto") else given[k] for k, default in size.items()}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **chosen))
    devices = tuple(map(fleet.describe, device_classes(config)))
    config = dataclasses.replace(config, fleet=dataclasses.replace(config.fleet, devices=devices))
    _check_together(config)
    return config


def device_classes(config: Config) -> list[fleet.DeviceClass]:
    """What ``fleet.devices`` describes.

    Raises:
      ConfigError: it does not, or the CSV file it names does not.
    """
    try:
        return fleet.load(config.fleet.devices)
    except ValueError as error:
        raise ConfigError(f"fleet.devices: {error}") from None


def load(name: str, config_dir: Path = CONFIG_DIR) -> Config:
    """The ``config`` object of ``config_dir/NAME.py``, or of the Python file ``name``; not yet resolved.

    Raises:
      ConfigError: no such config, the file does not run, or it defines no ``config``, or one with a value of the
        wrong type or outside its range or choices.
    """
    path = Path(name) if name.endswith(".py") else config_dir / f"{name}.py"
    known = [n for n, _ in available(config_dir)]
    if not os.path.isfile(path) or not (name.endswith(".py") or name in known):
        check_not_replaced(name, config_dir)
        close = difflib.get_close_matches(name, known, n=3)
        names = f", such as {', '.join(close)}" if close else ""
        raise ConfigError(f"CONFIG: no config {name!r}; accepted: a path to a .py file, or a name of `list`{names}")
    if name.startswith(f"{SWEEPS}/"):
        sweep = name.removeprefix(f"{SWEEPS}/")
        raise ConfigError(f"CONFIG: {name} is a sweep; accepted: a config's name (`sweep {sweep}` runs the sweep)")
    config = getattr(run_file(path, "CONFIG", "config"), "config", None)
    if not isinstance(config, Config):
        found = f"found {type(config).__name__}; accepted: `config = Config(...)`"
        raise ConfigError(f"CONFIG: {path} defines no config, {found}")
    _check_fields(config)  # before options override them: the parser trusts their types
    return config


def check_not_replaced(name: str, config_dir: Path) -> None:
    """Refuse the name, or the path, of a config that was removed.

    Raises:
      ConfigError: ``config_dir/replaced.csv`` says what replaces it.
    """
    table = config_dir / REPLACED
    for row in csv.DictReader(table.read_text().splitlines() if table.is_file() else ()):
        if f"/{name}".removesuffix(".py").endswith(f"/{row['removed']}"):
            raise ConfigError(f"CONFIG: {name} was replaced; accepted: {row['instead']}, or the sweep {row['sweep']}")


def run_file(path: Path, argument: str, what: str) -> types.ModuleType:
    """A Python file that is to define ``what``, run as a module.

    Raises:
      ConfigError: it does not run.
    """
    module = types.ModuleType("lwfedssl_config")
    module.__file__ = str(path)
    try:  # not by import, which would write and trust a __pycache__
        exec(compile(path.read_bytes(), path, "exec"), vars(module))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's own file: whatever it raises is bad input
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"{argument}: {path} does not run ({why}); accepted: a file that defines `{what}`") from error
    return module


def available(config_dir: Path = CONFIG_DIR) -> list[tuple[str, str]]:
    """``(name, first line of its docstring)`` of every config, and of every sweep, under ``config_dir``."""
    return [
        (
            path.relative_to(config_dir).with_suffix("").as_posix(),
            (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n")[0],
        )
        for path in sorted(config_dir.rglob("*.py"))
    ]


def digest(config: Config, code: str = "") -> str:
    """Eight hexadecimal digits that name a config, and the ``code`` that its run depends on besides (``WorkDir``)."""
    return hashlib.sha256((json.dumps(to_dict(config)) + code).encode()).hexdigest()[:8]


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain data, equal to what JSON gives back."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def _check_fields(config: Config) -> None:
    for name, value, hint in _fields_with_hints(config):
        _check_value(name, value, hint)


def _fields_with_hints(config: Config) -> Iterator[tuple[str, Any, Any]]:
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        if not dataclasses.is_dataclass(values) or type(values).__name__ != _section_type(section.name):
            raise ConfigError(f"{section.name}: {values!r} is not valid; accepted: {_section_type(section.name)}(...)")
        for name, hint in typing.get_type_hints(type(values), include_extras=True).items():
            yield f"{section.name}.{name}", getattr(values, name), hint


def _section_type(name: str) -> str:
    return typing.get_type_hints(Config)[name].__name__


def _check_value(name: str, value: Any, hint: Any) -> None:
    if get_origin(hint) is Annotated:
        kind, interval = get_args(hint)
        _check_value(name, value, kind)
        if value not in interval:
            raise ConfigError(f"{name}: {value!r} is out of range; accepted: {interval}")
    elif get_origin(hint) is Literal:
        if not isinstance(value, str) or value not in get_args(hint):
            raise ConfigError(f"{name}: unknown {value!r}; accepted: {', '.join(get_args(hint))}")
    elif get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            kind = (get_args(get_args(hint)[0]) or get_args(hint))[0].__name__
            raise ConfigError(f"{name}: {value!r} is not a tuple; accepted: a tuple of {kind}, such as ({value!r},)")
        for item in value:
            _check_value(name, item, get_args(hint)[0])
    else:
        accepted = (int, float) if hint is float else (hint,)
        infinite = isinstance(value, float) and not math.isfinite(value)
        if infinite or not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
            raise ConfigError(f"{name}: {value!r} is not valid; accepted: {hint.__name__}")
        if hint is float and abs(value) > LARGEST_FLOAT:
            raise ConfigError(f"{name}: {value!r} is out of range; accepted: at most {LARGEST_FLOAT} either way")


def _check_together(config: Config) -> None:
    data, model = config.data, config.model
    if isinstance(MODELS[model.name], ResNetSize):
        if model.depth > MODELS[model.name].depth:
            raise ConfigError(f"model.depth: {model.depth} is more than {model.name} has; accepted: 1 to 4")
    elif data.image_size % model.patch_size:
        raise ConfigError(
            f"model.patch_size: {model.patch_size} does not divide data.image_size {data.image_size}; "
            f"accepted: one of {', '.join(map(str, divisors(data.image_size)))}"
        )
    elif model.width % model.heads:
        raise ConfigError(
            f"model.heads: {model.heads} does not divide model.width {model.width}; "
            f"accepted: one of {', '.join(map(str, divisors(model.width)))}"
        )
    if data.name == "synthetic" and data.synthetic_examples < data.synthetic_classes:
        raise ConfigError(
            f"data.synthetic_examples: {data.synthetic_examples} cannot show all classes; "
            f"accepted: at least data.synthetic_classes {data.synthetic_classes}"
        )
    if config.strategy.layers_per_stage > model.depth:
        raise ConfigError(
            f"strategy.layers_per_stage: {config.strategy.layers_per_stage} is more than the encoder has; "
            f"accepted: 1 to model.depth {model.depth}"
        )
    if config.federation.clients_per_round > config.partition.clients:
        raise ConfigError(
            f"federation.clients_per_round: {config.federation.clients_per_round} is more than the "
            f"population; accepted: 0 to partition.clients {config.partition.clients}"
        )
    deadline, slow = config.fleet.deadline_seconds, [d.name for d in device_classes(config) if not d.has_speed]
    if deadline and (slow or not config.fleet.devices):
        found = f"{slow[0]!r} has not" if slow else "there is none"
        raise ConfigError(
            f"fleet.deadline_seconds: {deadline} needs classes in fleet.devices with gflops, uplink_mbps and "
            f"downlink_mbps, and {found}; accepted: 0.0, or classes that say them"
        )
    judge = config.evaluation
    if not (judge.labels_per_class or judge.neighbours or judge.fine_tune_epochs):
        raise ConfigError(
            "evaluation: no protocol is left; accepted: labels_per_class, neighbours or fine_tune_epochs above 0"
        )
    if 0 < judge.fine_tune_epochs <= judge.fine_tune_warmup_epochs:
        raise ConfigError(
            f"evaluation.fine_tune_warmup_epochs: {judge.fine_tune_warmup_epochs} leaves none of "
            f"evaluation.fine_tune_epochs {judge.fine_tune_epochs}; accepted: 0 to {judge.fine_tune_epochs - 1}"
        )


def divisors(n: int) -> list[int]:
    """In order, 1 and ``n`` among them."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
