"""Every random stream that comes from a run's seed."""

import jax

FLEET_STREAM = 4  # of the seed in NumPy's generators

SERVER_IMAGES_STREAM = 3  # of the seed in NumPy's generators; 0 is the clients'

DROPOUT_STREAM, PUBLIC_STREAM = 2**32 - 1, 2**32 - 2  # of a step's key; its samples take 0 to B - 1

CONTRIBUTION_STREAM = 2**32 - 3  # of a client's key; its steps take the smaller numbers
FINISH_STREAM = 2**32 - 4  # of a round's key; its clients take the smaller numbers

FINE_TUNE_STREAM = 64  # of the seed, here and in NumPy's generators; the simulation's are smaller

# Streams of the seed; clients add round, client and step to theirs.
INIT_STREAM, ROUND_STREAM, SERVER_STREAM, BASE_STREAM = 0, 1, 2, 3
SAMPLING_STREAM, BATCHES_STREAM = 1, 2  # of NumPy's generators; 0 and 3 are the partition's


def round_key(seed: int, number: int) -> jax.Array:
    """The key of a round, from which those of its clients and steps come."""
    return jax.random.fold_in(stream_key(seed, ROUND_STREAM), number)


def stream_key(seed: int, stream: int) -> jax.Array:
    """The key of one use of the seed."""
    return jax.random.fold_in(jax.random.key(seed), stream)
