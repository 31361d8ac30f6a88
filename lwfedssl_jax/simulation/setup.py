"""Prepares a run from its config: data, clients, task, stages, lanes; nothing is compiled."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from lwfedssl_jax.config import Config, ConfigError, DataConfig, override
from lwfedssl_jax.costs import accountant
from lwfedssl_jax.costs.fleet import Fleet
from lwfedssl_jax.data import sources
from lwfedssl_jax.data.fingerprint import fingerprint
from lwfedssl_jax.data.partition import Population, partition, server_examples
from lwfedssl_jax.data.sources import Dataset
from lwfedssl_jax.method.aggregation import Aggregator, make_aggregator
from lwfedssl_jax.method.canaries import with_canaries
from lwfedssl_jax.method.checks import check_method
from lwfedssl_jax.method.client import ClientStart
from lwfedssl_jax.method.compression import make_compression
from lwfedssl_jax.method.exchange import Exchange
from lwfedssl_jax.method.fedca import dictionary_bytes, has_base, make_exchange
from lwfedssl_jax.method.privacy import private
from lwfedssl_jax.method.stages import Stage, make_stages
from lwfedssl_jax.method.stateful_clients import make_client_start
from lwfedssl_jax.method.task import Hyper, Task, init_params, make_task, param_layers
from lwfedssl_jax.simulation.events import Hear, Loading, Note, ignore
from lwfedssl_jax.simulation.lanes import SAMPLES_AT_ONCE, lanes_and_mesh
from lwfedssl_jax.simulation.rounds import LANES, Method
from lwfedssl_jax.system import seeds
from lwfedssl_jax.system.devices import from_first, memory_limit
from lwfedssl_jax.tree import Tree

GIB = 2**30
RESIDENT_SHARE = 0.25  # share of a device's memory that the images may take; beyond it they are streamed

Made = TypeVar("Made")


class Prepared(NamedTuple):
    """A config and all that is derived from it before anything is compiled.

    Attributes:
      batch: number of samples per step and lane, including padding (``needed_batch``).
    """

    config: Config
    dataset: Dataset
    fingerprint: dict[str, str]
    clients: Population
    server_images: np.ndarray
    task: Task
    layers: Tree
    stages: list[Stage]
    lanes: int
    mesh: Mesh
    batch: int
    aggregator: Aggregator
    start: ClientStart
    exchange: Exchange
    fleet: Fleet | None = None
    noise_multiplier: float = 0.0

    @property
    def method(self) -> Method:
        """All static parts of a round."""
        compression = make_compression(self.config)
        return Method(self.task, self.aggregator, self.start, self.exchange, compression, self.mesh)

    @property
    def hyper(self) -> Hyper:
        """The run's hyperparameters as host arrays, which are arguments of its programs."""
        as_array = functools.partial(np.asarray, dtype=self.task.dtype)
        return jax.tree.map(as_array, self.task.hyper)

    @property
    def keeps_clients(self) -> bool:
        """Whether clients keep a model between rounds."""
        return self.start.empty_memory is not None


