"""Compressed uploads: what arrives, and what it costs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import run_round, small_config
from rounds import max_difference

from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.costs import ledger, traffic
from lwfedssl_jax.costs.operations import stage_parts
from lwfedssl_jax.method import compression
from lwfedssl_jax.method.checks import check_method
from lwfedssl_jax.simulation import setup
from lwfedssl_jax.simulation.simulator import Simulator

RNG = np.random.default_rng(0)
UPDATE = {
    "stacked": jnp.asarray(RNG.normal(size=(3, 20, 10)), jnp.float32),
    "bias": jnp.asarray(RNG.normal(size=50), jnp.float32),
}
PRESENT = {"stacked": jnp.array([True, True, False]), "bias": jnp.array(True)}
ALL = jax.tree.map(jnp.ones_like, PRESENT)
MATRICES = [200, 200, 200, 50]


def nbytes(message: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(message))


def test_int8_is_right_on_average_and_costs_a_byte_and_a_scale_for_each_matrix() -> None:
    read = jax.jit(lambda key: compression.dequantise(compression.quantise(key, UPDATE, ALL)))
    found = [read(jax.random.key(i)) for i in range(400)]
    message = compression.quantise(jax.random.key(0), UPDATE, ALL)
    assert {x.dtype for x in jax.tree.leaves(message.values)} == {np.dtype(np.int8)}
    assert nbytes(message) == compression.upload_bytes("int8", MATRICES) == 650 + 4 * 4
    for name, x in UPDATE.items():
        drawn = np.stack([f[name] for f in found])
        step = np.abs(x).max(tuple(range(PRESENT[name].ndim, x.ndim)), keepdims=True) / 127
        assert (np.abs(drawn - np.asarray(x)) <= step * 1.001).all()
        assert (np.abs(drawn.mean(0) - np.asarray(x)) < 5 * step / 2 / np.sqrt(400)).all()
        assert np.unique(drawn[:, 0], axis=0).shape[0] > 1  # at random
    zero = compression.quantise(jax.random.key(0), jax.tree.map(jnp.zeros_like, UPDATE), ALL)
    assert not any(x.any() for x in jax.tree.leaves(compression.dequantise(zero)))


@pytest.mark.parametrize("share", [0.01, 0.05, 0.5, 1.0])
def test_top_sends_the_largest_values_of_the_whole_update(share: float) -> None:
    message = compression.largest(UPDATE, ALL, share)
    kept = compression.kept_of(share, 650)
    assert kept == np.ceil(650 * share)
    received = compression.scatter(message, UPDATE)
    flat = np.concatenate([np.ravel(UPDATE[name]) for name in sorted(UPDATE)])
    expected = np.where(np.abs(flat) >= np.sort(np.abs(flat))[-kept], flat, 0)
    np.testing.assert_array_equal(np.concatenate([np.ravel(received[name]) for name in sorted(UPDATE)]), expected)
    with_bits = message.values.nbytes + np.packbits(expected != 0).nbytes
    assert compression.upload_bytes(f"top={share}", MATRICES) == min(nbytes(message), with_bits)


def test_idle_rows_are_neither_sent_nor_counted() -> None:
    message = compression.largest(UPDATE, PRESENT, 0.1)
    assert np.count_nonzero(message.values) == compression.kept_of(0.1, 450)
    received = compression.scatter(message, UPDATE)
    assert not received["stacked"][2].any()


def test_what_is_not_finite_stays_so() -> None:
    for bad in (jnp.nan, jnp.inf):
        update = UPDATE | {"bias": UPDATE["bias"].at[3].set(bad)}
        eight_bits = compression.dequantise(compression.quantise(jax.random.key(0), update, ALL))
        assert not np.isfinite(eight_bits["bias"]).all()
        sparse = compression.scatter(compression.largest(update, ALL, 0.01), update)
        assert not all(np.isfinite(x).all() for x in jax.tree.leaves(sparse))


@pytest.mark.usefixtures("cheap_views")
@pytest.mark.parametrize("name", ["int8", "top=0.05"])
def test_a_round_does_not_depend_on_lanes_and_is_priced_as_the_ledger_says(name: str) -> None:
    models, lines = [], []
    for lanes in (1, 3):
        config = small_config(federation__compression=name, runtime__lanes=lanes, optimizer__batch_size=4)
        run = setup.prepare(config, jax.devices()[:1])
        simulator = Simulator([run])
        params = simulator.stack.place(setup.initial_params(run))
        after, _, line = run_round(simulator, run.stages[1], params, None, 2)
        models.append(jax.device_get(after))
        lines.append(line)
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(model)]) for model in models]
    differs = np.abs(flat[0] - flat[1]) > 1e-4
    assert differs.mean() < (0.005 if "top" in name else 1e-9)  # near the threshold, rounding decides what is sent
    cost = ledger.make_ledger(config)["per_stage"][1]
    assert lines[0]["upload_bytes"] == lines[1]["upload_bytes"] == cost["upload_bytes"] * 4  # clients
    plain = ledger.make_ledger(small_config(optimizer__batch_size=4))["per_stage"][1]
    assert cost["download_bytes"] == plain["download_bytes"]
    assert cost["upload_bytes"] < plain["upload_bytes"] / 3
    assert cost["flops_executed"] == plain["flops_executed"]


def test_running_averages_are_not_compressed() -> None:
    sizes = {"model__name": "resnet18", "model__patch_size": 0, "model__heads": 0, "model__depth": 2, "model__width": 4}
    for name in ("int8", "top=0.1"):
        config = small_config(**sizes, federation__compression=name)
        run = setup.prepare(config)
        params = setup.initial_params(run)
        counted = traffic.make_traffic(config, params, run.layers, 4)
        for stage, part in zip(run.stages, stage_parts(config), strict=True):
            assert counted.upload(stage, [0, 1]) == 2 * traffic.compressed_bytes(config, part)
            statistics = 4 * sum(int(np.prod(x.shape)) for x in jax.tree.leaves(part.trainable["statistics"]))
            assert traffic.compressed_bytes(config, part) > statistics > 0


@pytest.mark.usefixtures("cheap_views")
def test_all_of_it_is_no_compression(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two programs: under AdamW, their rounding decides the sign of steps whose gradient is zero in exact arithmetic.
    monkeypatch.setattr(optax, "adamw", lambda learning_rate, weight_decay: optax.sgd(learning_rate))
    models = []
    for name in ("none", "top=1"):
        run = setup.prepare(small_config(federation__compression=name, optimizer__batch_size=4), jax.devices()[:1])
        simulator = Simulator([run])
        params = simulator.stack.place(setup.initial_params(run))
        models.append(jax.device_get(run_round(simulator, run.stages[0], params, None, 1)[0]))
    assert max_difference(*models) < 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"federation__compression": "int4"},
            r"federation.compression: unknown 'int4'; accepted: none, int8, top=SHARE",
        ),
        (
            {"federation__compression": "top=0"},
            r"federation.compression: 'top=0' has no share; accepted: top=SHARE, above",
        ),
        ({"federation__compression": "top=many"}, r"federation.compression: 'top=many' has no share"),
        ({"federation__compression": "top=1.5"}, r"federation.compression: 'top=1.5' has no share"),
        (
            {
                "federation__compression": "int8",
                "additions__depth_dropout": 0.5,
                "additions__depth_dropout_per": "round",
            },
            r"federation.compression: int8 compresses whole updates, .*; accepted: none, or additions",
        ),
    ],
)
def test_compressions_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_method(small_config(**changes))
