"""ResNet-18 against independent NumPy, its statistics, how it splits, and through whole rounds."""

import json
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import run_round, small_config
from safetensors.numpy import load_file

from lwfedssl_jax import tree
from lwfedssl_jax.config import ModelConfig
from lwfedssl_jax.costs import ledger
from lwfedssl_jax.costs.operations import count
from lwfedssl_jax.evaluation import export
from lwfedssl_jax.experiment import train
from lwfedssl_jax.method.stages import Stage, freeze, make_stages
from lwfedssl_jax.method.task import make_task
from lwfedssl_jax.models.encoder import Encoder
from lwfedssl_jax.models.resnet import resnet
from lwfedssl_jax.simulation import events, program, setup
from lwfedssl_jax.simulation.simulator import Simulator
from lwfedssl_jax.workdir import WorkDir

RESNET: dict[str, Any] = {
    "model__name": "resnet18",
    "model__patch_size": 0,
    "model__heads": 0,
    "model__width": 4,
    "data__image_size": 12,
}
REAL = np.array([True, False, True, True])


def make(
    depth: int = 2, stem: str = "imagenet", dtype: Any = jnp.float32, size: int = 12, **options: bool
) -> tuple[Encoder, tree.Tree]:
    config = ModelConfig(name="resnet18", width=4, depth=depth, stem=stem)  # type: ignore[arg-type]
    encoder = resnet(config, (size, size, 3), dtype, **options)
    params = jax.jit(encoder.init)(jax.random.key(0))
    # Away from the neutral initial values of norms and their averages, so that each of them counts.
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))
    return encoder, jax.tree.map(lambda x: x + jax.random.uniform(next(keys), x.shape, x.dtype, 0.1, 0.3), params)


def images(views: int, dtype: Any = np.float32, size: int = 12) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(views * len(REAL), size, size, 3)).astype(dtype)


def split(encoder: Encoder, params: tree.Tree, frozen_depth: int, depth: int) -> list[tree.Tree]:
    """The frozen and the trainable part of a stage."""
    return [tree.take(params, tree.rows(mask)) for mask in freeze(encoder.layers(params), frozen_depth, depth)]


def whole(encoder: Encoder, params: tree.Tree, depth: int = 2) -> tree.Tree:
    return split(encoder, params, 0, depth)[1]


