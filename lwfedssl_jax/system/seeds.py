"""Every random stream of the package: tables of the tags that tell streams apart, for JAX's keys and for NumPy's.

The streams of a run's seed; what stands behind an arrow is folded into the key, or added to the seed sequence::

    JAX    seed -> KeyTag.INIT
                -> KeyTag.ROUND -> round -> client -> step -> sample, or a StepTag
                                                   -> a ClientTag
                                         -> a RoundTag
                -> KeyTag.SERVER -> round -> step -> a ServerTag
                -> KeyTag.BASE -> step -> a ServerTag
                -> KeyTag.EVALUATION -> number of a batch's first image -> sample
                -> KeyTag.FINE_TUNE -> 0 for the head, or epoch (from 1) -> step -> sample
    NumPy  seed -> RngTag.PARTITION, also -> client
                -> RngTag.SAMPLING -> round
                -> RngTag.BATCHES -> round -> client
                -> RngTag.SERVER_IMAGES
                -> RngTag.FLEET
                -> RngTag.FINE_TUNE -> epoch (from 0)
"""

import enum

import jax
import numpy as np


@enum.unique
class KeyTag(enum.IntEnum):
    """Uses of a run's seed by JAX."""

    INIT = 0
    ROUND = 1
    SERVER = 2
    BASE = 3
    EVALUATION = 4
    FINE_TUNE = 64


@enum.unique
class RoundTag(enum.IntEnum):
    """Uses of a round's key, in addition to its clients, which take their numbers."""

    FINISH = 2**32 - 4


@enum.unique
class ClientTag(enum.IntEnum):
    """Uses of the key of a client in a round, in addition to its steps, which take the numbers from 0."""

    CONTRIBUTION = 2**32 - 3


@enum.unique
class StepTag(enum.IntEnum):
    """Uses of the key of a client's step, in addition to its samples, which take 0 to B - 1."""

    PUBLIC_IMAGES = 2**32 - 2
    DEPTH_DROPOUT = 2**32 - 1


@enum.unique
class ServerTag(enum.IntEnum):
    """Uses of the key of a step that the server trains itself."""

    IMAGES = 1
    CLIENT_STEP = 2


@enum.unique
class RngTag(enum.IntEnum):
    """Uses of a run's seed by NumPy.

    A new tag must not be 0: NumPy pads seed sequences with zeros, so that ``[seed]``, ``[seed, 0]`` and
    ``[seed, 0, 0]`` give the same numbers. PARTITION keeps its 0 although its numbers are therefore those of
    ``fixed_rng(seed)`` and of its own client 0: another tag would change every run.
    """

    PARTITION = 0
    SAMPLING = 1
    BATCHES = 2
    SERVER_IMAGES = 3
    FLEET = 4
    FINE_TUNE = 64


def key(seed: int, tag: KeyTag, *path: int) -> jax.Array:
    """Return the typed key of one use of the seed, with ``path``, such as a round's number, folded in."""
    folded = jax.random.key(seed)
    for number in (tag, *path):
        folded = jax.random.fold_in(folded, number)
    return folded


def rng(seed: int, tag: RngTag, *path: int) -> np.random.Generator:
    """Return NumPy's generator for one use of the seed and for ``path``, such as a round's number."""
    return np.random.default_rng([seed, tag, *path])


def fixed_rng(number: int = 0) -> np.random.Generator:
    """Return a generator that gives the same numbers in every run, whatever its seed."""
    return np.random.default_rng(number)