class Cache:
    """What the runs of a process share and make only once: data sets, programs, ledgers."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return what ``make`` returned for the key, calling it only the first time."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def get_latest(self, kind: str, key: Hashable, make: Callable[[], Made]) -> Made:
        """As ``get``, but keep only the latest value of a kind, for large values."""
        if self._made.get(kind, (None,))[0] != key:
            self._made.pop(kind, None)  # before the next one is made
            self._made[kind] = key, make()
        made: Made = self._made[kind][1]
        return made


def prepare(
    config: Config,
    devices: Sequence[Any] | None = None,
    hear: Hear = ignore,
    cache: Cache | None = None,
) -> Prepared:
    """Load the data, partition it, and lay out the stages; nothing is compiled.

    Args:
      config: resolved.
      devices: to be used; by default all.
      hear: called with the progress of loading the data.
      cache: shared with other runs of this process.

    Raises:
      ConfigError: the data set is not installed or does not fit the partition, or parts of the config are
        incompatible; the server's images do not fit on a device.
    """
    check_method(config)
    parts = parts_of(config)
    dataset, data = load_data(config.data, hear, cache or Cache())
    labels, seed = dataset.train_labels, config.partition_seed
    lanes, mesh = lanes_and_mesh(config, LANES, devices)
    clients = partition(config.partition, labels, seed, dataset.train_clients)
    hear_short_batches(config, clients.sizes, parts.task.objective.fewest, hear)
    held_by_server = server_examples(config.partition, labels, seed)
    check_dictionary(config, memory_limit(mesh))
    check_server_images(config, len(held_by_server) * dataset.train_images[0].nbytes, memory_limit(mesh))
    server_images = dataset.train_images[held_by_server]
    run = lay_out(config, parts, dataset, clients, lanes, mesh)
    run = run._replace(fingerprint=data, server_images=server_images, batch=needed_batch(config, clients.sizes))
    return run if config.fleet.devices else with_noise(run, hear)  # that depends on what the fleet can do


class Parts(NamedTuple):
    """What follows from a config alone: its task, the layer number of every parameter, and its stages."""

    task: Task
    layers: Tree
    stages: list[Stage]


def parts_of(config: Config) -> Parts:
    """Make the parts of a (resolved) config that need no data.

    Raises:
      ConfigError: parts of the config are incompatible.
    """
    task = make_task(config)
    layers = param_layers(task, jax.eval_shape(lambda: init_params(task, jax.random.key(0))))
    return Parts(task, layers, make_stages(config, layers))


def lay_out(config: Config, parts: Parts, dataset: Dataset, clients: Population, lanes: int, mesh: Mesh) -> Prepared:
    """Put a run over given clients together; neither data nor what they have is checked."""
    return Prepared(
        config=config,
        dataset=dataset,
        fingerprint={},
        clients=clients,
        server_images=dataset.train_images[:0],
        **parts._asdict(),
        lanes=lanes,
        mesh=mesh,
        batch=config.optimizer.batch_size,
        aggregator=with_canaries(private(make_aggregator(config), config), config),
        start=make_client_start(config, parts.task, parts.stages[0]),
        exchange=make_exchange(config, parts.task),
    )


def with_noise(run: Prepared, hear: Hear) -> Prepared:
    """Return a prepared run with the noise of its differential privacy, if it has any.

    Raises:
      ConfigError: there is no noise for its epsilon.
    """
    if not run.config.privacy.clip:
        return run
    if run.config.privacy.epsilon:
        hear(Loading(f"finding the noise for epsilon {run.config.privacy.epsilon:g}"))
    multiplier = float(from_first(np.float64(accountant.noise_multiplier(run.config, run.stages, run.fleet))))
    hyper = run.task.hyper._replace(mechanism=accountant.mechanism(run.config, multiplier))
    return run._replace(noise_multiplier=multiplier, task=run.task._replace(hyper=hyper))


def load_data(config: DataConfig, hear: Hear, cache: Cache) -> tuple[Dataset, dict[str, str]]:
    """Load the data set that a config names; return it and its fingerprint.

    Raises:
      ConfigError: it cannot be found or used.
    """

    def load() -> tuple[Dataset, dict[str, str]]:
        source = sources.find(config)
        dataset = source.load(config, lambda what: hear(Loading(what)), lambda text: hear(Note(text)))
        return dataset, fingerprint(dataset)

    return cache.get_latest("data", config, load)


def needed_batch(config: Config, sizes_N: np.ndarray) -> int:
    """Return the number of samples per step and lane: a batch or, if no client fills one, those of the largest client.

    The latter is rounded up to 1 to 8, or to these times a power of two, but not above a batch, so that runs whose
    largest clients differ slightly share their programs. FedCA's base term draws as many public images as there are
    samples in a step, and therefore keeps whole batches.
    """
    if has_base(config):
        return config.optimizer.batch_size
    largest = int(sizes_N.max(initial=1))
    unit = 1 << max((largest - 1).bit_length() - 3, 0)
    return min(config.optimizer.batch_size, -(-largest // unit) * unit)


def with_full_batch(run: Prepared) -> Prepared:
    """Return a run whose steps hold a whole batch, like those of a pilot's devices, which do not know each other."""
    return run._replace(batch=run.config.optimizer.batch_size)


def hear_short_batches(config: Config, sizes_N: np.ndarray, fewest: int, hear: Hear) -> None:
    """Tell how many clients have a last batch, or images, of fewer than the objective learns from: it is left out.

    Raises:
      ConfigError: no client has enough images.
    """
    few, batch_size = sizes_N < fewest, config.optimizer.batch_size
    if few.all():
        is_shared = config.partition.kind == "shared"
        enough = "a larger partition.examples_per_client" if is_shared else "fewer clients, or more images"
        raise ConfigError(
            f"partition.clients: none of {len(sizes_N)} clients has the {fewest} images that objective.name "
            f"{config.objective.name} learns from; accepted: {enough}"
        )
    if none := int((few & (sizes_N > 0)).sum()):
        hear(Note(f"{none} of {len(sizes_N)} clients have fewer than {fewest} images, and do not train"))
    rest = sizes_N % batch_size
    if short := int(((rest > 0) & (rest < fewest) & ~few).sum()):
        text = (
            f"{short} of {len(sizes_N)} clients leave out the last batch of each epoch, of fewer than {fewest} images"
        )
        hear(Note(f"{text} (optimizer.batch_size {batch_size}); each epoch leaves out other images"))