def numpy_conv(x: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
    """Torch's cross-correlation with padding k // 2, tap by tap."""
    k = len(kernel)
    out = -(-x.shape[1] // stride)
    x = np.pad(x, [(0, 0), (k // 2, k // 2), (k // 2, k // 2), (0, 0)])
    span = stride * (out - 1) + 1
    return sum(x[:, i : i + span : stride, j : j + span : stride] @ kernel[i, j] for i in range(k) for j in range(k))


def numpy_resnet(params: tree.Tree, x: np.ndarray, frozen_depth: int, depth: int, stem: str) -> tuple[Any, dict]:
    """One view: features of the real samples, and the running averages of layers that are not frozen."""
    averages: dict[str, np.ndarray] = {}
    frozen = True

    def conv_norm(x: np.ndarray, *path: str, stride: int = 1) -> np.ndarray:
        weights, stored = params["encoder"], params["statistics"]
        for name in path:
            weights, stored = weights[name], stored[name]
        x = numpy_conv(x, weights["conv"]["kernel"], stride)
        mean, var = stored["norm"]["mean"], stored["norm"]["var"]
        if not frozen:
            values = x[REAL].reshape(-1, x.shape[-1])
            batch = {"mean": values.mean(0), "var": ((values - values.mean(0)) ** 2).mean(0)}
            for kind, value in batch.items():
                averages[".".join([*path, "norm", kind])] = 0.9 * stored["norm"][kind] + 0.1 * value
            mean, var = batch["mean"], batch["var"]
        return (x - mean) / np.sqrt(var + 1e-5) * weights["norm"]["scale"] + weights["norm"]["bias"]

    frozen = frozen_depth >= 1
    if stem == "small":
        x = np.maximum(conv_norm(x, "stem", "conv1"), 0)
    else:
        x = np.maximum(conv_norm(x, "stem", "conv1", stride=2), 0)
        padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])  # by zeros: after a ReLU they are never above
        h = x.shape[1]
        x = np.max([padded[:, i : i + h : 2, j : j + h : 2] for i in range(3) for j in range(3)], axis=0)
    for s in range(1, depth + 1):
        frozen = s <= frozen_depth
        for b in (1, 2):
            at, stride = (f"layer{s}", f"block{b}"), 2 if s > 1 and b == 1 else 1
            y = np.maximum(conv_norm(x, *at, "conv1", stride=stride), 0)
            y = conv_norm(y, *at, "conv2")
            x = np.maximum(y + (conv_norm(x, *at, "downsample", stride=stride) if stride > 1 else x), 0)
    return x.mean((1, 2)), averages


def by_name(part: tree.Tree) -> dict[str, np.ndarray]:
    return {".".join(k.key for k in path): np.asarray(x) for path, x in jax.tree.leaves_with_path(part)}


@pytest.mark.parametrize(
    ("stem", "frozen_depth", "depth", "backend"),
    [("imagenet", 0, 3, "cpu"), ("small", 1, 2, "cpu"), ("imagenet", 1, 3, "gpu"), ("small", 2, 2, "cpu")],
)
def test_frozen_and_trainable_parts_equal_numpy(
    stem: str, frozen_depth: int, depth: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored statistics below, each view's own above, new averages of these; reshaped where a stage ends early."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # which way of convolving
    with jax.enable_x64(True):
        encoder, params = make(3, stem, jnp.float64)
        x = images(2, np.float64)
        frozen, trainable = split(encoder, params, frozen_depth, depth)
        if frozen_depth == depth:  # as evaluation does
            trainable = jax.tree.map(lambda _: None, params)

        @jax.jit
        def run(frozen: tree.Tree, trainable: tree.Tree, x: jax.Array) -> tuple[jax.Array, tree.Tree]:
            x = encoder.frozen_forward(frozen, x, 0, None)
            return encoder.trainable_forward(trainable, x, jnp.asarray(REAL), 0, None)

        z, statistics = run(frozen, trainable, jnp.asarray(x))
        found, averages = np.asarray(z), by_name(statistics)
        assert found.dtype == np.float64
        assert jax.tree.structure(statistics) == jax.tree.structure(trainable["statistics"])
        params = jax.device_get(params)
    views = [numpy_resnet(params, view, frozen_depth, depth, stem) for view in np.split(x, 2)]
    expected = np.concatenate([z[REAL] for z, _ in views])
    if frozen_depth < depth < 3:
        reshape = params["encoder"][f"reshape{depth}"]
        expected = expected @ reshape["kernel"] + reshape["bias"]
        assert found.shape[1] == encoder.feature_dim
    np.testing.assert_allclose(found[np.tile(REAL, 2)], expected, rtol=1e-9)
    assert set(averages) == set(views[0][1])
    for name, value in averages.items():
        np.testing.assert_allclose(value, np.mean([a[name] for _, a in views], axis=0), rtol=1e-9, err_msg=name)


def loss_of(encoder: Encoder, depth: int = 2) -> Any:
    """``(params, images, mask) -> ((loss, (features, statistics)), gradients)`` of end-to-end training."""

    def loss(weights: tree.Tree, statistics: tree.Tree, x: jax.Array, mask_B: jax.Array) -> Any:
        part = {"encoder": weights, "statistics": statistics}
        z, new = encoder.trainable_forward(part, x, mask_B, 0, None)
        real = jnp.tile(mask_B, len(z) // len(mask_B))
        return (jnp.where(real[:, None], z, 0) ** 3).sum(), (z, new)

    def run(params: tree.Tree, x: jax.Array, mask_B: jax.Array) -> Any:
        part = whole(encoder, params, depth)
        return jax.value_and_grad(loss, has_aux=True)(part["encoder"], part["statistics"], x, mask_B)

    return run


def assert_near(a: tree.Tree, b: tree.Tree, tolerance: float = 1e-4) -> None:
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * float(jnp.abs(y).max())), a, b
    )


def test_padding_and_remat_change_nothing() -> None:
    encoder, params = make(1)
    x = images(2)
    (value, (z, statistics)), grads = jax.jit(loss_of(encoder, 1))(params, x[np.tile(REAL, 2)], jnp.ones(3, bool))
    x[~np.tile(REAL, 2)] *= 1e6
    for e in (encoder, make(1, remat=True)[0]):
        (found, (z_padded, averages)), found_grads = jax.jit(loss_of(e, 1))(params, x, jnp.asarray(REAL))
        assert_near(found, value)
        assert_near(z_padded[np.tile(REAL, 2)], z)
        assert_near(averages, statistics)
        assert_near(found_grads, grads)


def test_a_single_real_sample_stays_finite() -> None:
    """Single pixels have no variance then; what padding differs by would grow with every layer and overflow."""
    encoder, params = make(size=4)
    result = jax.jit(loss_of(encoder))(params, images(2, size=4), jnp.arange(4) == 1)
    (_, (z, _)), _ = result
    chex.assert_tree_all_finite(result)
    np.testing.assert_allclose(z.reshape(2, 4, -1), jnp.tile(z.reshape(2, 4, -1)[:, 1:2], (1, 4, 1)), rtol=1e-4)


def test_clients_by_vmap_equal_clients_by_map() -> None:
    encoder, params = make(1)
    clients = jax.tree.map(lambda x: jnp.stack([x, 1.2 * x]), params)
    x = jnp.stack([images(2), images(2)[::-1]])
    run = lambda c: loss_of(encoder, 1)(*c, jnp.asarray(REAL))  # noqa: E731
    by_vmap, by_map = jax.jit(jax.vmap(run))((clients, x)), jax.jit(lambda c: jax.lax.map(run, c))((clients, x))
    assert_near(by_vmap, by_map)


def test_bfloat16_computes_near_float32_with_float32_parameters() -> None:
    encoder, params = make()
    half, fresh = make(dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(fresh)} == {jnp.dtype(jnp.float32)}
    x, mask = jnp.asarray(images(1)), jnp.asarray(REAL)
    run = lambda e: jax.jit(e.trainable_forward, static_argnums=(3, 4))(whole(e, params), x, mask, 0, None)  # noqa: E731
    (z, statistics), (z_half, statistics_half) = run(encoder), run(half)
    assert z_half.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(statistics_half)} == {jnp.dtype(jnp.float32)}
    assert 0 < float(jnp.abs(z_half - z)[REAL].max() / jnp.abs(z).max()) < 0.1
    assert_near(statistics_half, statistics, 0.05)


@pytest.mark.parametrize(("stem", "backend"), [("imagenet", "cpu"), ("imagenet", "gpu"), ("small", "cpu")])
def test_parameters_and_operations_of_the_full_size(stem: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters are torchvision's without the classifier; operations are counted by hand."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)  # both ways of convolving count alike
    parameters, operations = {}, {}
    for remat in (False, True):
        config = ModelConfig(name="resnet18", width=64, depth=4, stem=stem)  # type: ignore[arg-type]
        encoder = resnet(config, (32, 32, 3), jnp.float32, remat=remat)
        params = jax.eval_shape(encoder.init, jax.random.key(0))
        shapes = jax.eval_shape(lambda p, e=encoder: whole(e, p, 4), params)
        x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

        def forward(weights: tree.Tree, statistics: tree.Tree, x: jax.Array, e: Encoder = encoder) -> jax.Array:
            part = {"encoder": weights, "statistics": statistics}
            return e.trainable_forward(part, x, jnp.ones(2, bool), 0, None)[0].sum()

        parts = (shapes["encoder"], shapes["statistics"], x)
        parameters[remat] = tree.size(shapes["encoder"])
        operations[remat] = [count(jax.make_jaxpr(f)(*parts)) // 2 for f in (forward, jax.grad(forward))]
    taps, pixels = (7 * 7, 16**2) if stem == "imagenet" else (3 * 3, 32**2)
    assert parameters == dict.fromkeys((False, True), 11_176_512 - (7 * 7 - taps) * 3 * 64)
    of_stem = pixels * taps * 3 * 64
    pixels = 8**2 if stem == "imagenet" else 32**2
    once = of_stem + 4 * pixels * 9 * 64**2
    for c in (128, 256, 512):
        pixels //= 4
        once += pixels * (3 * 9 * c * c + 9 * c * c // 2 + c * c // 2)
    # Nothing asks for the gradient of the images. Blocks are recomputed whole, the stem is not.
    assert operations == {False: [once, 3 * once - of_stem], True: [once, 4 * once - 2 * of_stem]}


def test_a_reshape_layer_is_in_its_own_stage_only() -> None:
    config = small_config(**RESNET)
    encoder = make_task(config).encoder
    params = jax.eval_shape(encoder.init, jax.random.key(0))

    def names(mask: tree.Tree) -> set[str]:
        assert {k for k, v in mask["statistics"].items() if any(jax.tree.leaves(v))} == {
            k for k, v in mask["encoder"].items() if any(jax.tree.leaves(v)) and "reshape" not in k
        }
        return {k for k, v in mask["encoder"].items() if any(jax.tree.leaves(v))}

    stages = make_stages(config, encoder.layers(params))
    assert [names(s.trainable) for s in stages] == [{"stem", "layer1", "reshape1"}, {"layer2", "reshape2"}, {"layer3"}]
    assert [names(s.frozen) for s in stages] == [set(), {"stem", "layer1"}, {"stem", "layer1", "layer2"}]


def interrupt(event: events.Event) -> None:
    """Presses Ctrl-C as soon as the second round has ended."""
    if isinstance(event, events.RoundDone) and event.line["round"] == 2:
        raise KeyboardInterrupt


def test_layerwise_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds by hand, watched, and as a run that is interrupted and continues to the same bits."""
    # Other strategies' ledgers and programs of the same stages would be traced again and again.
    monkeypatch.setattr(ledger, "all_strategies", lambda config, **_: {"layerwise": ledger.make_ledger(config)})
    compile_stage, programs = program.compile_stage, dict[int, program.Program]()

    def compile_once(run: setup.Prepared, stage: Stage, *rest: Any) -> program.Program:
        if stage.number not in programs:
            programs[stage.number] = compile_stage(run, stage, *rest)
        return programs[stage.number]

    monkeypatch.setattr(program, "compile_stage", compile_once)
    config = small_config(**RESNET, model__depth=2, runtime__lanes=1, federation__local_epochs=1)
    run = setup.prepare(config)
    simulator = Simulator([run])
    params, lines = simulator.stack.place(setup.initial_params(run)), []
    for stage in run.stages:
        for number in range(stage.first_round + 1, stage.first_round + stage.rounds + 1):
            after, _, line = run_round(simulator, stage, params, None, number)
            lines.append(line)
            changed = jax.tree.map(lambda x, y: bool(np.any(np.asarray(x) != np.asarray(y))), params, after)
            # All that is trained moves, statistics too, and not a bit of all else does.
            assert jax.tree.all(jax.tree.map(lambda c, m: c == bool(m), changed, stage.trainable))
            params = after
    assert [line["stage"] for line in lines] == [1, 1, 2]
    assert np.isfinite([line["loss"] for line in lines]).all()

    with pytest.raises(KeyboardInterrupt):
        train.train(config, WorkDir(tmp_path / "run", config), interrupt)
    train.train(config, WorkDir(tmp_path / "run", config))
    found = load_file(tmp_path / "run" / "encoder.safetensors")
    expected = export.state_dict(config.model, run.task, params)
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [(line["round"], line["depth"]) for line in written if line.get("event") == "evaluation"]
    assert list(dict.fromkeys(evaluations)) == [(0, 2), (2, 1), (3, 2)]
