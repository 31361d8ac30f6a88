"""Queues of clients in lanes."""

import numpy as np
import pytest

from lwfedssl_jax.data.partition import Population
from lwfedssl_jax.simulation.packing import Batches, Draw, Layout, Schedule, batch_examples, pack_round, queues
from lwfedssl_jax.system import seeds


def disjoint(sizes: list[int]) -> Population:
    return Population.disjoint(np.arange(sum(sizes)), np.array(sizes))


def whole(
    clients: list[int], population: Population, lanes: int, batch: int, epochs: int, seed: int, c: int = 5
) -> Schedule:
    """A round's plan in one piece, from calls of ``c`` steps."""
    work = pack_round(clients, population, Layout(lanes, batch, 1, epochs, c), Draw(seed, 1))
    parts = list(work.calls)
    assert {p.examples.shape for p, _ in parts} == {(c, lanes, batch)}
    assert sum(steps for _, steps in parts) == work.length
    plan = Schedule(*(np.concatenate([getattr(p, name)[:steps] for p, steps in parts]) for name in Schedule._fields))
    assert plan.busy.sum() == work.steps
    assert plan.real[plan.busy].sum() == work.samples
    return plan


def steps_of(plan: Schedule) -> dict[int, list]:
    """Each client's steps, in order: their number, their real examples and their weight."""
    seen: dict[int, list] = {}
    for w in range(plan.busy.shape[1]):
        for c in np.flatnonzero(plan.busy[:, w]):
            rows = plan.examples[c, w, : plan.real[c, w]].tolist()
            seen.setdefault(int(plan.client[c, w]), []).append((int(plan.step[c, w]), rows, plan.weight[c, w]))
    return seen


@pytest.mark.parametrize("lanes", [1, 2, 3, 6])
def test_every_client_gets_exactly_its_own_steps_in_order(lanes: int) -> None:
    population = disjoint([7, 1, 12, 4])
    plan = whole([0, 2, 3], population, lanes, 4, 3, 5)
    seen = steps_of(plan)
    assert sorted(seen) == [0, 2, 3]
    for client, steps in seen.items():
        n = len(population[client])
        assert [s for s, _, _ in steps] == list(range(3 * -(-n // 4)))
        assert [w for _, _, w in steps] == [0] * (len(steps) - 1) + [n]
        each_epoch = np.array_split(np.concatenate([r for _, r, _ in steps]), 3)
        for epoch in each_epoch:
            assert sorted(epoch) == population[client].tolist()
    assert plan.real.min() > 0


def test_an_epochs_order_is_that_of_the_hashes() -> None:
    population = disjoint([5, 70, 1, 64, 9])
    for client, steps in steps_of(whole([0, 1, 2, 3, 4], population, 2, 16, 2, 7)).items():
        own, size = population[client], len(population[client])
        hashes = [seeds.hashes(7, seeds.RngTag.BATCHES, 1, client, epoch, np.arange(size)) for epoch in (0, 1)]
        expected = np.concatenate([own[np.argsort(h)] for h in hashes])
        np.testing.assert_array_equal(np.concatenate([rows for _, rows, _ in steps]), expected)


def test_batches_with_too_few_samples_are_left_out() -> None:
    population = disjoint([9, 8, 5, 2])  # last batches of 1, 4, 1 and 2
    work = pack_round([0, 1, 2, 3], population, Layout(2, 4, 2, 3, 100), Draw(0, 1))
    ((plan, _),) = work.calls
    steps = steps_of(plan)
    assert {client: [len(rows) for _, rows, _ in of] for client, of in steps.items()} == {
        0: [4, 4] * 3, 1: [4, 4] * 3, 2: [4] * 3, 3: [2] * 3,
    }  # fmt: skip
    assert {client: of[-1][2] for client, of in steps.items()} == {0: 9, 1: 8, 2: 5, 3: 2}
    assert (work.steps, work.samples) == (6 + 6 + 3 + 3, 24 + 24 + 12 + 6)
    left_out = [set(range(9)) - {i for _, rows, _ in steps[0][2 * e : 2 * e + 2] for i in rows} for e in range(3)]
    assert len({min(one) for one in left_out}) > 1  # each epoch another one


def test_a_clients_batches_do_not_depend_on_the_others_or_the_lanes() -> None:
    population = disjoint([7, 9, 12])
    alone = whole([1], population, 1, 4, 2, 5)
    together = whole([0, 1, 2], population, 2, 4, 2, 5)
    its_own = together.busy & (together.client == 1)
    np.testing.assert_array_equal(together.examples[its_own], alone.examples[:, 0])
    other_round = whole([1], population, 1, 4, 2, 6)
    assert (other_round.examples != alone.examples).any()


def test_padding_repeats_the_clients_own_examples() -> None:
    population, one = disjoint([3, 2]), np.array([1])
    rows = batch_examples(population, Draw(0, 1), Batches(one, one * 2, one * 0, one * 0), 8)
    assert rows.shape == (1, 8)
    assert set(rows.ravel().tolist()) == {3, 4}


def test_longest_first_fills_the_lanes() -> None:
    sizes = np.random.default_rng(0).lognormal(3, 1, 256).astype(int) + 1
    loads = [sum(sizes[i] for i in lane) for lane in queues(sizes.tolist(), 8)]
    assert sorted(i for lane in queues(sizes.tolist(), 8) for i in lane) == list(range(256))
    assert sum(loads) / (8 * max(loads)) > 0.99


@pytest.mark.parametrize("c", [1, 3, 100])
def test_calls_of_any_length_make_the_same_plan(c: int) -> None:
    population = disjoint([9, 5, 2, 2, 14])
    for found, expected in zip(
        whole([0, 1, 3, 4], population, 2, 2, 2, 0, c), whole([0, 1, 3, 4], population, 2, 2, 2, 0), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("c", [2, 3])
def test_one_client_per_call_begins_with_a_call(c: int) -> None:
    population = disjoint([9, 5, 2, 14])
    layout = Layout(2, 2, 1, 1, c, one_per_call=True)
    work = pack_round([0, 1, 2, 3], population, layout, Draw(0, 1))
    calls = list(work.calls)
    assert work.length == sum(steps for _, steps in calls)
    for plan, steps in calls:
        assert not plan.busy[steps:].any()
        assert all(len(set(plan.client[plan.busy[:, w], w])) <= 1 for w in range(2))
    plan = Schedule(*(np.concatenate([getattr(p, name) for p, _ in calls]) for name in Schedule._fields))
    together = steps_of(whole([0, 1, 2, 3], population, 2, 2, 1, 0))
    assert steps_of(plan) == together


def test_a_client_is_looked_up_when_its_turn_comes() -> None:
    seen: list[int] = []

    def at(clients: np.ndarray, positions: np.ndarray) -> np.ndarray:
        seen.extend(np.unique(clients).tolist())
        return positions + 0 * clients

    work = pack_round(range(100), Population(np.full(100, 4), at), Layout(2, 2, 1, 1, 4), Draw(0, 1))
    assert (work.length, work.steps) == (100, 200)
    next(work.calls)
    assert len(seen) <= 8
