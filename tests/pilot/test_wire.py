"""The bytes of messages: exactly as many as the ledger counts, and refused where they are not what they should be."""

import hashlib
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rounds import prepare

from lwfedssl_jax.config import load, override, resolve
from lwfedssl_jax.costs.traffic import make_traffic
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.pilot import protocol
from lwfedssl_jax.pilot.cache import LayerCache
from lwfedssl_jax.pilot.protocol import Ask, Hello, Message, ProtocolError, Refused, Result, Train
from lwfedssl_jax.pilot.relay import Counted
from lwfedssl_jax.pilot.wire import Wire, WireError
from lwfedssl_jax.simulation.program import make_broadcast
from lwfedssl_jax.simulation.setup import Prepared, initial_params
from lwfedssl_jax.tree import Tree

# Three layers, two per stage: the last stage has idle rows.
FIELDS = {"model.depth": 3, "model.width": 32, "model.heads": 4, "strategy.layers_per_stage": 2}


def run_of(**fields: object) -> tuple[Prepared, Wire, Tree]:
    changes = FIELDS | {name.replace("__", "."): value for name, value in fields.items()}
    run = prepare(resolve(override(load("quickstart"), changes)))
    return run, Wire(run), jax.device_get(initial_params(run))


def trained_part(run: Prepared, stage: Stage, params: Tree, seed: int) -> tuple[Tree, Tree]:
    """A stage's broadcast, and a trained part of it: nothing in the idle rows has changed."""
    broadcast = make_broadcast(stage, params, stage.rows, stage.depths)
    rng = np.random.default_rng(seed)

    def change(x: jax.Array, present: jax.Array) -> np.ndarray:
        rows = np.expand_dims(present, tuple(range(np.ndim(present), x.ndim)))
        return np.asarray(x) + rows * rng.normal(size=x.shape).astype(np.float32)

    return broadcast, jax.tree.map(change, broadcast.trainable, broadcast.present)


@pytest.mark.parametrize("strategy", ["layerwise", "progressive", "end_to_end"])
def test_models_have_the_bytes_that_the_ledger_counts_and_arrive_whole(strategy: str) -> None:
    run, wire, params = run_of(strategy__name=strategy)
    traffic = make_traffic(run.config, params, run.layers, 3)
    for stage in run.stages:
        trainable = wire.trainable(stage, params)
        layers = {number: wire.layer(number, params) for number in range(1, stage.frozen_depth + 1)}
        broadcast, trained = trained_part(run, stage, params, 0)
        update = wire.update(stage, trained)
        predicted = traffic.round_bytes(stage, list(layers))
        assert predicted == (len(trainable) + sum(map(len, layers.values())), len(update))
        there = wire.params(stage, trainable, layers)
        exists = jax.tree.map(lambda a, b: a | b, stage.trainable, stage.frozen)
        for kept, here, sent in zip(*map(jax.tree.leaves, (exists, there, params)), strict=True):
            np.testing.assert_array_equal(here[kept], sent[kept])
            assert not here[~kept].any()
        received = wire.read_update(stage, update, jax.device_get(broadcast.trainable))
        jax.tree.map(np.testing.assert_array_equal, received, trained)


@pytest.mark.parametrize("compression", ["int8", "top=0.01", "top=0.3", "top=1"])
@pytest.mark.parametrize("strategy", ["layerwise", "progressive"])
def test_compressed_updates_have_the_bytes_that_the_ledger_counts_and_arrive_whole(
    strategy: str, compression: str
) -> None:
    run, wire, params = run_of(strategy__name=strategy, federation__compression=compression)
    traffic = make_traffic(run.config, params, run.layers, 1)
    for stage in run.stages:
        broadcast, trained = trained_part(run, stage, params, 1)
        packing = run.method.compression
        assert packing
        message = packing.pack(jax.random.key(0), broadcast, trained)
        content = wire.update(stage, jax.device_get(message))
        assert len(content) == traffic.round_bytes(stage, [])[1]
        received = wire.read_update(stage, content, jax.device_get(broadcast.trainable))
        unpacked = (packing.unpack(broadcast, m) for m in (message, received))
        jax.tree.map(np.testing.assert_array_equal, *unpacked)


def test_positions_in_idle_rows_become_others_with_the_same_update() -> None:
    """Where an update is zero almost everywhere, the largest values may be zeros of idle rows."""
    run, wire, params = run_of(strategy__name="progressive", federation__compression="top=0.3")
    packing, stage = run.method.compression, run.stages[0]
    assert packing
    broadcast = make_broadcast(stage, params, stage.rows, stage.depths)
    message = jax.device_get(packing.pack(jax.random.key(0), broadcast, broadcast.trainable))
    received = wire.read_update(stage, wire.update(stage, message), jax.device_get(broadcast.trainable))
    jax.tree.map(np.testing.assert_array_equal, packing.unpack(broadcast, received), broadcast.trainable)


