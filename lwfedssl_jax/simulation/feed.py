"""Images on their way to the device: all of them once, or those of the next call while this one runs."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from lwfedssl_jax.simulation.packing import Schedule

Put = Callable[[np.ndarray], jax.Array]
Feed = Callable[[Iterator[tuple[Schedule, int]]], Iterator[tuple[jax.Array, Schedule, int]]]


def resident(images_NxHxWxC: np.ndarray, put: Put) -> Feed:
    """All images stay on the device, and a plan's examples are indices into them.

    Args:
      images_NxHxWxC: uint8.
      put: to all devices.
    """
    pool = put(images_NxHxWxC[None])
    return lambda calls: ((pool, plan, steps) for plan, steps in calls)


def streamed(images_NxHxWxC: np.ndarray, put_by_lane: Put) -> Feed:
    """Only a call's own images are on the device, each lane's with the lane.

    Args:
      images_NxHxWxC: uint8, on the host.
      put_by_lane: an array's axis of lanes, the first one or that behind the runs', over the devices.
    """

    def feed(calls: Iterator[tuple[Schedule, int]]) -> Iterator[tuple[jax.Array, Schedule, int]]:
        for plan, steps in calls:
            *runs, c, w, b = plan.examples.shape
            images_WxNxHxWxC = images_NxHxWxC[plan.examples.swapaxes(-3, -2).reshape(*runs, w, c * b)]
            at = np.broadcast_to(np.arange(c * b, dtype=np.int32).reshape(c, 1, b), plan.examples.shape)
            yield put_by_lane(images_WxNxHxWxC), plan._replace(examples=at), steps

    return feed
