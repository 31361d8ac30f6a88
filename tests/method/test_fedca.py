"""FedCA: the dictionary and the base model, against plain loops and by hand."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import known_traces, noisy_views, run_round, small_config
from reference import batches
from rounds import max_difference, parts, prepare
from runs import Interrupting, train
from test_objectives import REAL, B, D, T, embeddings, unit

from lwfedssl_jax import tree
from lwfedssl_jax.config import Config, ConfigError, override
from lwfedssl_jax.costs.ledger import all_strategies, make_ledger
from lwfedssl_jax.data.views import standardise
from lwfedssl_jax.method import fedca, objectives, terms
from lwfedssl_jax.method.checks import check_method
from lwfedssl_jax.method.client import client_init, client_step
from lwfedssl_jax.method.objectives import OBJECTIVES
from lwfedssl_jax.method.pretext import embed
from lwfedssl_jax.simulation import cohort, setup
from lwfedssl_jax.simulation.simulator import Simulator
from lwfedssl_jax.simulation.state import state_to_save
from lwfedssl_jax.system import seeds
from lwfedssl_jax.workdir import WorkDir, checkpoint

BASE: dict[str, Any] = {"additions__terms": ("base=1",), "additions__base_steps": 2, "partition__server_share": 0.2}


def fedca_config(**changes: Any) -> Config:
    return small_config(**{"strategy__name": "end_to_end", "objective__name": "simclr", **changes})


def project(run: setup.Prepared, params: tree.Tree) -> jax.Array:
    """Projections of four of the server's images."""
    x = standardise(jnp.asarray(run.server_images[:4]), run.task.recipe)
    return embed(run.task, jax.tree.map(jnp.asarray, params), x, jnp.ones(4, bool), (3, None), ["projection"])[0][0][0]


def cross_entropy(anchor: np.ndarray, positive: np.ndarray, others: list[np.ndarray]) -> float:
    p = [np.exp(x @ anchor / T) for x in (positive, *others)]
    return float(-np.log(p[0] / sum(p)))


def numpy_loss(name: str, q: np.ndarray, k: np.ndarray, negatives: np.ndarray) -> float:
    (q1, q2), (k1, k2), n = unit(q), unit(k), q.shape[1]
    if name == "mocov3":
        pairs = [(a, b, i) for a, b in ((q1, k2), (q2, k1)) for i in range(n)]
        return sum(cross_entropy(a[i], b[i], [*np.delete(b, i, 0), *negatives]) for a, b, i in pairs) / n
    every = np.concatenate([q1, q2])
    total = 0.0
    for i in range(2 * n):
        j = (i + n) % (2 * n)
        total += cross_entropy(every[i], every[j], [*np.delete(every, [i, j], 0), *negatives])
    return total / (2 * n)


@pytest.mark.parametrize("name", ["simclr", "mocov3"])
def test_further_negatives_equal_numpy_and_unfilled_rows_count_for_nothing(name: str) -> None:
    q, k, objective = embeddings(0), embeddings(1), OBJECTIVES[name]
    negatives = unit(embeddings(2).reshape(-1, D))[:5]
    filled = np.array([True, False, True, True, False])
    mask = jnp.arange(B) < REAL
    assert objective.loss_with_negatives is not None

    def loss(negatives: np.ndarray, filled: np.ndarray) -> Any:
        further = jnp.asarray(negatives), jnp.asarray(filled)
        return objective.loss_with_negatives(jnp.asarray(q), jnp.asarray(k), mask, T, further)

    expected = numpy_loss(name, q[:, :REAL], k[:, :REAL], negatives[filled])
    assert float(loss(negatives, filled)) == pytest.approx(expected, rel=1e-5)
    assert loss(np.where(filled[:, None], negatives, 1e3), filled) == loss(negatives, filled)
    plain = objective.loss(jnp.asarray(q), jnp.asarray(k), mask, T)
    assert float(loss(negatives, np.zeros(5, bool))) == pytest.approx(float(plain), rel=1e-6)