def test_bytes_that_are_not_what_they_should_be_are_refused() -> None:
    run, wire, params = run_of(strategy__name="layerwise")
    stage = run.stages[1]
    trainable, sent = wire.trainable(stage, params), make_broadcast(stage, params, stage.rows, stage.depths).trainable
    for wrong in (b"", trainable[:-1], trainable + b"\0"):
        with pytest.raises(WireError, match="bytes of parameters where"):
            wire.params(stage, wrong, {})
        with pytest.raises(WireError, match="bytes of parameters where"):
            wire.read_update(stage, wrong, jax.device_get(sent))
    with pytest.raises(WireError, match="bytes of parameters where"):
        wire.params(stage, trainable, {1: wire.layer(1, params)[:-4]})
    run, wire, params = run_of(strategy__name="layerwise", federation__compression="top=0.01")
    stage = run.stages[0]
    with pytest.raises(WireError, match="bytes where"):
        wire.read_update(stage, b"\0" * 12, jax.device_get(sent))
    size = make_traffic(run.config, params, run.layers, 1).round_bytes(stage, [])[1]
    with pytest.raises(WireError, match="positions"):  # all of them the first one
        wire.read_update(stage, b"\0" * size, jax.device_get(sent))


def test_a_layer_has_another_hash_if_any_of_it_differs() -> None:
    _, wire, params = run_of(strategy__name="layerwise")
    content = wire.layer(1, params)
    changed = bytes([content[0] ^ 1]) + content[1:]
    assert wire.digest(1, content) == hashlib.sha256(wire.header(1) + content).hexdigest()
    assert len({wire.digest(1, content), wire.digest(1, changed), wire.digest(1, wire.layer(2, params))}) == 3


def test_the_cache_gives_what_was_put_or_nothing(tmp_path: Path) -> None:
    cache = LayerCache(tmp_path / "layers", limit=250)
    contents = [bytes([i]) * 100 for i in range(3)]
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    for content, digest in zip(contents[:2], digests[:2], strict=True):
        cache.put(digest, content)
    assert [cache.get(digest) for digest in digests] == [*contents[:2], None]
    (tmp_path / "layers" / digests[1]).write_bytes(b"damaged")
    assert cache.get(digests[1]) is None
    assert cache.digests() == [digests[0]]
    outside = tmp_path / "outside"
    outside.write_text("not a layer")
    for name in ("../outside", str(outside), "", "A" * 64):
        assert cache.get(name) is None
        cache.put(name, b"x")
    assert outside.read_text() == "not a layer"
    cache.put(digests[1], contents[1])
    cache.put(digests[2], contents[2])
    assert len(cache.digests()) == 2
    assert digests[2] in cache.digests()


COUNTED = Counted(5000, 4000, 300, 10.5, 2.25)
HELLO = Hello("pi", "b", "s", "p", 4, 2**32, 2**31, 2**28, 12, "d", "", *COUNTED)
TRAIN = Train("r", 1, 2, 0, "{}", "", 60.0, {"trainable": b"\0\1"})
RESULT = Result("r", 1, 0, 12, 1.25, 24, 48, 0.5, 0.0, 0.25, 2**30, 2**20, *COUNTED, {"update": b"\2"})


@pytest.mark.parametrize("content", [Ask(), HELLO, TRAIN, RESULT, Refused("why")])
def test_messages_come_back_as_they_were(content: protocol.Content) -> None:
    assert protocol.read(protocol.write(content)) == content


@given(
    name=st.sampled_from(sorted({*protocol.write(RESULT).fields} - {"version"})),
    value=st.one_of(st.none(), st.text(), st.booleans(), st.binary(), st.floats(), st.integers(2, 3)),
)
def test_damaged_messages_are_refused_or_of_the_right_types(name: str, value: object) -> None:
    message = protocol.write(RESULT)
    damaged = Message(message.kind, message.fields | {name: value}, message.arrays)  # type: ignore[dict-item]
    try:
        content = protocol.read(damaged)
    except ProtocolError:
        return
    right = float | int if isinstance(getattr(RESULT, name), float) else type(getattr(RESULT, name))
    assert isinstance(getattr(content, name), right)


def test_other_versions_kinds_and_missing_fields_are_refused() -> None:
    message = protocol.write(TRAIN)
    for damaged, what in [
        (message._replace(fields=message.fields | {"version": 1}), "protocol 1; accepted: 2"),
        (message._replace(kind="Run"), "a message 'Run'; accepted: Ask, Hello"),
        (message._replace(fields={"version": 2}), "whose run is None"),
        (message._replace(arrays={"trainable": "text"}), "not bytes"),  # type: ignore[dict-item]
    ]:
        with pytest.raises(ProtocolError, match=what):
            protocol.read(damaged)
