"""Queues of clients in lanes."""

import numpy as np
import pytest

from lwfedssl_jax.simulation.packing import CohortData, Layout, Schedule, batches, pack_round, queues


def disjoint(sizes: list[int]) -> list[np.ndarray]:
    return np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])


def whole(
    clients: list[int], examples: list[np.ndarray], lanes: int, batch: int, epochs: int, seed: int, c: int = 5
) -> Schedule:
    """A round's plan in one piece, from calls of ``c`` steps."""
    sizes = [len(examples[i]) for i in clients]
    work = pack_round(CohortData(clients, examples, sizes), Layout(lanes, batch, epochs, c), (seed,))
    parts = list(work.calls)
    assert {p.examples.shape for p, _ in parts} == {(c, lanes, batch)}
    assert sum(steps for _, steps in parts) == work.length
    plan = Schedule(*(np.concatenate([getattr(p, name)[:steps] for p, steps in parts]) for name in Schedule._fields))
    assert plan.busy.sum() == work.steps
    return plan


@pytest.mark.parametrize("lanes", [1, 2, 3, 6])
def test_every_client_gets_exactly_its_own_steps_in_order(lanes: int) -> None:
    examples = disjoint([7, 1, 12, 4])
    plan = whole([0, 2, 3], examples, lanes, 4, 3, 5)
    seen: dict[int, list] = {}
    for w in range(lanes):
        for c in range(len(plan.busy)):
            if plan.busy[c, w]:
                rows = plan.examples[c, w, : plan.real[c, w]].tolist()
                seen.setdefault(int(plan.client[c, w]), []).append((int(plan.step[c, w]), rows, plan.weight[c, w]))
    assert sorted(seen) == [0, 2, 3]
    for client, steps in seen.items():
        n = len(examples[client])
        assert [s for s, _, _ in steps] == list(range(3 * -(-n // 4)))
        assert [w for _, _, w in steps] == [0] * (len(steps) - 1) + [n]
        each_epoch = np.array_split(np.concatenate([r for _, r, _ in steps]), 3)
        for epoch in each_epoch:
            assert sorted(epoch) == examples[client].tolist()
    assert plan.real.min() > 0


def test_a_clients_batches_do_not_depend_on_the_others_or_the_lanes() -> None:
    examples = disjoint([7, 9, 12])
    alone = whole([1], examples, 1, 4, 2, 5)
    together = whole([0, 1, 2], examples, 2, 4, 2, 5)
    its_own = together.busy & (together.client == 1)
    np.testing.assert_array_equal(together.examples[its_own], alone.examples[:, 0])
    other_round = whole([1], examples, 1, 4, 2, 6)
    assert (other_round.examples != alone.examples).any()


def test_padding_repeats_the_clients_own_examples() -> None:
    rows, counts = batches(np.array([3, 5]), 8, 1, np.random.default_rng(0))
    assert counts.tolist() == [2]
    assert set(rows.ravel().tolist()) == {3, 5}


def test_longest_first_fills_the_lanes() -> None:
    sizes = np.random.default_rng(0).lognormal(3, 1, 256).astype(int) + 1
    loads = [sum(sizes[i] for i in lane) for lane in queues(sizes.tolist(), 8)]
    assert sorted(i for lane in queues(sizes.tolist(), 8) for i in lane) == list(range(256))
    assert sum(loads) / (8 * max(loads)) > 0.99


@pytest.mark.parametrize("c", [1, 3, 100])
def test_calls_of_any_length_make_the_same_plan(c: int) -> None:
    examples = disjoint([9, 5, 2, 2, 14])
    for found, expected in zip(
        whole([0, 1, 3, 4], examples, 2, 2, 2, 0, c), whole([0, 1, 3, 4], examples, 2, 2, 2, 0), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_a_client_is_looked_up_when_its_turn_comes() -> None:
    seen = []

    class Examples(list):
        def __getitem__(self, i: int) -> np.ndarray:
            seen.append(i)
            return np.arange(4)

    work = pack_round(CohortData(range(100), Examples(), [4] * 100), Layout(2, 2, 1, 4), (0,))
    assert (work.length, work.steps) == (100, 200)
    next(work.calls)
    assert len(seen) <= 8
