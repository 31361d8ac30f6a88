"""The sections of a config as frozen dataclasses; a field's docstring is its help text on the command line."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from lwfedssl_jax.config.fields import (
    LARGEST,
    AtLeast0,
    AtLeast1,
    Fraction,
    NonNegative,
    OwnSeed,
    Positive,
    Range,
    Seed,
    Size,
    SizeOr0,
)
from lwfedssl_jax.config.model_sizes import MODELS


@dataclass(frozen=True)
class DataConfig:
    """The images."""

    name: str = "digits"
    """Data set: digits (comes with scikit-learn), synthetic (generated), fashion_mnist or fashion_mnist:PATH (idx
    files), tfds:NAME[/CONFIG] (tensorflow-datasets), npz:PATH (MedMNIST's format) or folder:PATH (images by class)."""
    image_size: Annotated[int, Range(1, 4096)] = 16
    """Height and width of all images in pixels; images of another size are resized once."""
    client_column: str = ""
    """tfds and folder only: the feature, or the column of clients.csv, that has the client of each image; by default
    client, client_id or user_id, if there is one."""
    views: str = "auto"
    """Augmentation recipe for the two views of an image: digits, natural or fashion; auto: the data set's own."""
    synthetic_examples: AtLeast1 = 2000
    """synthetic only: number of training images; a quarter of that number is generated for testing."""
    synthetic_classes: Annotated[int, Range(2, LARGEST)] = 10
    """synthetic only: number of classes."""


@dataclass(frozen=True)
class PartitionConfig:
    """How the images are distributed over clients."""

    kind: str = "iid"
    """iid: random shares; dirichlet: each class in shares drawn from Dirichlet(beta); shards: a few pieces per
    client of the images sorted by class (McMahan et al., 2017); quantity: random shares, of sizes drawn from
    Dirichlet(beta); natural: the data set's own clients; shared: every client draws its images from all of them, so
    that there may be any number of clients."""
    clients: AtLeast1 = 10
    """Number of clients; natural: if the data set has more, this number of them is drawn."""
    beta: Annotated[float, Range(1e-6)] = 0.5
    """dirichlet and quantity only: concentration of the Dirichlet distribution; smaller is more skewed."""
    shards_per_client: AtLeast1 = 2
    """shards only: pieces per client, each of one class or of two neighbouring ones."""
    allow_empty: bool = False
    """Let clients end up without images; these never report to the server."""
    examples_per_client: AtLeast1 = 100
    """shared only: images per client; their median if size_sigma is not 0."""
    size_sigma: Annotated[float, Range(0, 10)] = 0.0
    """shared and iid only: sigma of the log-normal distribution of images per client; 0 makes them equal."""
    server_share: Fraction = 0.0
    """Share of the training images, from 0 to 1, that the server holds without labels, for calibration or a base model.
    No client has them, even if the server does not use them, so that runs with and without can be compared."""


@dataclass(frozen=True)
class ModelConfig:
    """The encoder; a size of 0 stands for the named model's own."""

    name: str = "vit_tiny"
    """vit_micro (width 64, depth 6), vit_tiny (192, 12), vit_small (384, 12) or resnet18 (64, 4)."""
    patch_size: SizeOr0 = 0
    """vit only: height and width of a patch in pixels; 0: 4."""
    width: SizeOr0 = 0
    """Embedding width; resnet: channels of the first layer, which each later layer doubles."""
    depth: Annotated[int, Range(0, 4096)] = 0
    """Number of layers: transformer blocks; resnet: pairs of residual blocks, at most 4."""
    heads: SizeOr0 = 0
    """vit only: attention heads."""
    stem: Literal["auto", "imagenet", "small"] = "auto"
    """resnet only: first convolution, imagenet (7x7 with stride 2, then max pooling) or small (3x3); auto: imagenet."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The self-supervised objective and its projection and prediction heads."""

    name: str = "mocov3"
    """simclr, byol, mocov3, vicreg or mae (masked autoencoding; vit only)."""
    options: tuple[str, ...] = ()
    """Options that an objective has of its own, each as NAME=VALUE; by default, vicreg: invariance=25 variance=25
    covariance=1; mae: mask_ratio=0.75 normalised_pixels=1 decoder_depth=1 decoder_width=0 decoder_heads=0."""
    temperature: Positive = 0.05
    """Softmax temperature of simclr and mocov3; the others do not use it."""
    momentum: Fraction = 0.99
    """Momentum m of the target branch of byol and mocov3, target = m * target + (1 - m) * online; the others have
    none."""
    hidden_dim: Size = 512
    """Hidden width of the heads; mae has a decoder in their place."""
    output_dim: Size = 256
    """Output width of the heads; mae has a decoder in their place."""


@dataclass(frozen=True)
class StrategyConfig:
    """How the encoder is trained over the rounds."""

    name: str = "layerwise"
    """layerwise (LW-FedSSL), progressive (Prog-FedSSL) or end_to_end (FedSSL)."""
    layers_per_stage: AtLeast1 = 1
    """Layers that each stage adds; the last stage adds those that are left. end_to_end has one stage of all layers."""
    rounds_per_stage: tuple[AtLeast1, ...] = ()
    """Rounds of each stage, which add up to federation.rounds; if stages of several layers replace those of the list,
    their rounds are added up. Empty: as first_stage_share says."""
    first_stage_share: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Share of the rounds that the first of several stages lasts; the others share the rest evenly, and each stage has
    at least one round. 0: all stages evenly. strategy.rounds_per_stage takes its place; with strategy.pacing adaptive,
    it only plans costs."""
    pacing: Literal["fixed", "adaptive"] = "fixed"
    """fixed: stages last as long as the fields above say; adaptive: a stage ends when the clients' mean loss has almost
    stopped falling, and the last stage has all rounds that are left."""


@dataclass(frozen=True)
class FederationConfig:
    """The rounds, who takes part in them, and what the server does with the clients' models."""

    rounds: AtLeast1 = 180
    """Total number of rounds; strategy.rounds_per_stage and strategy.first_stage_share divide them into stages."""
    local_epochs: AtLeast1 = 3
    """Passes of a client over its own images per round."""
    clients_per_round: AtLeast0 = 0
    """Clients drawn per round; 0: all."""
    sampling: Literal["fixed", "poisson"] = "fixed"
    """fixed: clients_per_round different clients are drawn; poisson: each client by itself, so that there are
    clients_per_round on average."""
    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Probability that a drawn client does not report to the server."""
    compression: str = "none"
    """What clients upload of their updates: none (all, as float32), int8 (8 bits per parameter, rounded at random) or
    top=SHARE (the largest values, that share of them, with their positions)."""
    aggregator: str = "fedavg"
    """How the server combines the clients' models: fedavg, fedavgm, fedadam or ldawa."""
    server_learning_rate: NonNegative = 0.0
    """fedavgm and fedadam only: step size on the averaged change; 0: 1 for fedavgm, 0.01 for fedadam."""
    server_momentum: Annotated[float, Range(0, 1, below=True)] = 0.9
    """fedavgm only: momentum; fedadam only: decay of the first moment."""
    server_epsilon: Positive = 1e-3
    """fedadam only: added to the square root of the second moment."""
    client_start: str = "global"
    """What a client starts a round from: global (the global model), or a mix of it with a model that the client keeps
    between rounds, by fedu or fedema."""
    divergence: NonNegative = 0.0
    """fedu only: how far a client's last training may have moved its encoder for it to take the global predictor, 0:
    0.4; fedema only: the autoscaler's tau, 0: 0.7."""


@dataclass(frozen=True)
class AdditionsConfig:
    """Additions to the training in each stage; all off by default."""

    depth_dropout: Fraction = 0.0
    """Probability that a layer that an earlier stage has trained is skipped (Guo et al., 2023)."""
    depth_dropout_per: Literal["step", "round"] = "step"
    """depth_dropout only: step: each training step skips other layers; round: a client does without a layer for a whole
    round, and does not download, hold, train or upload it."""
    terms: tuple[str, ...] = ()
    """Further terms of the local loss, each as NAME=WEIGHT: proximal (FedProx), alignment (to the representations of
    the global model) or base (FedCA: to those of a base model that the server has trained)."""
    calibration_steps: AtLeast0 = 0
    """Steps per round in which the server trains all layers so far, on its own images (partition.server_share), after
    it has averaged the clients' models."""
    dictionary: AtLeast0 = 0
    """FedCA: of how many of its images, at most, each client uploads the embeddings per round; the next round's clients
    get all of them as further negatives. 0: none."""
    base_steps: AtLeast0 = 0
    """FedCA: steps in which the server trains the base model of the term base on its own images, before the first
    round."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The clients' AdamW, whose state starts anew in each round."""

    batch_size: Annotated[int, Range(2, LARGEST)] = 512
    """Local batch size; a client's last batch of an epoch may be smaller."""
    learning_rate: Positive = 1.5e-4
    """Base learning rate; the optimizer uses learning_rate * batch_size / 256."""
    weight_decay: NonNegative = 1e-5
    """Decoupled weight decay."""


@dataclass(frozen=True)
class EvaluationConfig:
    """The protocols that evaluate the encoder, and when."""

    labels_per_class: tuple[AtLeast0, ...] = (5, 20, 0)
    """Linear probes, one for each number: labelled training images per class; 0: all images."""
    draws: AtLeast1 = 5
    """Linear probes: random subsets of labelled images over which a probe is averaged."""
    neighbours: AtLeast0 = 20
    """kNN: neighbours that vote; 0: no kNN."""
    every: AtLeast0 = 0
    """Rounds between evaluations, in addition to those at the end of each stage; 0: only these."""
    labelled_split: Literal["train", "val"] = "train"
    """Whose labels linear probes, kNN and fine-tuning use: the images that the clients train on, or the validation
    split of the data set (MedMNIST in the paper)."""
    data: tuple[str, ...] = ()
    """Further data sets, named as in data.name, on which the encoder is also evaluated by all protocols. It is never
    trained on them, except in their own fine-tuning."""
    data_when: Literal["end", "always"] = "end"
    """When the encoder is evaluated on evaluation.data: end (untrained, and after the last round) or always (at each
    evaluation)."""
    membership: AtLeast0 = 0
    """Membership inference after the last round: how many images of clients are told from as many test images by the
    similarity of their views; 0: none."""
    fine_tune_epochs: AtLeast0 = 0
    """Fine-tuning of the whole encoder after the last round: epochs (in the paper 40); 0: none."""
    fine_tune_labels_per_class: tuple[AtLeast0, ...] = (0,)
    """Fine-tuning, once for each number: labelled training images per class, in evaluation.draws random subsets; 0: all
    images, once."""
    fine_tune_warmup_epochs: AtLeast0 = 10
    """Fine-tuning: epochs, of these, in which the learning rate rises; then it falls to 0 along a cosine."""
    fine_tune_learning_rate: Positive = 1e-3
    """Fine-tuning: AdamW's learning rate after the warm-up."""
    fine_tune_weight_decay: NonNegative = 1e-5
    """Fine-tuning: decoupled weight decay."""
    fine_tune_batch_size: AtLeast1 = 256
    """Fine-tuning: batch size."""


@dataclass(frozen=True)
class RuntimeConfig:
    """How the simulation runs; except for seeds and precision, this changes results by float rounding only."""

    seed: Seed = 0
    """Seed of all random numbers, except for those that have a seed of their own."""
    partition_seed: OwnSeed = -1
    """Seed of the partition: which images the server and each client have, and which client runs on which device; -1:
    runtime.seed."""
    init_seed: OwnSeed = -1
    """Seed of the initial weights; -1: runtime.seed."""
    lanes: AtLeast0 = 0
    """Clients that are trained side by side on all devices together, rounded up to a multiple of the number of devices;
    0: chosen by device."""
    precision: Literal["float32", "tensorfloat32", "bfloat16"] = "float32"
    """Type of what matrix products take and give, and of activations; sums, norms, softmax, parameters, losses and
    averages are float32.
    tensorfloat32 is TF32 on GPUs that have it, three bfloat16 products on TPUs, and float32 on CPUs."""
    remat: bool = False
    """Keep only the input of each trainable block and recompute the block in the backward pass: less memory, more
    operations; a little faster on a CPU."""
    feed: Literal["auto", "resident", "streamed"] = "auto"
    """resident: all images are on the device; streamed: those of the next steps are sent to it during the current ones;
    auto: resident if they fit."""
    trackers: tuple[str, ...] = ()
    """In addition to the work directory: tensorboard (event files in DIR/tensorboard) or wandb (Weights & Biases)."""


@dataclass(frozen=True)
class FleetConfig:
    """The devices that the clients run on; without any, every client can take part in every stage."""

    devices: tuple[str, ...] = ()
    """Classes of devices, each as "NAME count=30 memory_gb=2 gflops=50 uplink_mbps=10 downlink_mbps=50 watts=3", the
    last four if known, and baseline_gb=0.5 for the memory that the process needs before any model; or the path of a
    CSV file with a column name and these columns. Clients whose class does not have the memory for a stage do not take
    part in it."""
    deadline_seconds: NonNegative = 0.0
    """Devices that need longer for a round of a stage do not take part in that stage either; 0: no deadline."""


@dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of whole clients (DP-FedAvg): clipped updates, with noise on their sum; off by default."""

    clip: NonNegative = 0.0
    """Largest change of a client's model, as the root mean square over the parameters that a stage trains: an update of
    d parameters is scaled down to the L2 norm clip * sqrt(d). 0: no clipping, no noise, no privacy."""
    epsilon: NonNegative = 0.0
    """The epsilon of the whole run; the noise multiplier is found for it. 0: as noise_multiplier says."""
    noise_multiplier: NonNegative = 0.0
    """Standard deviation of the noise on the sum of the updates, in units of the norm to which these are clipped, at
    least 0.1. 0 without an epsilon: clipping only."""
    delta: Annotated[float, Range(0, 1, below=True)] = 0.0
    """The delta that epsilon belongs to, from 1e-12 to below one divided by the number of clients; 0: that number to
    the power -1.1."""
    quantile: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Share of the clients whose update should be within the clip, which is adapted to it in every round (Andrew et
    al., 2021), anew in each stage; 0: the clip is fixed."""
    count_noise: NonNegative = 0.0
    """quantile only: standard deviation, in clients, of the noise on the count of those within the clip; 0: a twentieth
    of the clients expected in a round. It must be more than half of the noise multiplier."""
    noise_cohort: AtLeast0 = 0
    """Clients per round of a larger federation, whose noise is added and whose epsilon is stated; its population is
    larger by the same factor, and the simulated clients stand for it. 0: the federation that is simulated."""
    secure_sum_bits: Annotated[int, Range(0, 24)] = 0
    """Bits of the whole numbers that clients upload in place of floats, as for a secure sum (simulated; there is no
    cryptography): they are added modulo 2 to this power, from 8. 0: floats."""
    canaries: Annotated[int, Range(0, 10_000)] = 0
    """Clients without images that audit the run: half of them upload random updates, and the other half tells how well
    these are found in the models; an even number, from 20. 0: none."""


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
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)

    @property
    def cpu_lanes(self) -> int:
        """Number of clients that each CPU core trains in parallel."""
        return MODELS[self.model.name].cpu_lanes

    @property
    def cohort_size(self) -> int:
        """Number K of clients drawn per round."""
        return self.federation.clients_per_round or self.partition.clients

    @property
    def partition_seed(self) -> int:
        """Seed of the partition."""
        return self.runtime.seed if self.runtime.partition_seed < 0 else self.runtime.partition_seed

    @property
    def init_seed(self) -> int:
        """Seed of the initial weights."""
        return self.runtime.seed if self.runtime.init_seed < 0 else self.runtime.init_seed

    @property
    def learning_rate(self) -> float:
        """Learning rate that the optimizer uses: base * batch_size / 256."""
        return self.optimizer.learning_rate * self.optimizer.batch_size / 256
