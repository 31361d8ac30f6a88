"""Random streams: no two of a table are the same, and their bits are those of the literal expressions."""

import enum

import jax
import numpy as np
import pytest

from lwfedssl_jax.system import seeds

TABLES = [seeds.KeyTag, seeds.RoundTag, seeds.ClientTag, seeds.StepTag, seeds.ServerTag, seeds.RngTag]
SEED, ROUND, CLIENT = 7, 3, 11


@pytest.mark.parametrize("table", TABLES)
def test_no_two_tags_of_a_table_are_equal(table: type[enum.IntEnum]) -> None:
    values = [int(tag) for tag in table.__members__.values()]  # aliases too
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**32 for value in values)


def test_no_tag_of_numpys_is_0() -> None:
    assert 0 not in list(seeds.RngTag)


def test_streams_of_numpy_never_alias() -> None:
    """Plain seed sequences do: ``[s]`` is ``[s, 0]`` is ``[s, 0, 0]``, and a large seed is several numbers."""
    uses = [
        (seed, tag, *path) for seed in (0, 1, 2**32 - 1) for tag in seeds.RngTag for path in ((), (0,), (0, 0), (1,))
    ]
    drawn = {tuple(seeds.rng(*use).integers(2**63, size=2)) for use in uses}
    hashed = {int(seeds.hashes(*use)) for use in uses}
    assert len(drawn) == len(hashed) == len(uses)


@pytest.mark.parametrize(("tag", "number"), [("INIT", 0), ("ROUND", 1), ("SERVER", 2), ("BASE", 3), ("FINE_TUNE", 64)])
def test_keys_are_those_of_the_literal_expression(tag: str, number: int) -> None:
    expected = jax.random.fold_in(jax.random.key(SEED), number)
    assert bits(seeds.key(SEED, seeds.KeyTag[tag])) == bits(expected)
    assert bits(seeds.key(SEED, seeds.KeyTag[tag], ROUND)) == bits(jax.random.fold_in(expected, ROUND))


@pytest.mark.parametrize(
    ("tag", "number"), [(seeds.RoundTag.FINISH, 2**32 - 4), (seeds.ClientTag.CONTRIBUTION, 2**32 - 3),
                        (seeds.StepTag.PUBLIC_IMAGES, 2**32 - 2), (seeds.StepTag.DEPTH_DROPOUT, 2**32 - 1),
                        (seeds.ServerTag.IMAGES, 1), (seeds.ServerTag.CLIENT_STEP, 2)]
)  # fmt: skip
def test_tags_are_folded_in_like_plain_numbers_in_a_compiled_program(tag: enum.IntEnum, number: int) -> None:
    key = jax.random.key(SEED)
    assert bits(jax.jit(lambda key: jax.random.fold_in(key, tag))(key)) == bits(jax.random.fold_in(key, number))


@pytest.mark.parametrize(
    ("tag", "number"), [("SAMPLING", 1), ("BATCHES", 2), ("SERVER_IMAGES", 3), ("FLEET", 4), ("PARTITION", 5),
                        ("SHARED", 6), ("TEST_SPLIT", 7), ("SYNTHETIC", 8), ("LABELLED", 9), ("FINE_TUNE", 64)]
)  # fmt: skip
def test_generators_are_those_of_the_literal_expression(tag: str, number: int) -> None:
    for path in ((), (ROUND,), (ROUND, CLIENT)):
        sequence = np.random.SeedSequence(SEED, spawn_key=(number, *path))
        expected = np.random.default_rng(sequence).integers(2**63, size=4)
        np.testing.assert_array_equal(seeds.rng(SEED, seeds.RngTag[tag], *path).integers(2**63, size=4), expected)


def test_fixed_generators_are_those_of_seed_0() -> None:
    expected = seeds.rng(0, seeds.RngTag.LABELLED, 4).integers(2**63, size=4)
    np.testing.assert_array_equal(seeds.fixed_rng(seeds.RngTag.LABELLED, 4).integers(2**63, size=4), expected)


def test_hashes_are_those_of_splitmix64() -> None:
    """With one number of state, the sequence that its authors' program prints for seed 0."""
    state, found = 0, []
    for number in (0, seeds.RngTag.BATCHES, 3):
        state = splitmix((state + 0x9E3779B97F4A7C15) % 2**64 ^ number)
        found.append(state)
    assert splitmix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    assert int(seeds.hashes(0, seeds.RngTag.BATCHES, 3)) == found[-1]
    grid = seeds.hashes(0, seeds.RngTag.BATCHES, np.arange(2)[:, None], np.arange(3))
    assert int(grid[1, 2]) == int(seeds.hashes(0, seeds.RngTag.BATCHES, 1, 2))


def splitmix(state: int) -> int:
    state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
    return state ^ state >> 31


@pytest.mark.parametrize("size", [1, 2, 7, 1024, 1025, 3000])
def test_permutations_take_every_number_once_and_differ_by_key(size: int) -> None:
    keys = seeds.hashes(0, seeds.RngTag.SHARED, np.arange(3))[:, None]
    found = seeds.permuted(keys, np.tile(np.arange(size), (3, 1)), size)
    np.testing.assert_array_equal(np.sort(found, axis=1), np.tile(np.arange(size), (3, 1)))
    if size > 2:
        assert len({row.tobytes() for row in found}) == 3
    some = seeds.permuted(keys, np.full((3, 1), size - 1), size)
    np.testing.assert_array_equal(some[:, 0], found[:, -1])


@pytest.mark.parametrize("size", [5, 1200])
def test_permutations_favour_no_pair_of_numbers(size: int) -> None:
    """Chi squared of where the first two positions go; below its mean by 5 standard deviations at most, or above."""
    draws = 200_000
    keys = seeds.hashes(1, seeds.RngTag.SHARED, np.arange(draws))[:, None]
    first, second = seeds.permuted(keys, np.tile([0, 1], (draws, 1)), size).T
    cells = min(size, 20)
    table = np.zeros((cells, cells))
    np.add.at(table, (first * cells // size, second * cells // size), 1)
    if size == cells:
        table = table[~np.eye(cells, dtype=bool)]
    expected = draws / table.size
    freedom = table.size - 1
    chi2 = ((table - expected) ** 2 / expected).sum()
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


def bits(key: jax.Array) -> list[int]:
    return np.asarray(jax.random.key_data(key)).tolist()
