"""What the server does after a round, and what clients keep between rounds, against plain loops."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_round, small_config
from rounds import SIZES, prepare
from runs import Interrupting, train

from lwfedssl_jax import tree
from lwfedssl_jax.config import ConfigError, override
from lwfedssl_jax.data.partition import Population
from lwfedssl_jax.method import aggregation
from lwfedssl_jax.method.aggregation import AGGREGATORS, WEIGHTED_MEAN
from lwfedssl_jax.method.stateful_clients import make_client_start
from lwfedssl_jax.simulation import cohort, setup
from lwfedssl_jax.simulation.simulator import Simulator
from lwfedssl_jax.tree import Tree
from lwfedssl_jax.workdir import WorkDir, checkpoint

pytestmark = pytest.mark.usefixtures("cheap_views")


class Probe:
    """An aggregator's ``add`` that hands every client's trained model out to the test."""

    def __init__(self, aggregator: Any) -> None:
        self.models: list[Tree] = []

        def add(context: Any, sent: Any, trained: Tree, examples: jax.Array) -> Tree:
            jax.debug.callback(self._take, trained, examples, ordered=False)
            return aggregator.add(context, sent, trained, examples)

        self.aggregator = aggregator._replace(add=add)

    def _take(self, trained: Tree, examples: np.ndarray) -> None:
        if examples > 0:
            self.models.append((jax.tree.map(np.array, trained), float(examples)))


def two_rounds(run: setup.Prepared) -> tuple[list[Tree], list[list[tuple[Tree, float]]]]:
    """Global models before and after each of two rounds, and what the clients made in each."""
    probe = Probe(run.aggregator)
    simulator = Simulator([run._replace(aggregator=probe.aggregator)])
    stage = run.stages[0]
    models, trained, state = [simulator.stack.place(setup.initial_params(run))], [], None
    for number in (1, 2):
        params, state, _ = run_round(simulator, stage, models[-1], state, number)
        jax.effects_barrier()
        models.append(params)
        trained.append(probe.models)
        probe.models = []
    return jax.device_get(models), trained


def mean(clients: list[tuple[Tree, float]]) -> Tree:
    total = sum(n for _, n in clients)
    return jax.tree.map(
        lambda *xs: sum(n * x for (_, n), x in zip(clients, xs, strict=True)) / total, *[m for m, _ in clients]
    )


@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_server_optimizers_equal_their_formulas(name: str) -> None:
    run = prepare(
        small_config(
            strategy__name="end_to_end",
            objective__name="simclr",
            federation__aggregator=name,
            federation__server_learning_rate=0.5,
            federation__server_momentum=0.6,
            federation__server_epsilon=1e-2,
        )
    )
    (first, second, third), (one, two) = two_rounds(run)
    assert sorted(n for _, n in one) == sorted(SIZES)
    m, v, found = 0.0, 0.0, [second, third]
    flat = lambda x: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(x)])  # noqa: E731
    before = [first, second]
    for t, clients in enumerate((one, two), 1):
        change = flat(mean(clients)) - flat(before[t - 1])
        if name == "fedavgm":
            m = 0.6 * m + change
            expected = flat(before[t - 1]) + 0.5 * m
        else:
            m, v = 0.6 * m + 0.4 * change, 0.99 * v + 0.01 * change**2
            expected = flat(before[t - 1]) + 0.5 * (m / (1 - 0.6**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-2)
        np.testing.assert_allclose(flat(found[t - 1]), expected, atol=2e-6)
        assert np.abs(change).max() > 1e-3


def test_ldawa_scales_every_parameter_of_every_layer_by_its_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in algorithm 1 of its paper: a sum over clients, divided by their number."""
    monkeypatch.setattr(aggregation, "LDAWA_WARM_UP", 0)
    run = prepare(small_config(strategy__name="progressive", objective__name="simclr", federation__aggregator="ldawa"))
    (before, after, _), (clients, _) = two_rounds(run)
    rows = run.stages[0].rows
    sent = tree.take(before, rows)
    kernels = {
        "stacked, first layer": lambda p: p["encoder"]["blocks"]["qkv"]["kernel"][0],
        "stacked bias": lambda p: p["encoder"]["blocks"]["fc1"]["bias"][0],
        "plain": lambda p: p["projection"]["Dense_0"]["kernel"],
    }
    for name, part in kernels.items():
        total = 0.0
        for model, _ in clients:
            w, g = part(model), part(sent)
            norms = np.linalg.norm(w) * np.linalg.norm(g)
            total = total + (float((w * g).sum() / norms) if norms else 1.0) * w
        np.testing.assert_allclose(part(after), total / len(SIZES), atol=1e-6, err_msg=name)
        if name != "stacked bias":
            assert np.abs(part(after) - part(mean(clients))).max() > 1e-7
    np.testing.assert_array_equal(
        after["encoder"]["blocks"]["qkv"]["kernel"][1:], before["encoder"]["blocks"]["qkv"]["kernel"][1:]
    )


