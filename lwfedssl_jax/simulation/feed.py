"""Transfers images to the device: all of them once, or those of the next call while the current one runs."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from lwfedssl_jax.simulation.packing import Schedule

Put = Callable[[np.ndarray], jax.Array]
Calls = Iterator[tuple[Schedule, int]]


class Feed(NamedTuple):
    """A source of the images that calls need.

    Attributes:
      is_resident: whether all images stay on the device.
      serve: ``calls -> (images, schedule, steps)`` of each call, whose examples are indices into the images.
    """

    is_resident: bool
    serve: Callable[[Calls], Iterator[tuple[jax.Array, Schedule, int]]]


def resident(images_NxHxWxC: np.ndarray, put: Put) -> Feed:
    """Keep all images on the device; a schedule's examples are indices into them.

    Args:
      images_NxHxWxC: uint8.
      put: to all devices.
    """
    pool = put(images_NxHxWxC[None])
    return Feed(True, lambda calls: ((pool, schedule, steps) for schedule, steps in calls))


def streamed(images_NxHxWxC: np.ndarray, put_by_lane: Put) -> Feed:
    """Keep only the images of a call on the device, each lane's with the lane.

    Args:
      images_NxHxWxC: uint8, on the host.
      put_by_lane: splits an array's lane axis (the first one, or the one after the axis of runs) over the devices.
    """

    def serve(calls: Calls) -> Iterator[tuple[jax.Array, Schedule, int]]:
        for schedule, steps in calls:
            *runs, c, w, b = schedule.examples.shape
            images_WxNxHxWxC = images_NxHxWxC[schedule.examples.swapaxes(-3, -2).reshape(*runs, w, c * b)]
            at = np.broadcast_to(np.arange(c * b, dtype=np.int32).reshape(c, 1, b), schedule.examples.shape)
            yield put_by_lane(images_WxNxHxWxC), schedule._replace(examples=at), steps

    return Feed(False, serve)
