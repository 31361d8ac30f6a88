"""Additions to a stage: off changes nothing, on does what it says, and the ledger prices it."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import known_traces, run_round, small_config
from rounds import fast_round, float64, max_difference, parts, prepare

from lwfedssl_jax import tree
from lwfedssl_jax.config import override
from lwfedssl_jax.costs import ledger, operations
from lwfedssl_jax.costs.operations import held_part, stage_parts
from lwfedssl_jax.costs.traffic import make_traffic
from lwfedssl_jax.method.client import client_init, client_step
from lwfedssl_jax.method.depth_dropout import (
    held_layers,
    kept_layers,
    skipped_by_round,
    skipped_by_step,
    skipped_layers,
)
from lwfedssl_jax.method.stages import Stage, freeze
from lwfedssl_jax.method.terms import TERMS
from lwfedssl_jax.simulation import cohort, setup
from lwfedssl_jax.simulation.simulator import Simulator

pytestmark = pytest.mark.usefixtures("cheap_views")


def two_steps(run: setup.Prepared, stage: Stage, params: tree.Tree | None = None) -> tuple[tree.Tree, jax.Array]:
    """A client's trainable part and loss after two steps in a stage."""
    sent = parts(stage, params or setup.initial_params(run))
    images, mask = jnp.asarray(run.dataset.train_images[:8]), jnp.arange(8) < 7

    @jax.jit
    def train(sent: Any) -> Any:
        state = client_init(run.task, sent.trainable)
        for key in map(jax.random.key, range(2)):
            state, loss = client_step(
                run.task, state, sent, images, mask, key, skipped_layers(run.task, sent, key, key)
            )
        return state.trainable, loss

    return jax.device_get(train(sent))


def with_task(run: setup.Prepared, **changes: Any) -> setup.Prepared:
    return run._replace(task=run.task._replace(**changes))


def weighted(run: setup.Prepared, *terms: tuple[Any, float]) -> setup.Prepared:
    hyper = run.task.hyper._replace(weights=tuple(weight for _, weight in terms))
    return with_task(run, terms=tuple(term for term, _ in terms), hyper=hyper)


def dropping(run: setup.Prepared, rate: float) -> setup.Prepared:
    return with_task(run, drops_layers="step", hyper=run.task.hyper._replace(depth_dropout=rate))


def test_terms_of_zero_weight_change_nothing_bit_for_bit() -> None:
    run = prepare(small_config())
    terms = [TERMS[name] for name in sorted(TERMS.keys() - {"base"})]  # which needs a base model: test_fedca
    plain, loss = two_steps(run, run.stages[1])
    zero, zero_loss = two_steps(weighted(run, *((term, 0.0) for term in terms)), run.stages[1])
    assert loss == zero_loss
    chex.assert_trees_all_equal(plain, zero)
    for term in terms:
        some, _ = two_steps(weighted(run, (term, 0.5)), run.stages[1])
        assert max_difference(plain, some) > 1e-6


def test_a_strong_proximal_term_keeps_clients_near_the_global_model() -> None:
    free, held = (prepare(small_config(additions__terms=terms)) for terms in ((), ("proximal=1000",)))
    moved = [fast_round(run, run.stages[0], setup.initial_params(run), 1)[1]["client_distance"] for run in (free, held)]
    assert moved[1] < 0.8 * moved[0]


@pytest.mark.parametrize("strategy", ["layerwise", "progressive"])
def test_depth_dropout_at_rate_0_changes_nothing_and_at_rate_1_skips_exactly_the_droppable(strategy: str) -> None:
    run = prepare(small_config(strategy__name=strategy))
    stage = run.stages[2]
    plain, loss = two_steps(run, stage)
    tiny, tiny_loss = two_steps(dropping(run, 1e-30), stage)  # the machinery runs, and drops nothing
    assert loss == tiny_loss
    chex.assert_trees_all_equal(plain, tiny)

    everything, _ = two_steps(dropping(run, 1.0), stage)
    # The same without layers 1 and 2, which earlier stages trained: layer 3 directly on the embedding.
    params = setup.initial_params(run)
    if strategy == "progressive":
        blocks = jax.tree.map(lambda x: jnp.roll(x, 1, axis=0), params["encoder"]["blocks"])
        params = params | {"encoder": params["encoder"] | {"blocks": blocks}}
    expected, _ = two_steps(run, stage._replace(depth=1, frozen_depth=0, trained_before=0), params)
    if strategy == "progressive":
        last = jax.tree.map(lambda x: x[2], everything["encoder"]["blocks"])
        first = jax.tree.map(lambda x: x[0], expected["encoder"]["blocks"])
        chex.assert_trees_all_close(last, first, rtol=0, atol=1e-6)
        # Layers that no step ran have not moved at all but by weight decay, 1e-5 of a step of 0.1 each.
        start = setup.initial_params(run)["encoder"]["blocks"]["qkv"]["kernel"]
        np.testing.assert_allclose(everything["encoder"]["blocks"]["qkv"]["kernel"][:2], start[:2], rtol=1e-5)
    else:
        chex.assert_trees_all_close(everything, expected, rtol=0, atol=1e-6)