def test_ldawa_begins_with_plain_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation, "LDAWA_WARM_UP", 1)
    run = prepare(small_config(strategy__name="progressive", objective__name="simclr", federation__aggregator="ldawa"))
    (_, first, second), (one, two) = two_rounds(run)
    rows = run.stages[0].rows
    chex.assert_trees_all_close(tree.take(first, rows), mean(one), rtol=0, atol=1e-6)
    kernel = [p["projection"]["Dense_0"]["kernel"] for p in (second, mean(two))]
    assert np.linalg.norm(kernel[0]) < np.linalg.norm(kernel[1]) - 1e-4


def test_every_aggregator_runs_and_has_a_name() -> None:
    with pytest.raises(ConfigError, match=r"aggregator: unknown 'mean'; accepted: fedavg, fedavgm, fedadam, ldawa"):
        prepare(small_config(federation__aggregator="mean"))
    assert AGGREGATORS["fedavg"](small_config()) is WEIGHTED_MEAN


def apart_of(a: Tree, b: Tree) -> float:
    """The mean over the encoders' weight matrices of their distance."""
    norms = []
    for path, x in jax.tree.leaves_with_path(jax.tree.map(np.subtract, a["encoder"], b["encoder"])):
        stacked = path[0].key == "blocks"
        norms += [np.linalg.norm(layer) for layer in (x if stacked else x[None]) if layer.ndim >= 2]
    return float(np.mean(norms))


