"""Rounds with differential privacy: sensitivity, empty and Poisson cohorts, keys, stacks, runs that go on."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import run_round, small_config
from rounds import max_difference
from runs import Interrupting, train

from lwfedssl_jax import tree
from lwfedssl_jax.config import Config, override
from lwfedssl_jax.data.partition import Population
from lwfedssl_jax.method.task import weights_of
from lwfedssl_jax.simulation import cohort, setup
from lwfedssl_jax.simulation.simulator import Simulator
from lwfedssl_jax.workdir import WorkDir

pytestmark = pytest.mark.usefixtures("cheap_views")
SIZES = [8, 6, 5, 4]
CLIPPED: dict[str, Any] = {"privacy__clip": 0.001, "optimizer__batch_size": 4}
NOISY = CLIPPED | {"privacy__noise_multiplier": 1.0}


@pytest.fixture(scope="module")
def cache() -> setup.Cache:
    return setup.Cache()


def prepare(config: Config, examples: np.ndarray | None = None, sizes: list[int] = SIZES) -> setup.Prepared:
    """A run over four clients whose images are the first ones, or those that are given."""
    run = setup.prepare(config, jax.devices()[:1])
    examples = np.arange(sum(SIZES)) if examples is None else examples
    return run._replace(clients=Population.disjoint(examples, np.array(sizes)))


def sum_of_updates(run: setup.Prepared, number: int, cache: setup.Cache) -> tuple[np.ndarray, dict[str, Any]]:
    """What a round adds to the global model, times the clients that were expected; and the round's line."""
    stage = next(stage for stage in run.stages if number <= stage.last_round)
    before = setup.initial_params(run)
    simulator = Simulator([run], cache=cache)
    after, _, line = run_round(simulator, stage, simulator.stack.place(before), None, number)
    change = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), after, before)
    change = np.concatenate([np.ravel(x) for x in jax.tree.leaves(weights_of(change))])
    return change * cohort.expected_reports(run, number), line


@pytest.mark.parametrize(
    ("strategy", "lanes", "feed"),
    [
        ("layerwise", 1, "resident"),
        ("layerwise", 3, "streamed"),
        ("progressive", 3, "resident"),
        ("end_to_end", 1, "streamed"),
    ],
)
def test_a_client_moves_the_sum_by_at_most_its_clip(strategy: str, lanes: int, feed: str, cache: setup.Cache) -> None:
    config = small_config(**CLIPPED, strategy__name=strategy, runtime__lanes=lanes, runtime__feed=feed)
    number = 2  # a stage with frozen layers
    everyone, line = sum_of_updates(prepare(config), number, cache)
    clip = line["clip_norm"]
    assert line["share_clipped"] == 1  # the clip binds
    others = np.arange(sum(SIZES))
    others[:8] = np.arange(30, 38)  # the first client has other images
    replaced, _ = sum_of_updates(prepare(config, others), number, cache)
    without = np.arange(8, sum(SIZES))
    removed, after = sum_of_updates(prepare(config, without, [0, *SIZES[1:]]), number, cache)
    assert after["clients"] == 3
    assert 0.1 * clip < np.linalg.norm(everyone - replaced) <= 2.001 * clip
    assert 0.99 * clip < np.linalg.norm(everyone - removed) <= 1.001 * clip  # all of its update is the clip
    assert np.linalg.norm(everyone) <= 4.001 * clip


def test_a_round_without_a_client_has_its_noise(cache: setup.Cache) -> None:
    config = small_config(**NOISY)
    run = prepare(config, np.zeros(0, int), [0, 0, 0, 0])
    change, line = sum_of_updates(run, 2, cache)
    assert (line["clients"], line["loss"], line["signal_norm"], line["share_clipped"]) == (0, None, 0, 0)
    assert np.linalg.norm(change) == pytest.approx(4 * line["noise_norm"], rel=1e-3)
    size = np.count_nonzero(change)
    assert np.std(change[change != 0]) == pytest.approx(line["clip_norm"], rel=5 / np.sqrt(size))  # z is 1


def test_noise_is_that_of_the_round_and_differs_between_stages_heads_and_seeds(cache: setup.Cache) -> None:
    def noise(number: int, **changes: Any) -> np.ndarray:
        run = prepare(small_config(**NOISY | changes), np.zeros(0, int), [0, 0, 0, 0])
        stage = run.stages[number - 1]
        simulator = Simulator([run], cache=cache)
        before = setup.initial_params(run)
        after, *_ = run_round(simulator, stage, simulator.stack.place(before), None, number)
        heads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), after["projection"], before["projection"])
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(heads)])

    first, again, second, other = noise(1), noise(1), noise(2), noise(1, runtime__seed=1, runtime__init_seed=0)
    np.testing.assert_array_equal(first, again)
    for different in (second, other):
        assert abs(np.corrcoef(first, different)[0, 1]) < 4 / np.sqrt(len(first))