def check_dictionary(config: Config, limit: int) -> None:
    """Refuse a dictionary of FedCA that does not fit on a device with ``limit`` bytes.

    Raises:
      ConfigError: it is larger.
    """
    (size, _), room, count = dictionary_bytes(config), int(RESIDENT_SHARE * limit), config.additions.dictionary
    if size > room:
        raise ConfigError(
            f"additions.dictionary: {count} embeddings of {config.cohort_size} clients take {size / GIB:.3g} GiB, and "
            f"{room / GIB:.3g} GiB of a device are available for them; accepted: at most {count * room // size}"
        )


def check_server_images(config: Config, size: int, limit: int) -> None:
    """Refuse more images on the server than fit on a device with ``limit`` bytes.

    Raises:
      ConfigError: there are more.
    """
    room, share = int(RESIDENT_SHARE * limit), config.partition.server_share
    if size > room:
        raise ConfigError(
            f"partition.server_share: {share} gives the server {size / GIB:.3g} GiB of images, "
            f"and {room / GIB:.3g} GiB of a device are available for them; accepted: at most {share * room / size:.2g}"
        )


def can_stack(config: Config) -> bool:
    """Return whether runs of a config can be stacked.

    The server does not train, clients do not keep models or upload embeddings, and all runs have the same stages.
    """
    more = config.additions.calibration_steps or config.additions.base_steps or config.additions.dictionary
    same_stages = config.strategy.pacing == "fixed"
    return not more and same_stages and config.federation.client_start == "global" and jax.process_count() == 1


def stack_size(config: Config) -> int:
    """Return how many runs to stack: on accelerators, as many as fill the device with samples; elsewhere one."""
    lanes, mesh = lanes_and_mesh(config, LANES)
    if mesh.devices.flat[0].platform == "cpu" or not can_stack(config):
        return 1
    return max(1, SAMPLES_AT_ONCE * mesh.size // (lanes * config.optimizer.batch_size))


def with_fewer_lanes(run: Prepared, needed: int, limit: int) -> Prepared:
    """Reduce the lanes of a run to as many as should fit, if a program needs more bytes than a device has.

    Raises:
      ConfigError: the user has asked for this number of lanes, or there is only one.
    """
    fit = min(run.lanes - 1, run.lanes * limit // needed)
    # Fewer CPU devices leave each more of the machine's memory; otherwise every device keeps a lane.
    fewer_devices = run.mesh.devices.flat[0].platform == "cpu" and jax.process_count() == 1
    if fit >= run.mesh.size or not fewer_devices:
        fit = fit // run.mesh.size * run.mesh.size
    if fit and not run.config.runtime.lanes:
        lanes, mesh = lanes_and_mesh(override(run.config, {"runtime.lanes": fit}), LANES, list(run.mesh.devices.flat))
        return run._replace(lanes=lanes, mesh=mesh)
    fewer = f"at most about {fit} lanes, " if fit else ""
    raise ConfigError(
        f"runtime.lanes: {run.lanes} need {needed / GIB:.3g} GiB on each device, which has {limit / GIB:.3g} GiB; "
        f"accepted: {fewer}a smaller optimizer.batch_size, runtime.remat True, or runtime.precision bfloat16"
    )


def check_finite(config: Config, what: str, number: int, values: Any) -> None:
    """Raise ``not_finite`` unless all values are finite."""
    if not np.isfinite(values).all():
        raise not_finite(config, what, number)


def not_finite(config: Config, what: str, number: int) -> FloatingPointError:
    """Make an error that states what to lower."""
    return FloatingPointError(
        f"{what} in round {number}; lower optimizer.learning_rate ({config.optimizer.learning_rate}) "
        f"or raise objective.temperature ({config.objective.temperature})"
    )


def initial_params(run: Prepared) -> Tree:
    """Initialise the parameters of all layers from the seed; a layer keeps them until its stage begins."""
    key = seeds.key(run.config.init_seed, seeds.KeyTag.INIT)
    return jax.jit(functools.partial(init_params, run.task))(key)
