"""Accuracy at equal cost, by hand."""

import math

import numpy as np
import pytest

from lwfedssl_jax.analysis.equal_cost import accuracy_at, common_cost, cost_curve, cumulative_cost
from lwfedssl_jax.analysis.wording import MIB

SUMMARY = {
    "resources": {
        "per_stage": [
            {"stage": 1, "rounds": 2, "flops_executed": 6e9},
            {"stage": 2, "rounds": 1, "flops_executed": 5e9},
        ]
    },
    "fleet": [
        {"clients": 3, "clients_by_stage": [3, 0], "round_seconds_by_stage": [60.0, None]},
        {"clients": 1, "clients_by_stage": [1, 1], "round_seconds_by_stage": [20.0, 30.0]},
    ],
}
LINES = [
    {"event": "evaluation", "round": 0, "protocol": "knn", "accuracy": 0.2},
    {"event": "evaluation", "round": 0, "protocol": "fine_tune", "accuracy": 0.1, "baseline": "scratch"},
    *(
        {"round": n, "stage": s, "clients": 1, "dropped": 1, "download_bytes": down * MIB, "upload_bytes": MIB}
        for n, s, down in ((1, 1, 3), (2, 1, 1), (3, 2, 5))
    ),
    {"event": "evaluation", "round": 2, "protocol": "knn", "accuracy": 0.5},
    {"event": "evaluation", "round": 3, "protocol": "label_free", "effective_rank": 3.0},
    {"event": "evaluation", "round": 3, "protocol": "knn", "accuracy": 0.8},
]


def test_what_a_client_has_spent_up_to_each_round() -> None:
    assert cumulative_cost("traffic", LINES, SUMMARY) == pytest.approx({0: 0, 1: 2 * MIB, 2: 3 * MIB, 3: 6 * MIB})
    assert cumulative_cost("operations", LINES, SUMMARY) == pytest.approx({0: 0, 1: 3e9, 2: 6e9, 3: 11e9})
    assert cumulative_cost("device_seconds", LINES, SUMMARY) == pytest.approx({0: 0, 1: 60, 2: 120, 3: 150})
    assert cumulative_cost("device_seconds", LINES, {**SUMMARY, "fleet": []}) == {}
    unknown = [SUMMARY["fleet"][0] | {"round_seconds_by_stage": [None, None]}, SUMMARY["fleet"][1]]
    assert cumulative_cost("device_seconds", LINES, {**SUMMARY, "fleet": unknown}) == {}


def test_accuracy_is_linear_between_evaluations_and_unknown_beyond_the_last() -> None:
    curve = cost_curve("traffic", "knn", LINES, SUMMARY)
    np.testing.assert_allclose(curve, ([0, 3 * MIB, 6 * MIB], [0.2, 0.5, 0.8]))
    assert accuracy_at(3 * MIB, curve) == pytest.approx(0.5)
    assert math.isnan(accuracy_at(4.5 * MIB, curve))  # evaluated at the end of a stage, half of the run later
    costs = np.linspace(0, 6, 5) * MIB
    assert accuracy_at(4.5 * MIB, (costs, 0.2 + 0.1 * costs / MIB)) == pytest.approx(0.65)
    assert accuracy_at(6 * MIB, curve) == pytest.approx(0.8)
    assert math.isnan(accuracy_at(6.1 * MIB, curve))
    assert math.isnan(accuracy_at(1, cost_curve("traffic", "unknown", LINES, SUMMARY)))
    shorter = (np.array([0, 2.0]), np.array([0.1, 0.2]))
    assert common_cost([curve, shorter]) == 2
    assert math.isnan(common_cost([curve, (np.array([0.0]), np.array([0.1]))]))
    assert math.isnan(common_cost([]))