def test_the_bits_of_a_secure_sum_are_the_bytes_of_a_round(cache: setup.Cache) -> None:
    config = small_config(**CLIPPED, privacy__secure_sum_bits=12, strategy__name="end_to_end")
    change, line = sum_of_updates(prepare(config), 1, cache)
    size = change.size
    assert line["upload_bytes"] == 4 * -(-size * 12 // 8)
    assert line["download_bytes"] == 4 * 4 * size
    assert line["wrapped"] == 0
    plain, _ = sum_of_updates(prepare(small_config(**CLIPPED, strategy__name="end_to_end")), 1, cache)
    assert np.corrcoef(change, plain)[0, 1] > 0.95


def test_poisson_cohorts_are_independent_draws() -> None:
    config = small_config(
        federation__sampling="poisson", federation__clients_per_round=5, partition__kind="shared",
        partition__clients=20, partition__examples_per_client=8, federation__rounds=2000,
    )  # fmt: skip
    run = setup.prepare(config)
    drawn = np.zeros((2000, 20))
    for number in range(1, 2001):
        drawn[number - 1, cohort.draw_cohort(run, number).drawn] = 1
    assert cohort.expected_reports(run, 1) == 5
    assert drawn.mean(0) == pytest.approx(np.full(20, 0.25), abs=4 * np.sqrt(0.25 * 0.75 / 2000))
    assert drawn.sum(1).var() == pytest.approx(20 * 0.25 * 0.75, rel=0.15)  # a fixed cohort's is 0
    pairs = np.corrcoef(drawn.T)[np.triu_indices(20, 1)]
    assert np.abs(pairs).max() < 4.5 / np.sqrt(2000)


def test_the_server_calibrates_also_after_a_round_without_a_client(cache: setup.Cache) -> None:
    """Whether it did would tell that nobody was drawn."""
    calibrated = {"additions__calibration_steps": 1, "partition__server_share": 0.2, "model__depth": 2}
    run = prepare(small_config(**NOISY | calibrated), np.zeros(0, int), [0, 0, 0, 0])
    _, line = sum_of_updates(run, 2, cache)
    assert line["clients"] == 0
    assert line["calibration_loss"] > 0


POISSON = NOISY | {"federation__sampling": "poisson", "federation__clients_per_round": 2}


def run_stacked(runs: list[setup.Prepared], cache: setup.Cache) -> list[tuple[tree.Tree, list[dict[str, Any]]]]:
    simulator = Simulator(runs, cache=cache)
    params, _ = simulator.resume(0, [{} for _ in runs])
    lines: list[list[dict[str, Any]]] = [[] for _ in runs]
    for number in (1, 2, 3):
        stage = runs[0].stages[number - 1]
        result = simulator.run_rounds(stage, params, None, number)
        params = result.params
        for i, outcome in enumerate(result.outcomes):
            lines[i].append(outcome.line)
    return [(jax.device_get(simulator.stack.select(i, params)), lines[i]) for i in range(len(runs))]


def test_stacked_runs_of_other_noise_and_seeds_are_those_alone(cache: setup.Cache, compiled: list[str]) -> None:
    changes: list[dict[str, Any]] = [
        {"privacy__noise_multiplier": 0.5},
        {"privacy__noise_multiplier": 2.0, "privacy__clip": 0.002, "runtime__seed": 3},
    ]
    runs = [setup.prepare(small_config(**POISSON | more), jax.devices()[:1]) for more in changes]
    together = run_stacked(runs, cache)
    alone = [run_stacked([runs[0]], cache)[0]]
    compiled.clear()
    alone.append(run_stacked([runs[1]], cache)[0])
    assert not [name for name in compiled if "stage" in name]  # clip, noise and seed are arguments
    for (params, lines), (expected, expected_lines) in zip(together, alone, strict=True):
        assert max_difference(params, expected) < 0.1 * min(line["clip_norm"] for line in lines)
        assert [line["clients"] for line in lines] == [line["clients"] for line in expected_lines]
        assert lines[-1]["noise_norm"] == pytest.approx(expected_lines[-1]["noise_norm"], rel=1e-4)


def test_noise_alone_is_a_run_whose_clients_learn_nothing(cache: setup.Cache) -> None:
    changes = {"optimizer__learning_rate": 1e-30, "optimizer__weight_decay": 0.0}
    run = setup.prepare(small_config(**POISSON | changes), jax.devices()[:1])
    ((learnt, lines),) = run_stacked([run], cache)
    clips = [np.array([line["clip_norm"] for line in lines])]
    alone = jax.device_get(Simulator([run], cache=cache).noise_only(clips))
    assert max_difference(learnt, alone) == 0
    assert max_difference(alone, setup.initial_params(run)) > 0


def test_a_private_run_that_is_interrupted_goes_on_to_the_same_model(tmp_path: Path) -> None:
    config = small_config(
        **POISSON,
        privacy__quantile=0.5,
        privacy__count_noise=2.0,
        federation__rounds=5,
        strategy__rounds_per_stage=(3, 1, 1),
    )
    whole = train(config, tmp_path / "whole")
    path = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        train(config, path, Interrupting(2))
    summary = train(config, path)
    assert summary["privacy"] == whole["privacy"]
    for name in ("encoder.safetensors", "metrics.jsonl"):
        ours, theirs = ((tmp_path / folder / name).read_bytes() for folder in ("parts", "whole"))
        if name == "metrics.jsonl":
            ours, theirs = (
                [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in text.splitlines()]
                for text in (ours, theirs)
            )
        assert ours == theirs
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [line["protocol"] for line in lines if line.get("baseline") == "noise_only"] == [
        "label_free", "linear_probe_5", "knn",
    ]  # fmt: skip
    assert set(summary["baselines"]["noise_only"]) == {"linear_probe_5", "knn"}
    assert set(summary["label_free"]) == {"trained", "untrained", "noise_only"}
    assert summary["label_free"]["trained"] != summary["label_free"]["noise_only"]
    spent = [line["epsilon"] for line in lines if "epsilon" in line]
    assert spent == sorted(spent)
    assert spent[-1] == summary["privacy"]["epsilon"]
    clips = [line["clip_norm"] for line in lines if "clip_norm" in line]
    assert len(set(clips[:3])) == 3  # it adapts within a stage
    assert WorkDir(path, config).summary is not None
    assert override(config, {"privacy.clip": 0.0, "privacy.quantile": 0.0, "privacy.noise_multiplier": 0.0}) != config
