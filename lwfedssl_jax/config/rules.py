"""Rules between the fields of a config, each with the message for a config that breaks it."""

import dataclasses
import math
from collections.abc import Callable

from lwfedssl_jax.config.device_classes import load_classes
from lwfedssl_jax.config.model_sizes import MODELS
from lwfedssl_jax.config.sections import Config


def sizes_exist(config: Config) -> str | None:
    """Only the sizes that apply to the architecture can be set."""
    name, size = config.model.name, MODELS[config.model.name]
    for field in dataclasses.fields(config.model):
        value = getattr(config.model, field.name)
        if field.name != "name" and not hasattr(size, field.name) and value != field.default:
            return f"model.{field.name}: {value!r} does not apply to {name}; accepted: leave it out"
    return None


def depth_exists(config: Config) -> str | None:
    """The depth is at most the largest depth of the architecture."""
    name, depth, largest = config.model.name, config.model.depth, MODELS[config.model.name].max_depth
    if depth <= largest:
        return None
    return f"model.depth: {depth} is more than the largest depth of {name}; accepted: 1 to {largest}"


def patches_fill_image(config: Config) -> str | None:
    """The patch size, if there is one, divides the image size."""
    return _indivisible("model.patch_size", config.model.patch_size, "data.image_size", config.data.image_size)


def heads_divide_width(config: Config) -> str | None:
    """The number of attention heads, if there are any, divides the width."""
    return _indivisible("model.heads", config.model.heads, "model.width", config.model.width)


def classes_have_examples(config: Config) -> str | None:
    """Generated data has at least one image per class."""
    data = config.data
    if data.name != "synthetic" or data.synthetic_examples >= data.synthetic_classes:
        return None
    return (
        f"data.synthetic_examples: {data.synthetic_examples} is too few to cover all classes; "
        f"accepted: at least data.synthetic_classes {data.synthetic_classes}"
    )


def layers_per_stage_exist(config: Config) -> str | None:
    """A stage adds at most as many layers as the encoder has."""
    layers, depth = config.strategy.layers_per_stage, config.model.depth
    if layers <= depth:
        return None
    return f"strategy.layers_per_stage: {layers} is more than model.depth; accepted: 1 to model.depth {depth}"


def rounds_add_up(config: Config) -> str | None:
    """The stages' rounds, if they are listed, add up, and stages really last as long."""
    strategy, total = config.strategy, config.federation.rounds
    if not strategy.rounds_per_stage:
        return None
    if strategy.pacing == "adaptive":
        return (
            f"strategy.pacing: adaptive does not use strategy.rounds_per_stage {strategy.rounds_per_stage}; "
            "accepted: fixed, or strategy.rounds_per_stage ()"
        )
    if (listed := sum(strategy.rounds_per_stage)) == total:
        return None
    return (
        f"strategy.rounds_per_stage: {strategy.rounds_per_stage} adds up to {listed}; "
        f"accepted: numbers that add up to federation.rounds {total}"
    )


def cohort_within_population(config: Config) -> str | None:
    """A round draws at most as many clients as the population has."""
    drawn, clients = config.federation.clients_per_round, config.partition.clients
    if drawn <= clients:
        return None
    return (
        f"federation.clients_per_round: {drawn} is more than the number of clients; "
        f"accepted: 0 to partition.clients {clients}"
    )


def deadline_has_speeds(config: Config) -> str | None:
    """A deadline needs device classes whose speeds are known."""
    classes = load_classes(config.fleet.devices)
    slow = [device.name for device in classes if not device.has_speed]
    if not config.fleet.deadline_seconds or (classes and not slow):
        return None
    found = f"{slow[0]!r} does not have all of them" if slow else "there are no classes"
    return (
        f"fleet.deadline_seconds: {config.fleet.deadline_seconds} needs classes in fleet.devices with gflops, "
        f"uplink_mbps and downlink_mbps, and {found}; accepted: 0.0, or classes that have them"
    )


def a_protocol_is_left(config: Config) -> str | None:
    """At least one protocol evaluates the encoder."""
    evaluation = config.evaluation
    if evaluation.labels_per_class or evaluation.neighbours or evaluation.fine_tune_epochs:
        return None
    return "evaluation: every protocol is disabled; accepted: labels_per_class, neighbours or fine_tune_epochs above 0"


