"""The simulator around its rounds: lanes, memory, cohorts, traffic."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import known_traces, run_round, small_config
from PIL import Image

from lwfedssl_jax import tree
from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.costs import ledger
from lwfedssl_jax.simulation import events, feed, setup
from lwfedssl_jax.simulation import simulator as simulator_module
from lwfedssl_jax.simulation.cohort import draw_cohort, pack_cohort
from lwfedssl_jax.simulation.events import Note
from lwfedssl_jax.simulation.simulator import Simulator
from lwfedssl_jax.system import devices


@pytest.mark.usefixtures("cheap_views")
@pytest.mark.parametrize("strategy", ["layerwise", "progressive", "end_to_end"])
def test_ledger_equals_the_bytes_rounds_really_passed(strategy: str) -> None:
    """The ledger counts shapes; here the arrays themselves are weighed, as sent and as put back."""
    config = small_config(strategy__name=strategy)
    run = setup.prepare(config)
    params = setup.initial_params(run)
    simulator = Simulator([run])
    for stage, row in zip(run.stages, ledger.make_ledger(config, known_traces())["per_stage"], strict=True):
        sent = sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree.take(params, tree.rows(stage.trainable))))
        after, _, line = run_round(simulator, stage, simulator.stack.place(params), None, stage.number)
        changed = sum(
            int((np.asarray(a) != np.asarray(b)).reshape(n, -1).any(axis=1).sum()) * (np.asarray(a).nbytes // n)
            for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(params), strict=True)
            for n in [len(a) if a.shape[:1] == (config.model.depth,) else 1]
        )
        assert row["download_bytes"] == row["rounds"] * sent
        assert row["upload_bytes"] == row["rounds"] * changed
        # When a stage begins, everybody fetches the average of the layer that the one before has finished.
        finished = sum(
            x.nbytes // x.shape[0]
            for mask, x in zip(jax.tree.leaves(stage.frozen), jax.tree.leaves(params), strict=True)
            if np.ndim(mask) and mask[stage.frozen_depth - 1]
        )
        if stage.number == 2 and strategy == "layerwise":
            finished += sum(np.asarray(x).nbytes for x in jax.tree.leaves(params["encoder"]["embedding"]))
        assert line["download_bytes"] == config.partition.clients * (sent + finished)
        assert line["upload_bytes"] == config.partition.clients * sent
        params = after


def test_lanes_default_to_what_the_device_suggests_within_the_cohort() -> None:
    def choose(lanes: int, devices: int) -> tuple[int, int]:
        run = setup.prepare(small_config(runtime__lanes=lanes), jax.devices()[:devices])
        return run.lanes, run.mesh.size

    assert choose(0, 1) == (1, 1)
    assert choose(0, 4) == (4, 4)
    assert choose(3, 1) == (3, 1)
    assert choose(3, 2) == (4, 2)
    assert choose(2, 4) == (2, 2)
    assert choose(9, 1) == (4, 1)


def test_cohorts_are_drawn_without_repeats_and_drop_out_at_the_asked_rate() -> None:
    changes = {"partition__kind": "iid", "federation__clients_per_round": 10, "federation__dropout": 0.3}
    run = setup.prepare(small_config(partition__clients=20, **changes))
    drawn = [draw_cohort(run, number) for number in range(200)]
    assert all(len(set(cohort)) == 10 and set(reporting) <= set(cohort) for cohort, reporting, _ in drawn)
    assert np.mean([len(reporting) for _, reporting, _ in drawn]) == pytest.approx(7, abs=0.4)
    assert {c for cohort, _, _ in drawn for c in cohort} == set(range(20))
    assert drawn[3] == draw_cohort(run, 3)


@pytest.mark.parametrize(("kind", "clients"), [("iid", 40), ("quantity", 30)])
def test_clients_with_too_little_data_never_take_part_and_a_note_counts_them(kind: str, clients: int) -> None:
    """An objective learns nothing from one image."""
    heard: list[Any] = []
    run = setup.prepare(
        small_config(partition__clients=clients, partition__kind=kind, partition__allow_empty=True), hear=heard.append
    )
    cohort, reporting, too_few = draw_cohort(run, 1)
    assert cohort == reporting == np.flatnonzero(run.clients.sizes >= 2).tolist()
    assert too_few == clients - len(cohort)
    assert 0 < len(reporting) < clients
    one = int((run.clients.sizes == 1).sum())
    texts = [event.text for event in heard if isinstance(event, Note)]
    assert f"{one} of {clients} clients have fewer than 2 images, and do not train" in texts
    short = int((run.clients.sizes % run.config.optimizer.batch_size == 1).sum()) - one
    assert any(text.startswith(f"{short} of {clients} clients leave out") for text in texts) == (short > 0)


def test_data_of_which_no_client_has_enough_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"partition.clients: none of 60 clients has the 2 images that objective.name"
    ):
        setup.prepare(small_config(partition__clients=60))


@pytest.mark.usefixtures("cache_home")
def test_calls_of_natural_clients_take_their_images_from_a_mapped_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, rows = np.random.default_rng(0), ["file,client"]
    for label in ("a", "b", "."):  # the last ones have no label
        (tmp_path / "data" / "train" / label).mkdir(parents=True, exist_ok=True)
        for i in range(12):
            path = tmp_path / "data" / "train" / label / f"{i}.png"
            Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(path)
            rows.append(f"{path.relative_to(tmp_path / 'data')},{i % 3}")
    shutil.copytree(tmp_path / "data" / "train" / "a", tmp_path / "data" / "test" / "a")
    (tmp_path / "data" / "clients.csv").write_text("\n".join(rows))
    config = small_config(data__name=f"folder:{tmp_path}/data", partition__kind="natural", partition__clients=3)

    heard = list[events.Event]()
    run = setup.prepare(config, hear=heard.append)
    images = run.dataset.train_images
    assert isinstance(images, np.memmap)
    assert run.clients.sizes.tolist() == [12, 12, 12]
    calls = list(pack_cohort(run, [0, 1, 2], 1).calls)
    streamed = feed.streamed(images, np.asarray).serve(iter(calls))  # type: ignore[arg-type]
    for (pixels_WxNxHxWxC, plan, _), (whole, _) in zip(streamed, calls, strict=True):
        by_lane = pixels_WxNxHxWxC[np.arange(run.lanes)[:, None], plan.examples]
        np.testing.assert_array_equal(by_lane, images[whole.examples])
    assert heard[1:3] == [events.Loading(f"decoding {done} of 48 images") for done in (36, 48)]


def test_a_server_share_that_does_not_fit_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(partition__server_share=0.5)
    assert len(setup.prepare(config).server_images) == 30
    monkeypatch.setattr(simulator_module, "memory_limit", lambda mesh: 15 * 8 * 8 * 3 * 4)
    monkeypatch.setattr(setup, "memory_limit", lambda mesh: 15 * 8 * 8 * 3 * 4)
    with pytest.raises(ConfigError, match=r"partition\.server_share: 0\.5 gives .* GiB.*; accepted: at most 0\.25"):
        setup.prepare(config)


@pytest.mark.usefixtures("cheap_views")
@pytest.mark.parametrize("devices_used", [1, 4])
def test_lanes_shrink_to_the_memory_there_is_and_asked_ones_are_refused(
    devices_used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several CPU devices fewer are used, each with more of the machine's memory."""
    run = setup.prepare(small_config(partition__clients=8), jax.devices()[:devices_used])
    run, cache = run._replace(lanes=8), setup.Cache()
    stage = run.stages[0]
    each = devices.program_memory(Simulator([run], cache=cache).program(stage).steps)
    monkeypatch.setattr(simulator_module, "memory_limit", lambda mesh: int(0.7 * each * devices_used / mesh.size))
    monkeypatch.setattr(setup, "memory_limit", lambda mesh: int(0.7 * each * devices_used / mesh.size))
    simulator = Simulator([run], [stage], cache=cache)
    assert 1 <= simulator.run.lanes < 8
    assert devices.program_memory(simulator.program(stage).steps) <= 0.7 * each * devices_used / simulator.run.mesh.size
    asked = setup.prepare(small_config(partition__clients=8, runtime__lanes=8), jax.devices()[:devices_used])
    with pytest.raises(ConfigError, match=r"runtime\.lanes: 8 need .* GiB; accepted: at most about \d lanes"):
        Simulator([asked], [stage], cache=cache)
    monkeypatch.setattr(simulator_module, "memory_limit", lambda mesh: 1000)
    monkeypatch.setattr(setup, "memory_limit", lambda mesh: 1000)
    with pytest.raises(ConfigError, match=r"accepted: a smaller optimizer\.batch_size, runtime\.remat"):
        Simulator([run], [stage], cache=cache)
