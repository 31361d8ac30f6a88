"""Every random stream of the package: tables of the tags that tell streams apart, for JAX's keys and for NumPy's.

The streams of a seed; what stands behind an arrow is folded into the key, or added to the seed sequence. A run has up
to three seeds: that of the partition, that of the initial weights (INIT), and ``runtime.seed`` of everything else::

    JAX    seed -> KeyTag.INIT
                -> KeyTag.ROUND -> round -> client -> step -> sample, or a StepTag
                                                   -> a ClientTag
                                         -> a RoundTag
                -> KeyTag.SERVER -> round -> step -> a ServerTag
                -> KeyTag.BASE -> step -> a ServerTag
                -> KeyTag.EVALUATION -> number of a batch's first image -> sample
                -> KeyTag.CANARIES -> stage -> canary
                -> KeyTag.FINE_TUNE -> 0 for the head, or epoch (from 1) -> step -> sample
    NumPy  partition's seed -> RngTag.PARTITION
                            -> RngTag.SERVER_IMAGES
                            -> RngTag.FLEET
           seed -> RngTag.SAMPLING -> round
                -> RngTag.CANARIES -> nothing, or stage, or stage -> round
                -> RngTag.MEMBERSHIP
                -> RngTag.FINE_TUNE -> epoch (from 0)
           0    -> RngTag.TEST_SPLIT
                -> RngTag.SYNTHETIC
                -> RngTag.LABELLED -> draw
    hashes partition's seed -> RngTag.SHARED -> client
           seed -> RngTag.MEMBERSHIP -> pair of views
                -> RngTag.BATCHES -> round -> client -> epoch (from 0) -> position
"""

import enum
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

VERSION = 2  # of all streams and their uses; a run that was begun with another one cannot continue


@enum.unique
class KeyTag(enum.IntEnum):
    """Uses of a run's seed by JAX."""

    INIT = 0
    ROUND = 1
    SERVER = 2
    BASE = 3
    EVALUATION = 4
    CANARIES = 5
    FINE_TUNE = 64


@enum.unique
class RoundTag(enum.IntEnum):
    """Uses of a round's key, in addition to its clients, which take their numbers."""

    FINISH = 2**32 - 4


@enum.unique
class ClientTag(enum.IntEnum):
    """Uses of the key of a client in a round, in addition to its steps, which take the numbers from 0."""

    CONTRIBUTION = 2**32 - 3
    DEPTH_DROPOUT = 2**32 - 5
    COMPRESSION = 2**32 - 7


@enum.unique
class StepTag(enum.IntEnum):
    """Uses of the key of a client's step, in addition to its samples, which take 0 to B - 1."""

    PUBLIC_IMAGES = 2**32 - 2
    HIDDEN_PATCHES = 2**32 - 6
    DEPTH_DROPOUT = 2**32 - 1


@enum.unique
class ServerTag(enum.IntEnum):
    """Uses of the key of a step that the server trains itself."""

    IMAGES = 1
    CLIENT_STEP = 2


@enum.unique
class RngTag(enum.IntEnum):
    """Uses of a seed by NumPy's generators and by ``hashes``; none is 0, and those of fixed numbers are here too."""

    SAMPLING = 1
    BATCHES = 2
    SERVER_IMAGES = 3
    FLEET = 4
    PARTITION = 5
    SHARED = 6
    TEST_SPLIT = 7
    SYNTHETIC = 8
    LABELLED = 9
    CANARIES = 10
    MEMBERSHIP = 11
    FINE_TUNE = 64


def key(seed: int, tag: KeyTag, *path: int) -> jax.Array:
    """Return the typed key of one use of the seed, with ``path``, such as a round's number, folded in."""
    folded = jax.random.key(seed)
    for number in (tag, *path):
        folded = jax.random.fold_in(folded, number)
    return folded


def rng(seed: int, tag: RngTag, *path: int) -> np.random.Generator:
    """Return NumPy's generator for one use of the seed and for ``path``, such as a round's number.

    Tag and path are a spawn key, which NumPy keeps apart from the seed and does not pad with zeros: plain seed
    sequences ``[s]`` and ``[s, 0]`` give the same numbers.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(tag, *path)))


def fixed_rng(tag: RngTag, *path: int) -> np.random.Generator:
    """Return a generator that gives the same numbers in every run, whatever its seed."""
    return rng(0, tag, *path)


def hashes(seed: int, tag: RngTag, *path: ArrayLike) -> np.ndarray:
    """Return random 64-bit numbers, one for each element of ``path``, without a generator's state.

    It is the output function of SplitMix64 (Steele et al., 2014, doi:10.1145/2660193.2660195), applied to one number
    after the other.

    Args:
      seed: of the run.
      tag: what the numbers are for.
      path: what they depend on, such as a round, clients and positions; integers or arrays of them, broadcast against
        each other.

    Returns:
      uint64, of ``path``'s shape.
    """
    state: Any = np.zeros((), np.uint64)
    for number in (seed, tag, *path):
        state = _absorb(state, np.asarray(number).astype(np.uint64))
    return np.asarray(state)


def _absorb(state: np.ndarray, number: np.ndarray) -> Any:
    with np.errstate(over="ignore"):  # it multiplies modulo 2**64
        state = (state + np.uint64(0x9E3779B97F4A7C15)) ^ number
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return state ^ (state >> np.uint64(31))


def permuted(keys: np.ndarray, position: np.ndarray, size: int) -> np.ndarray:
    """Return where random permutations of ``size`` numbers take positions.

    Those of many numbers are not drawn as a whole: they are Feistel networks over a power of two, through which a
    number goes until it is below ``size`` (Black and Rogaway, 2002, doi:10.1007/3-540-45760-7_9).

    Args:
      keys: Mx1, of each permutation (``hashes``).
      position: MxB, 0 to ``size`` - 1.
      size: of the permutations, at most ``2**31``.

    Returns:
      MxB; a row has different numbers for different positions.
    """
    if size <= 1024:  # a network over few numbers favours some permutations
        orders = np.argsort(_absorb(keys, np.arange(size, dtype=np.uint64)), axis=1)
        return np.take_along_axis(orders, position, axis=1)
    bits = (int(size) - 1).bit_length()
    halves = np.uint32(bits // 2), np.uint32(bits - bits // 2)  # in odd rounds, the low one is the wider
    round_keys = [_absorb(keys, np.array(i, np.uint64)).astype(np.uint32) for i in range(FEISTEL_ROUNDS)]

    def once(round_keys: list[np.ndarray], number: np.ndarray) -> np.ndarray:
        for i, key in enumerate(round_keys):
            low, high = halves[i % 2], halves[1 - i % 2]
            right = number & ((np.uint32(1) << low) - np.uint32(1))
            mixed = _mixed(right ^ key) & ((np.uint32(1) << high) - np.uint32(1))
            number = (right << high) | ((number >> low) ^ mixed)
        return number

    result = once(round_keys, position.astype(np.uint32))
    while len((outside := np.nonzero(result >= size))[0]):
        result[outside] = once([key[outside[0], 0] for key in round_keys], result[outside])
    return result.astype(np.int64)


FEISTEL_ROUNDS = 4  # as many as make a strong pseudo-random permutation (Luby and Rackoff, 1988)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Hash 32 bits (the lowbias32 of Wellons, "Prospecting for hash functions", 2018)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