def labels_are_different(config: Config) -> str | None:
    """Numbers of labels are listed once."""
    for field in ("labels_per_class", "fine_tune_labels_per_class"):
        numbers = getattr(config.evaluation, field)
        if twice := [number for i, number in enumerate(numbers) if number in numbers[:i]]:
            return f"evaluation.{field}: {twice[0]} appears twice in {numbers}; accepted: each number once"
    return None


def fine_tuning_has_labels(config: Config) -> str | None:
    """Fine-tuning, if enabled, is done with some number of labels, and otherwise with none that are asked for."""
    evaluation = config.evaluation
    labels, usual = evaluation.fine_tune_labels_per_class, type(evaluation)().fine_tune_labels_per_class
    if evaluation.fine_tune_epochs:
        accepted = "such as (5, 0), or fine_tune_epochs 0"
        return None if labels else f"evaluation.fine_tune_labels_per_class: () has no number; accepted: {accepted}"
    if labels == usual:
        return None
    return (
        f"evaluation.fine_tune_labels_per_class: {labels} is set, and evaluation.fine_tune_epochs is 0; "
        "accepted: fine_tune_epochs above 0 with it"
    )


def further_data_differ(config: Config) -> str | None:
    """Data sets of evaluation.data are named once, and are not the data set of the clients."""
    names = config.evaluation.data
    for number, name in enumerate(names):
        if name == config.data.name or name in names[:number]:
            where = "is data.name" if name == config.data.name else "appears twice"
            return f"evaluation.data: {name!r} {where}; accepted: other data sets, each once"
    return None


def warmup_ends(config: Config) -> str | None:
    """Fine-tuning, if enabled, lasts longer than its warm-up."""
    warmup, epochs = config.evaluation.fine_tune_warmup_epochs, config.evaluation.fine_tune_epochs
    if not 0 < epochs <= warmup:
        return None
    return (
        f"evaluation.fine_tune_warmup_epochs: {warmup} is not below evaluation.fine_tune_epochs {epochs}; "
        f"accepted: 0 to {epochs - 1}"
    )


LEAST_DELTA = 1e-12  # for smaller ones, the accountant's float64 is too coarse
SECURE_RANGE = 8  # of a sum of whole numbers, in sums of all clients' root mean squares
LEAST_NOISE = 0.1  # for less, epsilon is in the hundreds and takes minutes to compute


def noise_needs_a_clip(config: Config) -> str | None:
    """Without a clip, there is no noise, and nothing that describes it."""
    fields = (
        "epsilon",
        "noise_multiplier",
        "delta",
        "quantile",
        "count_noise",
        "noise_cohort",
        "secure_sum_bits",
        "canaries",
    )
    privacy = config.privacy
    if privacy.clip or not (found := [name for name in fields if getattr(privacy, name)]):
        return None
    return (
        f"privacy.{found[0]}: {getattr(privacy, found[0])} needs privacy.clip, which is 0; "
        f"accepted: privacy.clip above 0 (such as 0.01), or privacy.{found[0]} 0"
    )


def promise_needs_noise(config: Config) -> str | None:
    """Without noise, nothing is promised, and there is nothing that describes the promise."""
    fields, privacy = ("delta", "count_noise", "noise_cohort"), config.privacy
    found = next((name for name in fields if getattr(privacy, name)), "")
    if not found or privacy.epsilon or privacy.noise_multiplier:
        return None
    return (
        f"privacy.{found}: {getattr(privacy, found)} is set, and there is no noise; "
        f"accepted: 0, or privacy.epsilon or privacy.noise_multiplier with it"
    )


def noise_is_enough(config: Config) -> str | None:
    """Noise has a multiplier for which epsilon can be computed, and someone it hides."""
    privacy, clients = config.privacy, config.partition.clients
    if 0 < privacy.noise_multiplier < LEAST_NOISE:
        return (
            f"privacy.noise_multiplier: {privacy.noise_multiplier} is less than protects anyone; "
            f"accepted: 0.0, or at least {LEAST_NOISE}"
        )
    if (privacy.epsilon or privacy.noise_multiplier) and clients < 2:
        return f"partition.clients: {clients} client cannot be hidden among others; accepted: at least 2, or no noise"
    return None


def noise_is_stated_once(config: Config) -> str | None:
    """Either the epsilon or the noise multiplier is given."""
    privacy = config.privacy
    if not (privacy.epsilon and privacy.noise_multiplier):
        return None
    return (
        f"privacy.epsilon: {privacy.epsilon} and privacy.noise_multiplier {privacy.noise_multiplier} are both set; "
        "accepted: one of them"
    )


