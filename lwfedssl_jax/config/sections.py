"""The sections of a config as frozen dataclasses; a field's docstring is its help text on the command line."""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from lwfedssl_jax.config.fields import (
    LARGEST,
    AtLeast0,
    AtLeast1,
    Fraction,
    NonNegative,
    Positive,
    Range,
    Seed,
    Size,
    SizeOr0,
    check_value,
)
from lwfedssl_jax.config.model_sizes import MODELS
from lwfedssl_jax.system.errors import ConfigError


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
    views: str = "auto"
    """Augmentation recipe: digits, natural or fashion; auto takes the data set's own."""
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
    """Clients in the population; natural: this number of the data set's clients, drawn if there are more."""
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

    name: str = "vit_tiny"
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
    """Rounds between evaluations, in addition to those at each stage's end; 0: only there."""
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
        """Clients that each CPU core trains side by side."""
        return MODELS[self.model.name].cpu_lanes

    @property
    def cohort_size(self) -> int:
        """Clients K drawn each round."""
        return self.federation.clients_per_round or self.partition.clients

    @property
    def learning_rate(self) -> float:
        """Learning rate the optimizer runs at: base * batch_size / 256."""
        return self.optimizer.learning_rate * self.optimizer.batch_size / 256


def check_fields(config: Config) -> None:
    """Refuse values that do not have the type, range or choices of their fields.

    Raises:
      ConfigError: naming the field, the value and what is accepted.
    """
    for name, value, hint in _fields_with_hints(config):
        check_value(name, value, hint)


def _fields_with_hints(config: Config) -> Iterator[tuple[str, Any, Any]]:
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        if not dataclasses.is_dataclass(values) or type(values).__name__ != _section_type(section.name):
            raise ConfigError(f"{section.name}: {values!r} is not valid; accepted: {_section_type(section.name)}(...)")
        for name, hint in typing.get_type_hints(type(values), include_extras=True).items():
            yield f"{section.name}.{name}", getattr(values, name), hint


def _section_type(name: str) -> str:
    return typing.get_type_hints(Config)[name].__name__
