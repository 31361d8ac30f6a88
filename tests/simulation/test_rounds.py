"""The fast round against the naive one, freezing, lanes, dropped clients."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import run_round, small_config
from reference import train_round
from rounds import SIZES, fast_round, float64, max_difference, parts, prepare

from lwfedssl_jax import tree
from lwfedssl_jax.config import override
from lwfedssl_jax.method.aggregation import WEIGHTED_MEAN, Aggregator, RoundContext
from lwfedssl_jax.method.client import client_init, client_step
from lwfedssl_jax.method.programs import program_config
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.task import Broadcast
from lwfedssl_jax.simulation import cohort, setup
from lwfedssl_jax.simulation.simulator import Simulator

pytestmark = pytest.mark.usefixtures("cheap_views")
STRATEGIES = ["layerwise", "progressive", "end_to_end"]
OBJECTIVES = ["simclr", "byol", "mocov3"]


@pytest.fixture(scope="module")
def cache() -> setup.Cache:
    """For rounds of runs of which nothing is replaced."""
    return setup.Cache()


ADDED: dict[str, Any] = {"additions__terms": ("proximal=0.3", "alignment=0.7")}
DROPPED = {"additions__depth_dropout": 0.5}
RESNET: dict[str, Any] = {
    "model__name": "resnet18", "model__patch_size": 0, "model__heads": 0, "model__width": 4, "model__depth": 2,
    "strategy__name": "end_to_end",
}  # fmt: skip
DROPPED_BY_ROUND = {"additions__depth_dropout": 0.75, "additions__depth_dropout_per": "round"}


@pytest.mark.parametrize(
    ("strategy", "objective", "additions"),
    [(strategy, objective, {}) for strategy in STRATEGIES for objective in OBJECTIVES]
    + [
        ("layerwise", "mocov3", ADDED | DROPPED),
        ("progressive", "mocov3", DROPPED),
        ("layerwise", "simclr", DROPPED_BY_ROUND),
        ("progressive", "simclr", DROPPED_BY_ROUND),
        ("layerwise", "mae", {}),
        ("progressive", "mae", {}),
        ("end_to_end", "vicreg", {}),
        ("layerwise", "vicreg", {}),
    ],
)
def test_equals_naive_round(
    strategy: str, objective: str, additions: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every strategy and objective, all at once: unequal clients, one sample, an idle lane, a dropped client.

    In float64: a client's first AdamW step is near learning rate x sign of the gradient, so that float32 rounding
    near 0 becomes a whole step. A proximal term feeds these steps back, so it is tested under SGD.
    """
    if additions:
        monkeypatch.setattr(optax, "adamw", lambda learning_rate, weight_decay: optax.sgd(learning_rate))
    with float64():
        config = small_config(
            strategy__name=strategy,
            strategy__layers_per_stage=2,
            objective__name=objective,
            runtime__lanes=2,
            federation__local_epochs=1 if additions else 2,
            **additions,
        )
        run = prepare(override(config, {"runtime.precision": "float64"}))
        monkeypatch.setattr(cohort, "draw_cohort", lambda run, number: cohort.Cohort([0, 1, 2, 3], [0, 1, 2]))
        params = setup.initial_params(run)
        stage = run.stages[-1]
        fast, line = fast_round(run, stage, params, 1)
        trainable = jax.tree.map(
            lambda m, p: np.broadcast_to(m.reshape(m.shape + (1,) * (p.ndim - m.ndim)), p.shape),
            stage.trainable,
            params,
        )
        images = {c: run.dataset.train_images[run.clients[c]] for c in (0, 1, 2)}
        naive, loss = train_round(run.config, run.task, params, trainable, stage.depth, stage.trained_before, images, 1)
    moved = max_difference(fast, params)
    assert moved > 1e-3
    assert max_difference(fast, naive) < 1e-5 * moved
    assert line["loss"] == pytest.approx(loss, rel=1e-5)  # float32 sums
    assert line["lane_utilisation"] < 1