def larger_federation_is_larger(config: Config) -> str | None:
    """The cohort that a run stands for is at least its own."""
    cohort = config.privacy.noise_cohort
    if not 0 < cohort < config.cohort_size:
        return None
    accepted = f"0, or at least {config.cohort_size}"
    return f"privacy.noise_cohort: {cohort} is fewer than the clients per round; accepted: {accepted}"


def delta_is_small(config: Config) -> str | None:
    """Delta is below one divided by the number of clients, or a client may be published, and not below rounding."""
    delta, cohort = config.privacy.delta, config.privacy.noise_cohort or config.cohort_size
    population = config.partition.clients * cohort / config.cohort_size
    if not delta or LEAST_DELTA <= delta < 1 / population:
        return None
    return (
        f"privacy.delta: {delta} is not between {LEAST_DELTA} and 1 / {population:,.0f} clients; "
        f"accepted: 0, or {LEAST_DELTA} to less than {1 / population:.3g}"
    )


def count_noise_is_used(config: Config) -> str | None:
    """The noise on the count belongs to an adapted clip."""
    if not config.privacy.count_noise or config.privacy.quantile:
        return None
    return (
        f"privacy.count_noise: {config.privacy.count_noise} is set, and privacy.quantile is 0; "
        "accepted: privacy.quantile above 0 with it"
    )


def secure_sums_have_room(config: Config) -> str | None:
    """Whole numbers have enough bits for the clip, and are not compressed further."""
    bits, compression = config.privacy.secure_sum_bits, config.federation.compression
    if not bits:
        return None
    if compression != "none":
        return (
            f"federation.compression: {compression} does not go with privacy.secure_sum_bits {bits}, whose whole "
            "numbers must all be sent; accepted: none, or privacy.secure_sum_bits 0"
        )
    least = next(b for b in range(8, 64) if 2**b >= 4 * 2 * SECURE_RANGE * config.cohort_size)
    if bits >= least:
        return None
    accepted = f"0, or {least} to 24" if least <= 24 else "0, or fewer federation.clients_per_round"
    return (
        f"privacy.secure_sum_bits: {bits} are too few for a sum of {config.cohort_size} clients; accepted: {accepted}"
    )


def members_have_owners(config: Config) -> str | None:
    """Membership inference needs images that clients own by themselves."""
    count = config.evaluation.membership
    if not count or config.partition.kind != "shared":
        return None
    return (
        f"evaluation.membership: {count} images need owners, and with partition.kind shared many clients own an image; "
        "accepted: 0, or another partition.kind"
    )


def canaries_are_halved(config: Config) -> str | None:
    """Half of the canaries are in the population, and each half is enough for its spread to be known."""
    number, cohort = config.privacy.canaries, config.privacy.noise_cohort
    if number and cohort > config.cohort_size:
        return (
            f"privacy.canaries: {number} would audit the simulated federation, and with privacy.noise_cohort {cohort} "
            "the promise is that of another; accepted: 0, or privacy.noise_cohort 0"
        )
    if not number or (number >= 20 and number % 2 == 0):
        return None
    return f"privacy.canaries: {number} cannot be compared in two halves; accepted: 0, or an even number from 20"


RULES: tuple[Callable[[Config], str | None], ...] = (
    sizes_exist,
    depth_exists,
    patches_fill_image,
    heads_divide_width,
    classes_have_examples,
    layers_per_stage_exist,
    rounds_add_up,
    cohort_within_population,
    deadline_has_speeds,
    a_protocol_is_left,
    labels_are_different,
    fine_tuning_has_labels,
    further_data_differ,
    warmup_ends,
    noise_needs_a_clip,
    promise_needs_noise,
    noise_is_enough,
    noise_is_stated_once,
    larger_federation_is_larger,
    delta_is_small,
    count_noise_is_used,
    secure_sums_have_room,
    canaries_are_halved,
    members_have_owners,
)


def divisors(n: int) -> list[int]:
    """Return the divisors of ``n`` in order, including 1 and ``n``."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def _indivisible(field: str, value: int, whole_field: str, whole: int) -> str | None:
    """Return an error message if ``value`` is not 0 and does not divide ``whole``."""
    if not value or whole % value == 0:
        return None
    accepted = ", ".join(map(str, divisors(whole)))
    return f"{field}: {value} does not divide {whole_field} {whole}; accepted: one of {accepted}"
