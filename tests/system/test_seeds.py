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


def test_no_tag_of_numpys_is_0_except_for_the_partitions() -> None:
    assert [tag for tag in seeds.RngTag if tag == 0] == [seeds.RngTag.PARTITION]


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
    ("tag", "number"),
    [("PARTITION", 0), ("SAMPLING", 1), ("BATCHES", 2), ("SERVER_IMAGES", 3), ("FLEET", 4), ("FINE_TUNE", 64)],
)
def test_generators_are_those_of_the_literal_expression(tag: str, number: int) -> None:
    for path in ((), (ROUND,), (ROUND, CLIENT)):
        expected = np.random.default_rng([SEED, number, *path]).integers(2**63, size=4)
        np.testing.assert_array_equal(seeds.rng(SEED, seeds.RngTag[tag], *path).integers(2**63, size=4), expected)


def test_fixed_generators_are_those_of_a_plain_number() -> None:
    for number in (0, 4):
        expected = np.random.default_rng(number).integers(2**63, size=4)
        np.testing.assert_array_equal(seeds.fixed_rng(number).integers(2**63, size=4), expected)


def bits(key: jax.Array) -> list[int]:
    return np.asarray(jax.random.key_data(key)).tolist()