@pytest.mark.parametrize("strategy", ["layerwise", "progressive"])
def test_lanes_devices_and_feed_change_rounding_only(strategy: str) -> None:
    """One lane, lanes one after the other, under ``vmap``, over 1, 2 and 4 devices, images streamed."""
    results = []
    layouts = [(1, 1, "resident"), (3, 1, "streamed"), (4, 4, "streamed"), (4, 2, "resident"), ("vmap", 1, "resident")]
    for lanes, devices, feed in layouts if strategy == "layerwise" else [layouts[0], layouts[-1], layouts[2]]:
        with float64():
            config = small_config(
                runtime__lanes=3 if lanes == "vmap" else lanes, runtime__feed=feed, strategy__name=strategy
            )
            run = prepare(override(config, {"runtime.precision": "float64"}), devices)
            run = run._replace(task=run.task._replace(vmap_on_cpu=lanes == "vmap"))
            params = setup.initial_params(run)
            results.append(fast_round(run, run.stages[1 % len(run.stages)], params, 1)[0])
    for other in results[1:]:
        chex.assert_trees_all_close(results[0], other, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "changes",
    [{}, {"objective__name": "mae"}, {"objective__name": "vicreg"}, RESNET],
    ids=["vit", "mae", "vicreg", "resnet"],
)
def test_steps_of_clients_that_fill_no_batch_are_no_larger_than_the_largest(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round is that of whole batches, whose other samples are padding. Under SGD: see the tests above."""
    monkeypatch.setattr(optax, "adamw", lambda learning_rate, weight_decay: optax.sgd(learning_rate))
    with float64():
        config = small_config(partition__clients=12, partition__beta=100.0, optimizer__batch_size=64, **changes)
        run = setup.prepare(override(config, {"runtime.precision": "float64"}))
        assert 4 < max(run.clients.sizes) <= run.batch < 16
        whole, stage, params = setup.with_full_batch(run), run.stages[-1], setup.initial_params(run)
        (after, line), (expected, expected_line) = (fast_round(each, stage, params, 1) for each in (run, whole))
        with_base = override(config, {"additions.terms": ("base=1",)})
        assert whole.batch == setup.needed_batch(with_base, run.clients.sizes) == 64
        chex.assert_trees_all_close(after, expected, rtol=0, atol=1e-9)
    assert max_difference(after, params) > 1e-3
    same = set(line) - {"seconds", "loss", "client_distance"}
    assert {key: line[key] for key in same} == {key: expected_line[key] for key in same}


def test_aggregators_with_state_and_clipping_fit_the_round() -> None:
    """Server momentum, and clipped changes, written here as a user would, against the same on the reference clients."""

    def clip(x: jax.Array, by: jax.Array) -> jax.Array:
        return x * jnp.minimum(1, by / jnp.maximum(jnp.linalg.norm(x), 1e-9))

    def add(context: RoundContext, sent: Broadcast, trained: tree.Tree, examples: jax.Array) -> tree.Tree:
        change = jax.tree.map(lambda s, t: clip(t - s, 0.01), sent.trainable, trained)
        return {"change": change, "clients": jnp.sign(examples)}

    def finish(
        context: RoundContext, momentum: tree.Tree, sent: Broadcast, mean: tree.Tree, summed: tree.Tree
    ) -> tuple[tree.Tree, tree.Tree, dict[str, jax.Array]]:
        change = jax.tree.map(lambda x: x / summed["clients"], summed["change"])
        momentum = jax.tree.map(lambda m, x: 0.5 * m + x, momentum, change)
        return momentum, jax.tree.map(jnp.add, sent.trainable, momentum), {"clipped_clients": summed["clients"]}

    clipped = Aggregator(lambda sent: jax.tree.map(jnp.zeros_like, sent.trainable), add, finish)
    run = prepare(small_config(strategy__name="end_to_end", runtime__lanes=2))
    params = setup.initial_params(run)
    simulator = Simulator([run._replace(aggregator=clipped)])
    stage = run.stages[0]
    once, state, line = run_round(simulator, stage, simulator.stack.place(params), None, 1)
    # The change is the mean of four of norm at most 0.01, and 0.01 itself for leaves that all clients moved alike.
    norms = jax.tree.map(lambda a, b: float(np.linalg.norm(a - b)), jax.device_get(once), jax.device_get(params))
    assert 0 < max(jax.tree.leaves(norms)) <= 0.01 + 1e-6
    assert line["clipped_clients"] == 4  # what an aggregator measures is in the round's line
    _, again, _ = run_round(simulator, stage, simulator.stack.place(params), state, 1)
    ratio = jax.tree.map(lambda a, b: float(jnp.abs(a - 1.5 * b).max()), again.server, state.server)
    assert max(jax.tree.leaves(ratio)) < 1e-6


def test_a_weighted_mean_that_a_user_writes_is_ours() -> None:
    run = prepare(small_config(strategy__name="end_to_end", runtime__lanes=2))
    params, stage = setup.initial_params(run), run.stages[0]
    mean, _ = fast_round(run, stage, params, 1)
    plain = Aggregator(
        lambda sent: (), lambda context, sent, trained, n: jax.tree.map(lambda t: t * n, trained),
        lambda context, state, sent, mean, summed: (state, jax.tree.map(lambda x: x / sum(SIZES), summed), {}),
    )  # fmt: skip
    chex.assert_trees_all_close(
        mean, fast_round(run._replace(aggregator=plain), stage, params, 1)[0], rtol=0, atol=1e-6
    )
    assert run.aggregator is WEIGHTED_MEAN


def test_calls_of_any_length_give_the_same_round(cache: setup.Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(small_config(runtime__lanes=2))
    params = setup.initial_params(run)
    whole, _ = fast_round(run, run.stages[0], params, 1, cache)
    monkeypatch.setattr(cohort, "CALL_STEPS", 3)
    pieces, _ = fast_round(run, run.stages[0], params, 1)
    chex.assert_trees_all_equal(whole, pieces)


def test_everybody_dropped_leaves_the_model(cache: setup.Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cohort, "draw_cohort", lambda run, number: cohort.Cohort([0, 1, 2, 3], []))
    run = prepare(small_config(runtime__lanes=2))
    params = setup.initial_params(run)
    after, line = fast_round(run, run.stages[0], params, 1, cache)
    chex.assert_trees_all_equal(after, params)
    assert line["loss"] is None
    assert (line["clients"], line["dropped"], line["upload_bytes"]) == (0, 4, 0)
    assert line["download_bytes"] > 0


def test_one_sample_client_does_not_change_the_others() -> None:
    """Two lanes side by side: the state of a lane does not depend on what the other one trains."""
    run = prepare(small_config(objective__name="simclr", runtime__lanes=2))
    task, stage = run.task, run.stages[1]
    params = setup.initial_params(run)
    sent = parts(stage, params)
    images = jnp.asarray(run.dataset.train_images[:16]).reshape(2, 8, 8, 8, 3)
    step = jax.jit(
        jax.vmap(lambda i, mask, key: client_step(task, client_init(task, sent.trainable), sent, i, mask, key))
    )
    keys = jax.random.split(jax.random.key(0), 2)
    both, one = jnp.ones((2, 8), bool), jnp.ones((2, 8), bool).at[0, 1:].set(False)
    full, loss_full = step(images, both, keys)
    short, loss_short = step(images, one, keys)
    assert np.isfinite(loss_short).all()
    chex.assert_tree_all_finite(short)
    np.testing.assert_array_equal(loss_full[1], loss_short[1])
    second = lambda state: jax.tree.map(lambda x: x[1], state)  # noqa: E731
    chex.assert_trees_all_equal(second(full), second(short))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_frozen_parameters_are_bit_identical_after_a_round(objective: str, cache: setup.Cache) -> None:
    run = prepare(small_config(objective__name=objective, runtime__lanes=2))
    params = setup.initial_params(run)
    for stage in run.stages:
        after, _ = fast_round(run, stage, params, stage.number, cache)
        same = jax.tree.map(lambda a, b: np.asarray(a == b), after, params)
        for path, mask in jax.tree.leaves_with_path(stage.trainable):
            leaf = same
            for key in path:
                leaf = leaf[key.key]
            rows = leaf.reshape(*mask.shape, -1).all(axis=-1)
            np.testing.assert_array_equal(rows[~mask], True, err_msg=jax.tree_util.keystr(path))
        moved = tree.take(same, tree.rows(stage.trainable))
        assert sum(bool(x.all()) for x in jax.tree.leaves(moved)) == 0
        params = after


def test_frozen_parameters_get_no_gradient() -> None:
    run = prepare(small_config())
    task, stage = run.task, run.stages[1]
    params = setup.initial_params(run)
    sent = parts(stage, params)
    images, key = jnp.asarray(run.dataset.train_images[:8]), jax.random.key(0)

    def loss(trainable: tree.Tree, frozen: tree.Tree) -> jax.Array:
        now = sent._replace(trainable=trainable, frozen=frozen)
        return client_step(task, client_init(task, trainable), now, images, jnp.ones(8, bool), key)[1]

    of_trainable, of_frozen = jax.jit(jax.grad(loss, argnums=(0, 1)))(sent.trainable, sent.frozen)
    assert all((x == 0).all() for x in jax.tree.leaves(of_frozen))
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(of_trainable)) > 0


def test_frozen_parameters_have_no_optimizer_state() -> None:
    run = prepare(small_config(objective__name="mocov3"))
    for stage in run.stages:
        params = jax.eval_shape(lambda: setup.initial_params(run))
        trainable = jax.eval_shape(lambda p, s=stage: tree.take(p, tree.rows(s.trainable)), params)
        state = jax.eval_shape(lambda t: client_init(run.task, t), trainable)
        moments = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(state.opt_state) if x.ndim)
        assert moments == 2 * tree.size(trainable) < 2 * tree.size(params)
        assert tree.size(state.target["encoder"]) == tree.size(trainable["encoder"])


def test_clients_whose_update_is_not_finite_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those with a batch of two samples, here; the round is then that of the others."""
    config = small_config(strategy__name="end_to_end", objective__name="byol", federation__client_start="fedema")
    run = prepare(config)
    whole = run.task.objective

    def loss(online: jax.Array, target: jax.Array, mask_B: jax.Array, temperature: float) -> jax.Array:
        return whole.loss(online, target, mask_B, temperature) * jnp.where(mask_B.sum() == 2, jnp.nan, 1)

    run = run._replace(task=run.task._replace(objective=whole._replace(loss=loss)))
    params = setup.initial_params(run)
    simulator, results = Simulator([run]), {}
    for name, reporting in {"all": [0, 1, 2, 3], "good": [0, 3]}.items():
        monkeypatch.setattr(cohort, "draw_cohort", lambda run, number, r=reporting: cohort.Cohort(list(range(4)), r))
        results[name] = run_round(simulator, run.stages[0], simulator.stack.place(params), None, 1)
    (after, state, line), (expected, expected_state, expected_line) = results["all"], results["good"]
    chex.assert_trees_all_equal(after, expected)
    assert (line["clients"], line["left_out"], expected_line["left_out"]) == (4, 2, 0)
    assert line["loss"] == expected_line["loss"] > 0
    assert line["client_distance"] == expected_line["client_distance"] > 0
    assert set(state.clients) == set(expected_state.clients) == {0, 3}


DIFFERENT: list[dict[str, Any]] = [
    {},
    {"runtime__seed": 3, "optimizer__learning_rate": 0.02, "additions__terms": ("proximal=0.1",)},
    {
        "runtime__seed": 1, "optimizer__weight_decay": 0.1, "objective__temperature": 0.5, "objective__momentum": 0.5,
        "federation__dropout": 0.5, "partition__beta": 5.0, "additions__depth_dropout": 0.9,
    },
]  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "layout", "batch"),
    [("layerwise", (2, 2, "resident"), 8), ("progressive", (1, 1, "streamed"), 32)],
)
def test_runs_that_go_together_equal_each_alone(
    strategy: str, layout: tuple[int, int, str], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds of unlike seeds, numbers and partitions, in one of which one of the runs has nobody who reports.

    Under SGD: see ``test_equals_naive_round``.
    """
    decayed_sgd = lambda rate, weight_decay: optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate))  # noqa: E731
    monkeypatch.setattr(optax, "adamw", decayed_sgd)
    lanes, devices, feed = layout
    same: dict[str, Any] = {
        "strategy__name": strategy, "objective__name": "mocov3", "runtime__lanes": lanes, "runtime__feed": feed,
        "federation__clients_per_round": 2,
        "additions__terms": ("proximal=0.3",), "additions__depth_dropout": 0.3, "federation__aggregator": "fedavgm",
        "partition__clients": 6, "optimizer__learning_rate": 0.05, "optimizer__batch_size": batch,
    }  # fmt: skip
    with float64():
        configs = [override(small_config(**same | changes), {"runtime.precision": "float64"}) for changes in DIFFERENT]
        assert len({program_config(config) for config in configs}) == 1
        runs = [setup.prepare(config, jax.devices()[:devices]) for config in configs]
        assert len({run.batch for run in runs}) == (1 if batch == 8 else 2)  # none fills a batch of 32
        stage = runs[0].stages[1]
        nobody = next(n for n in range(1, 30) if not cohort.draw_cohort(runs[2], n)[1])
        cache = setup.Cache()
        alone = [after_rounds(Simulator([run], cache=cache), stage, [nobody, nobody + 1]) for run in runs]
        together = Simulator(runs)
        params, state, lines = after_rounds(together, stage, [nobody, nobody + 1])
        for i, (own_params, own_state, own_lines) in enumerate(alone):
            chex.assert_trees_all_close(together.stack.select(i, params), own_params, rtol=0, atol=1e-9)
            chex.assert_trees_all_close(together.stack.select(i, state.server), own_state.server, rtol=0, atol=1e-9)
            for mine, shared in zip(own_lines, lines, strict=True):
                assert set(mine[0]) == set(shared[i])
                same_keys = set(mine[0]) - {"seconds", "loss", "client_distance"}
                assert {k: mine[0][k] for k in same_keys} == {k: shared[i][k] for k in same_keys}
                assert (shared[i]["loss"] or 0) == pytest.approx(mine[0]["loss"] or 0, rel=1e-5)
    assert lines[0][2]["clients"] == 0
    assert lines[0][2]["loss"] is None
    apart = [max_difference(alone[0][0], other[0]) for other in alone[1:]]
    assert min(apart) > 1e-3


def after_rounds(simulator: Simulator, stage: Stage, numbers: list[int]) -> tuple[tree.Tree, Any, list[Any]]:
    params, state = simulator.resume(0, [{}] * len(simulator.runs))
    lines = []
    for number in numbers:
        params, state, outcomes, _ = simulator.run_rounds(stage, params, state, number)
        lines.append([outcome.error or outcome.line for outcome in outcomes])
    return params, state, lines


def test_a_run_that_is_not_finite_leaves_the_others_alone() -> None:
    configs = [small_config(optimizer__learning_rate=rate) for rate in (0.1, 3e38)]
    runs = [setup.prepare(config) for config in configs]
    lines = after_rounds(Simulator(runs), runs[0].stages[0], [1, 2])[2]
    alone = after_rounds(Simulator([runs[0]]), runs[0].stages[0], [1, 2])[2]
    for (line, error), (expected,) in zip(lines, alone, strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-2)
        assert isinstance(error, FloatingPointError)
        assert "optimizer.learning_rate (3e+38)" in str(error)
