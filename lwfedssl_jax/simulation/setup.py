"""From a config to a prepared run: data, clients, task, stages, lanes; nothing is compiled."""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from lwfedssl_jax.config import Config, ConfigError, override
from lwfedssl_jax.costs.fleet import Fleet
from lwfedssl_jax.data import sources
from lwfedssl_jax.data.partition import Population, partition, server_examples
from lwfedssl_jax.data.sources import Dataset
from lwfedssl_jax.method.aggregation import Aggregator, make_aggregator
from lwfedssl_jax.method.checks import check
from lwfedssl_jax.method.stages import Stage, make_stages
from lwfedssl_jax.method.stateful_clients import ClientStart, Memory, empty_memory, make_start
from lwfedssl_jax.method.task import Task, init_params, make_task, param_layers
from lwfedssl_jax.simulation.events import Listener
from lwfedssl_jax.simulation.lanes import SAMPLES_AT_ONCE, lanes_and_mesh
from lwfedssl_jax.simulation.rounds import LANES
from lwfedssl_jax.system.devices import memory_limit
from lwfedssl_jax.system.seeds import INIT_STREAM, stream_key
from lwfedssl_jax.tree import Tree

GIB = 2**30
RESIDENT_SHARE = 0.25  # of a device's memory that the images may take before they are streamed

Made = TypeVar("Made")


class Prepared(NamedTuple):
    """A config and all that is derived from it before anything is compiled."""

    config: Config
    dataset: Dataset
    clients: Population
    server_images: np.ndarray
    task: Task
    layers: Tree
    stages: list[Stage]
    lanes: int
    mesh: Mesh
    aggregator: Aggregator
    start: ClientStart | None
    no_memory: Memory | None
    fleet: Fleet | None = None


class Cache:
    """What the runs of a process have in common, made once: data sets, programs, ledgers."""

    def __init__(self) -> None:
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What ``make`` gave when the key was new."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    def latest(self, kind: str, key: Hashable, make: Callable[[], Made]) -> Made:
        """As ``once``, but of what is large only the last is kept."""
        if self._made.get(kind, (None,))[0] != key:
            self._made.pop(kind, None)  # before the next one is made
            self._made[kind] = key, make()
        made: Made = self._made[kind][1]
        return made


def prepare(
    config: Config,
    devices: Sequence[Any] | None = None,
    listener: Listener | None = None,
    shared: Cache | None = None,
) -> Prepared:
    """Load the data, deal it out, lay out the stages; nothing is compiled.

    Args:
      config: resolved.
      devices: to be used; by default all.
      listener: hears how the data is loaded.
      shared: with other runs of this process.

    Raises:
      ConfigError: the data set is not installed or does not serve the partition or a protocol, or
        parts of the config do not go together; the server's images do not fit a device.
    """
    listener, shared = listener or Listener(), shared or Cache()
    check(config)
    task = make_task(config)
    layers = param_layers(task, jax.eval_shape(lambda: init_params(task, jax.random.key(0))))
    stages = make_stages(config, layers)
    aggregator, start = make_aggregator(config), make_start(config, task)
    load = lambda: sources.find(config.data).load(config.data, listener.loading, listener.note)  # noqa: E731
    dataset = shared.latest("data", config.data, load)
    of_server = server_examples(config.partition, dataset.train_labels, config.runtime.seed)
    clients = partition(config.partition, dataset.train_labels, config.runtime.seed, dataset.train_clients)
    lanes, mesh = lanes_and_mesh(config, LANES, devices)
    size, room = len(of_server) * dataset.train_images[0].nbytes, int(RESIDENT_SHARE * memory_limit(mesh))
    if size > room:  # they stay on the device
        raise ConfigError(
            f"partition.server_share: {config.partition.server_share} gives the server {size / GIB:.3g} GiB of images, "
            f"and {room / GIB:.3g} GiB of a device are for them; "
            f"accepted: at most {config.partition.server_share * room / size:.2g}"
        )
    return Prepared(
        config,
        dataset,
        clients,
        dataset.train_images[of_server],
        task,
        layers,
        stages,
        lanes,
        mesh,
        aggregator,
        start,
        empty_memory(task, stages[0]) if start else None,
    )


def can_stack(config: Config) -> bool:
    """Whether runs of a config can be one program: nothing of theirs is kept or trained between rounds by itself."""
    alone = config.additions.calibration_steps or config.additions.base_steps
    return not alone and config.federation.client_start == "global" and jax.process_count() == 1


def stack_size(config: Config) -> int:
    """How many runs pay off side by side: on accelerators as many as fill one with samples, elsewhere one."""
    lanes, mesh = lanes_and_mesh(config, LANES)
    if mesh.devices.flat[0].platform == "cpu" or not can_stack(config):
        return 1
    return max(1, SAMPLES_AT_ONCE * mesh.size // (lanes * config.optimizer.batch_size))


def with_fewer_lanes(run: Prepared, needed: int, limit: int) -> Prepared:
    """The run with lanes that should fit, where a program needs more bytes on a device than there are.

    Raises:
      ConfigError: the user has asked for so many, or there is one only.
    """
    fit = min(run.lanes - 1, run.lanes * limit // needed)
    # Fewer CPU devices leave each more of the machine's memory; else every device keeps a lane.
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
    """An error that says what to lower."""
    return FloatingPointError(
        f"{what} in round {number}; lower optimizer.learning_rate ({config.optimizer.learning_rate}) "
        f"or raise objective.temperature ({config.objective.temperature})"
    )


def initial_params(run: Prepared) -> Tree:
    """The seed's fresh parameters of all layers; a layer keeps them until its stage begins."""
    key = stream_key(run.config.runtime.seed, INIT_STREAM)
    return jax.jit(functools.partial(init_params, run.task))(key)