@pytest.mark.parametrize("name", ["fedu", "fedema"])
def test_clients_begin_from_their_own_model_as_the_authors_code_has_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later rounds without local updates: a client's model after the round is the one it began with."""
    config = small_config(
        strategy__name="end_to_end",
        objective__name="byol",
        federation__client_start=name,
        runtime__lanes=2,
    )
    sizes = [12, 2, 6, 3]  # one lane is idle at the end
    run = prepare(config)._replace(clients=Population.disjoint(np.arange(sum(sizes)), np.array(sizes)))
    monkeypatch.setattr(cohort, "CALL_STEPS", 3)
    simulator = Simulator([run])
    params = simulator.stack.place(setup.initial_params(run))
    after, state, _ = run_round(simulator, run.stages[0], params, None, 1)
    own = state.clients
    assert sorted(own) == [0, 1, 2, 3]
    assert all(m.known for m in own.values())
    models = [(own[c].trainable, sizes[c]) for c in own]
    chex.assert_trees_all_close(mean(models), jax.device_get(after), rtol=0, atol=1e-6)

    began = jax.device_get(tree.take(params, run.stages[0].rows))
    moved = {c: apart_of(began, own[c].trainable) for c in own}
    for c, memory in own.items():
        assert (memory.moved, memory.round) == (pytest.approx(moved[c], rel=1e-4), 1)
    divergence = 0.6 * min(moved.values()) if name == "fedema" else float(np.median(list(moved.values())))
    adamw = run.task.optimizer(run.task.hyper)
    no_update = lambda _: adamw._replace(update=lambda g, s, p: (jax.tree.map(jnp.zeros_like, g), s))  # noqa: E731
    start = make_client_start(override(config, {"federation.divergence": divergence}), run.task, run.stages[0])
    still = Simulator([run._replace(task=run.task._replace(optimizer=no_update), start=start)])
    received, branches = jax.tree.map(lambda x: 1.1 * x, jax.device_get(after)), set()
    for number in (2, 4):  # nobody takes part in round 3
        _, after_round, _ = run_round(still, run.stages[0], still.stack.place(received), state, number)
        for c, memory in state.clients.items():
            target = memory.target
            if name == "fedema":
                mu = min(divergence / moved[c] * memory.moved, 1)
                expected = tree.ema(memory.trainable, received, mu) if number == 2 else received
                target = memory.target if number == 2 else {k: received[k] for k in target}
                assert after_round.clients[c].scale == pytest.approx(divergence / moved[c], rel=1e-4)
                branches.add(mu > 0)
            else:
                near = memory.moved < divergence
                expected = received | {"prediction": (received if near else memory.trainable)["prediction"]}
                branches.add(near)
            chex.assert_trees_all_close(after_round.clients[c].trainable, expected, rtol=0, atol=1e-5)
            m = run.config.objective.momentum  # the target follows what the client began with
            steps = -(-sizes[c] // 4) * run.config.federation.local_epochs
            online = {k: expected[k] for k in target}
            followed = jax.tree.map(lambda t, o, by=m**steps: o + by * (t - o), target, online)
            chex.assert_trees_all_close(after_round.clients[c].target, followed, rtol=0, atol=1e-5)
            assert after_round.clients[c].moved == pytest.approx(0, abs=1e-6)
        if number == 2:
            state = after_round._replace(clients={c: m._replace(round=np.int32(2)) for c, m in state.clients.items()})
    assert branches == ({True, False} if name == "fedu" else {True})


def test_only_clients_that_took_part_are_kept_and_a_resumed_run_has_them(tmp_path: Path) -> None:
    config = small_config(
        strategy__name="end_to_end",
        objective__name="byol",
        federation__client_start="fedema",
        federation__aggregator="fedavgm",
        federation__clients_per_round=2,
        federation__rounds=4,
        partition__clients=6,
    )
    train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", Interrupting(2))
    found, _ = checkpoint.load(tmp_path / "parts" / "checkpoints")
    saved = found.state if found else {}
    assert 2 <= len(saved["clients"]) <= 4
    assert saved["server"]
    train(config, tmp_path / "parts")
    whole, parts = ((tmp_path / name / "encoder.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    a, b = (
        [{k: v for k, v in line.items() if k != "seconds"} for line in WorkDir(tmp_path / n, config).metrics()]
        for n in ("whole", "parts")
    )
    assert a == b


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation__client_start": "fedema"}, "federation.client_start: fedema keeps whole models"),
        (
            {"federation__client_start": "fedu", "strategy__name": "end_to_end", "objective__name": "simclr"},
            "federation.client_start: fedu needs a target branch",
        ),
        (
            {"federation__client_start": "mine"},
            "federation.client_start: unknown 'mine'; accepted: global",
        ),
        ({"additions__calibration_steps": 3}, "additions.calibration_steps: 3 steps need images"),
        (
            {"additions__depth_dropout": 0.5, "strategy__name": "end_to_end"},
            "additions.depth_dropout: 0.5 skips",
        ),
        (
            {"additions__depth_dropout": 0.5, "strategy__layers_per_stage": 3},
            "additions.depth_dropout: 0.5 skips",
        ),
        ({"additions__terms": ("proximal",)}, "additions.terms: 'proximal' is not valid; accepted: NAME=WEIGHT"),
        ({"additions__terms": ("l1=1",)}, "additions.terms: 'l1=1' is not valid"),
        ({"additions__terms": ("proximal=1", "proximal=2")}, "additions.terms: 'proximal=2' is not valid"),
        ({"additions__terms": ("proximal=-1",)}, "additions.terms: 'proximal=-1' is not valid"),
    ],
)
def test_combinations_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        setup.prepare(small_config(**changes))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert "accepted: " in str(error.value)