def test_layers_are_skipped_at_the_asked_rate_and_only_where_allowed() -> None:
    def draw(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        return kept_layers(skipped_by_step(jax.random.key(i), 0.3, 4, layers=8), first=1, depth=5)

    order, count = jax.vmap(draw)(jnp.arange(4000))
    runs = np.zeros((4000, 8), bool)
    for i in range(4000):
        kept = np.asarray(order[i][: count[i]])
        assert np.all(np.diff(kept) > 0)
        runs[i, kept] = True
    assert runs[:, 3:5].all()  # layers 5 and 6 of the encoder: not among its first four
    assert not runs[:, 5:].any()
    np.testing.assert_allclose(runs[:, :3].mean(axis=0), 0.7, atol=0.03)


def test_a_round_skips_as_many_layers_as_a_device_can_count_on() -> None:
    skipped = np.asarray(
        jax.vmap(lambda key: skipped_by_round(key, 0.3, 5, 8))(jax.random.split(jax.random.key(0), 4000))
    )
    assert set(skipped.sum(axis=1)) == {1, 2}  # 0.3 of 5
    np.testing.assert_allclose(skipped[:, :5].mean(axis=0), 0.3, atol=0.03)
    assert not skipped[:, 5:].any()


ROUND = {"additions__depth_dropout": 0.5, "additions__depth_dropout_per": "round"}


@pytest.mark.parametrize("strategy", ["layerwise", "progressive"])
def test_skipped_layers_are_neither_fetched_nor_held_nor_sent(strategy: str) -> None:
    """By the drawn layers of each client, in the ledger, a round's line and the peak memory."""
    config = small_config(strategy__name=strategy, model__depth=5, federation__rounds=5, **ROUND)
    all_layers, without = (
        ledger.make_ledger(override(config, {"additions.depth_dropout": rate}), known_traces()) for rate in (0.0, 1.0)
    )
    half = ledger.make_ledger(config, known_traces())
    block = 4 * tree.size(setup.initial_params(prepare(config))["encoder"]["blocks"]) // 5
    for stage, (a, b, c) in enumerate(zip(*(x["per_stage"] for x in (all_layers, half, without)), strict=True)):
        for key in ("download_bytes", "upload_bytes"):
            assert a[key] - c[key] == (stage * block if strategy == "progressive" else 0)
            assert b[key] == pytest.approx((a[key] + c[key]) / 2, abs=1)
    worst = all_layers["worst_case_total_bytes"] - without["worst_case_total_bytes"]
    assert worst == (1 + (strategy == "progressive")) * block * sum(range(5))

    run = prepare(config)
    stage = run.stages[4]
    held = held_layers(config, stage, 7, [0, 1, 2, 3])
    assert held is not None
    assert (~held).sum(axis=1).tolist() == [2] * 4  # half of 4
    assert len({row.tobytes() for row in held}) > 1
    line = fast_round(run, stage, setup.initial_params(run), 7)[1]
    plain = fast_round(
        prepare(override(config, {"additions.depth_dropout": 0.0})), stage, setup.initial_params(run), 7
    )[1]
    assert line["layers_skipped"] == 0.5
    assert plain["download_bytes"] - line["download_bytes"] == 4 * 2 * block  # nobody had the frozen ones before
    assert plain["upload_bytes"] - line["upload_bytes"] == (4 * 2 * block if strategy == "progressive" else 0)


def test_a_client_fetches_a_frozen_layer_when_it_first_has_it() -> None:
    config = small_config(model__depth=5, federation__rounds=5, **ROUND)
    run = prepare(config)
    params = setup.initial_params(run)
    traffic = make_traffic(config, params, run.layers, 2)
    block = 4 * tree.size(params["encoder"]["blocks"]) // 5
    embedding, stage = 4 * tree.size(params["encoder"]["embedding"]), run.stages[4]
    own = traffic.exchanged(stage)
    held = np.array([[1, 0, 1, 0, 1]], bool)
    assert traffic.download(stage, [0], held) == own + embedding + 2 * block
    assert traffic.download(stage, [0], held) == own
    assert traffic.download(stage, [0], ~held | [0, 0, 0, 0, 1]) == own + 2 * block
    assert traffic.download(stage, [0, 1]) == 2 * own + embedding + 4 * block
    assert traffic.upload(stage, [0, 1], np.repeat(held, 2, 0)) == 2 * own
    with_all = traffic.download(run.stages[3], [1])  # layer 4 is trained again: not final
    assert with_all == traffic.exchanged(run.stages[3])
    assert traffic.download(stage, [1]) == own + block


@pytest.mark.parametrize("strategy", ["layerwise", "progressive"])
def test_peak_memory_is_of_the_layers_that_a_client_holds_at_most(strategy: str) -> None:
    config = small_config(strategy__name=strategy, model__depth=5, federation__rounds=5, **ROUND)
    part = stage_parts(config)[4]
    held, every = held_part(config, part), held_part(override(config, {"additions.depth_dropout_per": "step"}), part)
    assert every == part
    rows = {name: [tree["encoder"]["blocks"]["fc1"]["bias"] for tree in (of.trainable, of.frozen)]
            for name, of in (("held", held), ("all", part))}  # fmt: skip
    shapes = {name: [x and x.shape[0] for x in both] for name, both in rows.items()}
    expected = {"layerwise": ([1, 4], [1, 2]), "progressive": ([5, None], [3, None])}[strategy]
    assert (shapes["all"], shapes["held"]) == expected


def test_the_compilers_peak_memory_is_less_without_the_layers_of_a_round() -> None:
    config = small_config(strategy__name="progressive", model__depth=5, federation__rounds=5, **ROUND)
    by_round, by_step = (
        ledger.ledgers_of({"it": override(config, {"additions.depth_dropout_per": per})}, memory=True, known={})["it"]
        for per in ("round", "step")
    )
    assert by_round["peak_memory_bytes"] < by_step["peak_memory_bytes"]


def test_depth_dropout_is_priced_as_expected_and_measured() -> None:
    config = small_config(additions__depth_dropout=0.5, federation__rounds=6, federation__local_epochs=3)
    plain = ledger.make_ledger(override(config, {"additions.depth_dropout": 0.0}), known_traces())["per_stage"]
    half = ledger.make_ledger(config, known_traces())["per_stage"]
    all_ = ledger.make_ledger(override(config, {"additions.depth_dropout": 1.0}), known_traces())["per_stage"]
    for key in ("flops_paper_rule", "flops_executed"):
        assert half[0][key] == plain[0][key]
        assert half[2][key] == pytest.approx((plain[2][key] + all_[2][key]) / 2, abs=1)
        # Two blocks are skipped; the block that trains costs three times as much and more, the heads besides.
        assert 0.2 * plain[2][key] < plain[2][key] - all_[2][key] < plain[2][key]
    run = prepare(config)
    params = setup.initial_params(run)
    simulator = Simulator([run])
    params = simulator.stack.place(params)
    lines = [run_round(simulator, run.stages[2], params, None, number)[2] for number in range(1, 7)]
    assert np.mean([line["layers_skipped"] for line in lines]) == pytest.approx(0.5, abs=0.1)
    assert "layers_skipped" not in run_round(simulator, run.stages[0], params, None, 1)[2]
    rounds = [{"stage": 1}, {"stage": 2, "layers_skipped": 0.25}, {"stage": 3, "layers_skipped": 1.0}, {"stage": 2}]
    second = plain[1]["flops_executed"] - (plain[1]["flops_executed"] - all_[1]["flops_executed"]) / 4
    expected = plain[0]["flops_executed"] + second + all_[2]["flops_executed"]
    assert ledger.measured_operations(config, rounds, known_traces()) == pytest.approx(expected, abs=1)


def test_calibration_trains_all_layers_on_the_servers_images(monkeypatch: pytest.MonkeyPatch) -> None:
    # AdamW would turn rounding into steps where there is no true gradient.
    monkeypatch.setattr(optax, "adamw", lambda learning_rate, weight_decay: optax.sgd(learning_rate))
    config = small_config(
        objective__name="mocov3",
        additions__calibration_steps=3,
        partition__server_share=0.2,
        objective__momentum=0.5,
        optimizer__learning_rate=3.0,
    )
    run = prepare(config)
    stage, params = run.stages[1], setup.initial_params(run)
    after, line = fast_round(run, stage, params, 4)
    plain, _ = fast_round(prepare(override(config, {"additions.calibration_steps": 0})), stage, params, 4)

    # The reference: the clients' average, then the objective's step on everything that exists, batch by batch.
    whole = stage._replace(frozen_depth=0, trained_before=0)
    frozen, trainable = freeze(run.layers, 0, stage.depth)
    sent = parts(whole._replace(trainable=trainable, frozen=frozen, rows=tree.rows(trainable)), plain)
    state = client_init(run.task, sent.trainable)
    server_key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.runtime.seed), 2), 4)
    losses = []
    step = jax.jit(lambda s, x, k: client_step(run.task, s, sent, x, jnp.ones(len(x), bool), k))
    for i in range(3):
        key = jax.random.fold_in(server_key, i)
        batch = min(run.config.optimizer.batch_size, len(run.server_images))
        drawn = jax.random.choice(jax.random.fold_in(key, 1), len(run.server_images), (batch,), replace=False)
        images = jnp.asarray(run.server_images)[drawn]
        state, loss = step(state, images, jax.random.fold_in(key, 2))
        losses.append(float(loss))
    expected = tree.put(jax.tree.map(jnp.asarray, plain), tree.rows(trainable), state.trainable)
    chex.assert_trees_all_close(after, jax.device_get(expected), rtol=0, atol=2e-4)
    assert line["calibration_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    moved = np.abs(after["encoder"]["blocks"]["qkv"]["kernel"] - plain["encoder"]["blocks"]["qkv"]["kernel"]).max(
        (1, 2)
    )
    assert np.all(moved[:2] > 1e-4)
    assert moved[2] == 0
    assert len(run.server_images) == 12
    assert sum(run.clients.sizes) <= 48