@pytest.mark.parametrize("name", ["simclr", "mocov3"])
def test_many_negatives_come_a_part_at_a_time_with_the_same_loss_and_gradient(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, objective = jnp.asarray(embeddings(0)), jnp.asarray(embeddings(1)), OBJECTIVES[name]
    negatives = jnp.asarray(unit(embeddings(2).reshape(-1, D))), jnp.arange(2 * B) % 3 > 0
    assert objective.loss_with_negatives is not None
    loss = jax.value_and_grad(lambda q: objective.loss_with_negatives(q, k, jnp.arange(B) < REAL, T, negatives))
    whole = loss(q)
    monkeypatch.setattr(objectives, "NEGATIVES_AT_ONCE", 3)
    shapes = str(jax.make_jaxpr(loss)(q))
    assert f"{2 * B},{2 * B}" not in shapes.replace(" ", "") or name == "simclr"  # whose own logits are of that shape
    chex.assert_trees_all_close(loss(q), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("cheap_views")
@pytest.mark.parametrize(("lanes", "feed", "most"), [(3, "resident", 7), (2, "streamed", 3)])
def test_the_dictionary_is_what_trained_models_make_of_up_to_n_images_of_each_client(
    lanes: int, feed: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client 2 never reports; slots follow the cohort; client 0 has more steps than client 3."""
    monkeypatch.setattr(cohort, "draw_cohort", lambda run, number: cohort.Cohort([0, 2, 3], [0, 3]))
    changes = {"federation__clients_per_round": 3, "runtime__lanes": lanes, "runtime__feed": feed}
    config = fedca_config(additions__dictionary=most, **changes)
    run = prepare(config)
    simulator, stage = Simulator([run]), run.stages[0]
    params = simulator.stack.place(setup.initial_params(run))
    after, state, line = run_round(simulator, stage, params, None, 1)
    dictionary, filled = (np.asarray(state.exchange[name]) for name in ("dictionary", "filled"))

    sent, epochs = parts(stage, params), config.federation.local_epochs
    step = jax.jit(lambda s, x, k: client_step(run.task, s, sent, x, jnp.ones(len(x), bool), k)[0])
    for slot, c in ((0, 0), (2, 3)):
        own = run.clients[c]
        one_more = override(config, {"federation.local_epochs": epochs + 1, "optimizer.batch_size": 4})
        rows = batches(one_more, run.task, len(own), 1, c)
        steps = len(rows) * epochs // (epochs + 1)
        local = client_init(run.task, sent.trainable)
        for i, row in enumerate(rows):
            images = jnp.asarray(run.dataset.train_images[own[row]])
            key = seeds.key(config.runtime.seed, seeds.KeyTag.ROUND, 1, c, i)
            if i < steps:
                local = step(local, images, key)
                continue
            view = noisy_views(key, images, run.task.recipe)[0]
            z = embed(run.task, local.trainable, view, jnp.ones(len(view), bool), (sent.depth, None), ["projection"])
            done = len(row) * (i - steps)
            n = max(0, min(len(row), most - done))
            found = dictionary[most * slot + done : most * slot + done + n]
            np.testing.assert_allclose(found, unit(np.asarray(z[0][0][0]))[:n], atol=2e-4)
        count = {0: min(8, most), 3: min(4, most)}[c]
        assert filled[most * slot : most * slot + most].tolist() == [i < count for i in range(most)]
    assert not dictionary[~filled].any()
    assert filled.sum() == (11 if most == 7 else 6)
    plain = run_round(Simulator([prepare(fedca_config(**changes))]), stage, params, None, 1)[2]
    assert line["upload_bytes"] == plain["upload_bytes"] + filled.sum() * 6 * 4
    assert line["download_bytes"] == plain["download_bytes"]
    chex.assert_trees_all_close(after, simulator.stack.place(jax.device_get(after)))

    _, again, second = run_round(simulator, stage, after, state, 2)
    empty = state._replace(exchange=fedca.empty_dictionary(config, run.task))
    assert second["loss"] > run_round(simulator, stage, after, empty, 2)[2]["loss"] + 0.1
    assert max_difference(again.exchange["dictionary"], dictionary) > 1e-3

    monkeypatch.setattr(cohort, "draw_cohort", lambda run, number: cohort.Cohort([1, 2, 3], []))
    _, kept, _ = run_round(simulator, stage, after, state, 2)
    assert all((np.asarray(kept.exchange[k]) == x).all() for k, x in state.exchange.items())


def test_the_base_term_is_zero_at_the_base_model_and_pulls_to_it() -> None:
    run = prepare(fedca_config(**BASE))
    base = setup.initial_params(run)
    moved = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), base)

    def embed_images(model: tree.Tree, images: jax.Array) -> jax.Array:
        assert len(images) == len(run.server_images)
        return project(run, model)  # of all of them: a mean does not depend on their order

    @jax.jit
    def term(weights: tree.Tree, base: tree.Tree) -> jax.Array:
        none: Any = None
        extras = {"base": base, "public": jnp.asarray(run.server_images)}
        mask, key = jnp.ones(len(run.server_images), bool), jax.random.key(0)
        return terms.base(terms.Local(weights, none, none, none, none, mask, extras, embed_images, key))

    assert term(base, base) == 0
    loss, grad = jax.jit(jax.value_and_grad(term))(moved, base)
    z, goal = (unit(np.asarray(project(run, m))) for m in (moved, base))
    assert float(loss) == pytest.approx(((z - goal) ** 2).sum(-1).mean(), rel=1e-4)
    assert loss > 1e-3
    assert term(jax.tree.map(lambda w, g: w - 1e-4 * g, moved, grad), base) < loss


def test_the_base_term_looks_at_a_few_public_images_of_each_step() -> None:
    run = prepare(fedca_config(**BASE))
    every = run.server_images
    drawn = [np.asarray(terms.public_batch(jnp.asarray(every), 4, jax.random.key(i))) for i in (0, 1)]
    for batch in drawn:
        assert len({int(np.flatnonzero((every == x).all((1, 2, 3)))[0]) for x in batch}) == 4
    assert (drawn[0] != drawn[1]).any()
    assert len(terms.public_batch(jnp.asarray(every), 400, jax.random.key(0))) == len(every)


def test_a_run_with_a_base_term_ends_nearer_to_the_base_model() -> None:
    apart = []
    for weight in (1e-30, 30.0):
        run = prepare(fedca_config(**BASE | {"additions__terms": (f"base={weight}",)}))
        simulator, start = Simulator([run]), setup.initial_params(run)
        params, state = simulator.stack.place(start), None
        for number in (1, 2):
            params, state, _ = run_round(simulator, run.stages[0], params, state, number)
        base = simulator._extras["base"]
        assert max_difference(base, start) > 1e-3
        z, goal = (unit(np.asarray(project(run, m))) for m in (params, base))
        apart.append(((z - goal) ** 2).sum(-1).mean())
    assert apart[1] < 0.7 * apart[0]


@pytest.mark.usefixtures("cheap_views")
def test_traffic_and_ledger_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three clients a round, 4 embeddings of 6 numbers each; the base model is as large as what is trained."""
    changes = {**BASE, "additions__dictionary": 4, "federation__clients_per_round": 3}
    config, plain = fedca_config(**changes), fedca_config(federation__clients_per_round=3)
    (row,), (without,) = (make_ledger(c, known_traces())["per_stage"] for c in (config, plain))
    model, upload = 4 * row["trainable_parameters"], 4 * 6 * 4
    assert row["download_bytes"] == without["download_bytes"] + 3 * (3 * upload) + model
    assert row["upload_bytes"] == without["upload_bytes"] + 3 * upload
    ledger = make_ledger(config, known_traces())
    assert ledger["total_bytes"] == ledger["worst_case_total_bytes"]
    passes = make_ledger(override(config, {"additions.dictionary": 0}), known_traces())["per_stage"][0]
    by_rule = without["flops_paper_rule"]  # two views, three times, in 2 local epochs of each round
    assert 0 < row["flops_paper_rule"] - by_rule < by_rule / 3 / config.federation.local_epochs + 1
    assert row["flops_executed"] > passes["flops_executed"] > without["flops_executed"]
    assert row["server_flops_executed"] > without["server_flops_executed"] == 0
    assert list(all_strategies(config, memory=False, known=known_traces())) == ["end_to_end"]

    cohorts = {1: [0, 1], 2: [1, 2, 3]}
    drawn = {number: cohort.Cohort(clients, clients[:1]) for number, clients in cohorts.items()}
    monkeypatch.setattr(cohort, "draw_cohort", lambda run, number: drawn[number])
    run = prepare(config)
    simulator = Simulator([run])
    params, state, one = run_round(simulator, run.stages[0], simulator.stack.place(setup.initial_params(run)), None, 1)
    assert (one["download_bytes"], one["upload_bytes"]) == (2 * 2 * model, model + upload)  # of client 0, of 8 images
    two = run_round(simulator, run.stages[0], params, state, 2)[2]
    assert two["download_bytes"] == 3 * (model + upload) + 2 * model
    assert two["upload_bytes"] == model + upload // 2  # of client 1, of 2 images
    resumed = Simulator([run])
    again, resumed_state = resumed.resume(1, [state_to_save(params, state)])
    assert (
        run_round(resumed, run.stages[0], again, resumed_state, 2)[2].items()
        >= {k: two[k] for k in ("loss", "download_bytes")}.items()
    )


def test_an_interrupted_run_continues_to_the_same_bits(tmp_path: Path) -> None:
    config = fedca_config(**BASE, additions__dictionary=4, federation__clients_per_round=2, partition__clients=6)
    train(config, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", Interrupting(2))
    found, _ = checkpoint.load(tmp_path / "parts" / "checkpoints")
    saved = found.state if found else {}
    assert saved["dictionary"]["filled"].any()
    train(config, tmp_path / "parts")
    encoders = [(tmp_path / name / "encoder.safetensors").read_bytes() for name in ("whole", "parts")]
    assert encoders[0] == encoders[1]
    a, b = (
        [{k: v for k, v in line.items() if k != "seconds"} for line in WorkDir(tmp_path / n, config).metrics()]
        for n in ("whole", "parts")
    )
    assert a == b


def test_a_dictionary_goes_with_frozen_layers() -> None:
    run = prepare(small_config(objective__name="mocov3", additions__dictionary=2))
    simulator = Simulator([run])
    params = simulator.stack.place(setup.initial_params(run))
    _, state, _ = run_round(simulator, run.stages[1], params, None, 1)
    assert state.exchange["filled"].all()
    np.testing.assert_allclose(np.linalg.norm(state.exchange["dictionary"], axis=1)[:2], 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"additions__dictionary": 4, "objective__name": "byol"},
            "additions.dictionary: 4 embeddings would be negatives, but objective.name byol uses none; accepted: 0, or "
            "objective.name simclr or mocov3",
        ),
        ({"additions__base_steps": 3}, "additions.base_steps: 3 steps would train a base model that no term uses"),
        ({**BASE, "additions__terms": ("base=0",)}, "additions.base_steps: 2 steps would train a base model"),
        ({**BASE, "strategy__name": "layerwise"}, "additions.terms: base aligns whole models"),
        ({**BASE, "additions__base_steps": 0}, "additions.base_steps: 0 steps cannot train the model"),
        ({**BASE, "partition__server_share": 0.0}, "partition.server_share: 0.0 leaves no public images"),
    ],
)
def test_what_cannot_be_had_is_refused(changes: dict[str, Any], message: str) -> None:
    config = fedca_config(**changes)
    with pytest.raises(ConfigError) as error:
        setup.prepare(config)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert "accepted: " in str(error.value)
    with pytest.raises(ConfigError):
        check_method(config)  # what the `resources` command asks first


def test_processes_that_hold_no_checkpoint_take_up_trees_of_the_same_form() -> None:
    """Several processes broadcast what the first has restored; round 2 ends a stage."""
    config = small_config(additions__dictionary=2, objective__name="simclr", federation__rounds=6)
    run = setup.prepare(config)
    simulator = Simulator([run])
    params, state = run_round(simulator, run.stages[0], simulator.stack.place(setup.initial_params(run)), None, 1)[:2]
    for rounds in (1, 2):
        first = simulator.resume(rounds, [jax.device_get(state_to_save(params, state))])
        other = simulator.resume(rounds, [{}])
        assert jax.tree.structure(first) == jax.tree.structure(other)
        assert (first[1] is None) == (rounds == 2)
