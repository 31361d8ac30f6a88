"""Choice of the number of lanes of a run, and of the devices that they are split over."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lwfedssl_jax.config import Config

SAMPLES_AT_ONCE = 2048  # of all lanes of one accelerator together


def lanes_and_mesh(config: Config, axis: str, devices: Sequence[Any] | None = None) -> tuple[int, Mesh]:
    """Return the number of lanes, and the mesh of devices over which they are split evenly.

    The number is ``runtime.lanes`` or depends on the device: ``config.cpu_lanes`` on each CPU, elsewhere as many as
    give ``SAMPLES_AT_ONCE``. It is never more than the cohort can fill; rounded up to a multiple of the devices,
    of which no more are used than there are lanes.

    Args:
      config: resolved.
      axis: the mesh's name for the lanes.
      devices: to be used; by default all.
    """
    devices = list(devices or jax.devices())
    each = config.cpu_lanes if devices[0].platform == "cpu" else max(1, SAMPLES_AT_ONCE // config.optimizer.batch_size)
    wanted = min(config.runtime.lanes or each * len(devices), config.cohort_size)
    if jax.process_count() == 1:
        devices = devices[:wanted]
    lanes = -(-wanted // len(devices)) * len(devices)
    return lanes, Mesh(np.array(devices), (axis,))


def placer(mesh: Mesh, spec: PartitionSpec) -> Callable[[Any], Any]:
    """Return a function that puts a tree of host arrays on the mesh; every process must pass it the same.

    On a CPU the result may share its memory with these arrays, which therefore must not change afterwards.
    """
    sharding = NamedSharding(mesh, spec)

    def put(x: np.ndarray) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    if jax.process_count() == 1:
        return lambda host: jax.device_put(host, sharding)
    return lambda host: jax.tree.map(put, host)