def test_calibration_is_priced() -> None:
    config = small_config(partition__server_share=0.2)
    ledgers = [ledger.make_ledger(override(config, {"additions.calibration_steps": n}), known_traces()) for n in (0, 3)]
    for row, calibrated in zip(*(each["per_stage"] for each in ledgers), strict=True):
        frozen_bytes = 4 * tree.size(operations.stage_parts(config)[row["stage"] - 1].frozen) * row["rounds"]
        assert calibrated["download_bytes"] == row["download_bytes"] + frozen_bytes
        assert calibrated["upload_bytes"] == row["upload_bytes"]
    assert ledgers[0]["server_flops_executed"] == 0
    assert ledgers[1]["server_flops_executed"] > 0
    assert ledgers[1]["total_bytes"] <= ledgers[1]["worst_case_total_bytes"] == ledgers[0]["worst_case_total_bytes"]


def test_clients_are_charged_what_they_really_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A joiner fetches all layers, a returner those finished since, all fetch the last stage's when a stage begins."""
    run, cache = prepare(small_config()), setup.Cache()
    cohorts = {1: [0, 1], 2: [0, 1], 3: [0, 2], 4: [0, 1, 2, 3]}
    stages = {1: run.stages[0], 2: run.stages[1], 3: run.stages[1], 4: run.stages[2]}
    drawn = {number: cohort.Cohort(clients, clients[:1]) for number, clients in cohorts.items()}
    monkeypatch.setattr(cohort, "draw_cohort", lambda run, number: drawn[number])
    simulator = Simulator([run], cache=cache)
    params = simulator.stack.place(setup.initial_params(run))
    size = {n: 0 for n in range(4)}
    for x, n in zip(jax.tree.leaves(params), jax.tree.leaves(run.layers), strict=True):
        for number in np.ravel(n):
            size[int(number)] += x.nbytes // n.size
    for number, lacking in ((1, []), (2, [1, 1]), (3, [1]), (4, [2, 2, 2, 1, 2])):
        stage = stages[number]
        line = run_round(simulator, stage, params, None, number)[2]
        trained = size[0] + size[stage.number]
        assert line["upload_bytes"] == trained
        assert line["download_bytes"] == len(cohorts[number]) * trained + sum(size[layer] for layer in lacking)

    resumed = Simulator(
        [
            run._replace(
                stages=[
                    s._replace(first_round=f, rounds=r)
                    for s, f, r in zip(run.stages, (0, 1, 3), (1, 2, 1), strict=True)
                ]
            )
        ],
        cache=cache,
    )
    resumed.resume(3, [{}])
    assert run_round(resumed, run.stages[2], params, None, 4)[2]["download_bytes"] == line["download_bytes"]


def test_lanes_that_skip_different_layers_run_under_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under SGD: AdamW magnifies rounding, by how much depends on the processor."""
    monkeypatch.setattr(optax, "adamw", lambda learning_rate, weight_decay: optax.sgd(learning_rate))
    results = []
    for vmapped in (False, True):
        with float64():
            config = small_config(runtime__lanes=3, additions__depth_dropout=0.5, strategy__name="progressive")
            run = prepare(override(config, {"runtime.precision": "float64"}))
            run = with_task(run, vmap_on_cpu=vmapped)
            results.append(fast_round(run, run.stages[2], setup.initial_params(run), 1))
    chex.assert_trees_all_close(results[0][0], results[1][0], rtol=0, atol=1e-9)
    assert 0 < results[0][1]["layers_skipped"] == results[1][1]["layers_skipped"] < 1
