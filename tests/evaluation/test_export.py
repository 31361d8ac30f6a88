"""The encoder's files: timm's and torchvision's names and layouts, the same features there and back here."""

import hashlib
import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, run_round, small_config
from safetensors.numpy import load, load_file, save

from lwfedssl_jax import load_encoder
from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.evaluation.export import ABOUT, METADATA, WEIGHTS, TrainedEncoder, encoder_files
from lwfedssl_jax.evaluation.frozen import BATCH, make_encode
from lwfedssl_jax.method.task import make_task
from lwfedssl_jax.simulation import setup
from lwfedssl_jax.simulation.simulator import Simulator
from lwfedssl_jax.tree import Tree
from lwfedssl_jax.workdir import WorkDir

WIDTH, PATCH, CHANNELS = 8, 4, 3
RESNET: dict[str, Any] = {"model__name": "resnet18", "model__patch_size": 0, "model__heads": 0}
TORCH_TOLERANCE = {"rtol": 0, "atol": 1e-4}  # the promise; what is found is about 1e-6


def write(config: Config, params: Tree, path: Path) -> Path:
    path.mkdir(exist_ok=True)
    WorkDir(path, config).save_encoder(encoder_files(config, make_task(config), params))
    return path


def random_params(config: Config) -> Tree:
    """No two numbers alike, running averages neither: whatever is mixed up shows."""
    rng = np.random.default_rng(0)
    params = jax.eval_shape(make_task(config).encoder.init, jax.random.key(0))

    def leaf(path: Any, x: jax.ShapeDtypeStruct) -> np.ndarray:
        if path[-1].key in ("var", "scale"):
            return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
        fan_in = np.prod(x.shape[:-1]) if x.ndim == 4 else x.shape[-2:][0]
        scale = fan_in**-0.5 if path[-1].key == "kernel" else 0.2
        if path[1].key == "embedding":
            scale = scale / 100  # so that LayerNorm's epsilon counts
        return rng.normal(0, scale, x.shape).astype(np.float32)

    return jax.tree.map_with_path(leaf, params)


def some_images(config: Config, n: int, channels: int = CHANNELS) -> np.ndarray:
    size = config.data.image_size
    return np.random.default_rng(1).integers(0, 256, (n, size, size, channels), dtype=np.uint8)


@pytest.fixture(scope="module")
def config() -> Config:
    return small_config(model__depth=2)


@pytest.fixture(scope="module")
def params(config: Config) -> Tree:
    return random_params(config)


@pytest.fixture(scope="module")
def written(config: Config, params: Tree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(config, params, tmp_path_factory.mktemp("export") / "vit")


def encode_as_the_run(config: Config, params: Tree, images: np.ndarray, batch: int = BATCH) -> np.ndarray:
    task = make_task(config)
    return make_encode(task.encoder, task.recipe, task.dtype)(params, images, config.model.depth, batch)


def test_a_vit_has_timms_names_and_shapes(written: Path) -> None:
    d = WIDTH
    expected: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, 4, d),
        "patch_embed.proj.weight": (d, CHANNELS, PATCH, PATCH),
        "patch_embed.proj.bias": (d,),
        "norm.weight": (d,),
        "norm.bias": (d,),
    }
    for i in (0, 1):
        expected |= {
            f"blocks.{i}.norm1.weight": (d,),
            f"blocks.{i}.norm1.bias": (d,),
            f"blocks.{i}.attn.qkv.weight": (3 * d, d),
            f"blocks.{i}.attn.qkv.bias": (3 * d,),
            f"blocks.{i}.attn.proj.weight": (d, d),
            f"blocks.{i}.attn.proj.bias": (d,),
            f"blocks.{i}.norm2.weight": (d,),
            f"blocks.{i}.norm2.bias": (d,),
            f"blocks.{i}.mlp.fc1.weight": (4 * d, d),
            f"blocks.{i}.mlp.fc1.bias": (4 * d,),
            f"blocks.{i}.mlp.fc2.weight": (d, 4 * d),
            f"blocks.{i}.mlp.fc2.bias": (d,),
        }
    found = load_file(written / WEIGHTS)
    assert {name: x.shape for name, x in found.items()} == expected
    assert {x.dtype for x in found.values()} == {np.dtype(np.float32)}


def torchvision_shapes(width: int, depth: int, channels: int, kernel: int) -> dict[str, tuple[int, ...]]:
    """Of its ResNet-18 without the classifier and the counters that evaluation does not use."""

    def norm(name: str, d: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{leaf}": (d,) for leaf in ("weight", "bias", "running_mean", "running_var")}

    shapes = {"conv1.weight": (width, channels, kernel, kernel)} | norm("bn1", width)
    for s in range(1, depth + 1):
        d = width * 2 ** (s - 1)
        before = d // 2 if s > 1 else d
        for block, c in ((0, before), (1, d)):
            name = f"layer{s}.{block}"
            shapes |= {f"{name}.conv1.weight": (d, c, 3, 3)} | norm(f"{name}.bn1", d)
            shapes |= {f"{name}.conv2.weight": (d, d, 3, 3)} | norm(f"{name}.bn2", d)
        if s > 1:
            name = f"layer{s}.0.downsample"
            shapes |= {f"{name}.0.weight": (d, before, 1, 1)} | norm(f"{name}.1", d)
    return shapes


@pytest.mark.parametrize(("depth", "stem", "kernel"), [(4, "imagenet", 7), (2, "small", 3)])
def test_a_resnet_has_torchvisions_names_and_shapes(depth: int, stem: str, kernel: int, tmp_path: Path) -> None:
    config = small_config(**RESNET, model__width=4, model__depth=depth, model__stem=stem)
    found = load_file(write(config, random_params(config), tmp_path) / WEIGHTS)
    assert {name: x.shape for name, x in found.items()} == torchvision_shapes(4, depth, CHANNELS, kernel)


def test_loaded_it_gives_the_runs_features(config: Config, params: Tree, written: Path) -> None:
    encode = load_encoder(written)
    assert encode.num_features == WIDTH
    assert encode.config["trained"] == {
        "data": "synthetic", "strategy": "layerwise", "objective": "simclr", "rounds": 3, "layers": 2,
    }  # fmt: skip
    for name in ("encoder", "statistics"):
        jax.tree.map(np.testing.assert_array_equal, encode.params[name], params[name])
    images = some_images(config, 300)
    expected = encode_as_the_run(config, params, images)
    assert np.std(expected, axis=0).min() > 0.01
    found = encode(images)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(encode(images.astype(np.float64) / 255), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(encode(jnp.asarray(images[:3])), expected[:3], rtol=0, atol=1e-5)
    assert encode(images[:0]).shape == (0, WIDTH)


def test_a_loaded_resnet_gives_the_runs_features(tmp_path: Path) -> None:
    config = small_config(**RESNET, model__width=4, model__depth=2, runtime__precision="bfloat16")
    params = random_params(config)
    encode = load_encoder(write(config, params, tmp_path))
    images = some_images(config, 256)
    expected = encode_as_the_run(config, params, images)
    np.testing.assert_array_equal(encode(images), expected)
    assert expected.shape == (256, encode.num_features) == (256, 8)
    assert jax.tree.leaves(encode.params["encoder"]["reshape1"]) == []


def test_apply_can_be_traced(config: Config, written: Path) -> None:
    encode = load_encoder(written)
    images = some_images(config, 4)

    def total(params: Tree, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        features = encode.apply(params, images)
        return jnp.square(features).sum(), features

    gradient, features = jax.jit(jax.grad(total, has_aux=True))(encode.params, images)
    np.testing.assert_allclose(features, encode(images), rtol=0, atol=1e-5)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


def changed(about: dict[str, Any], **values: Any) -> bytes:
    return json.dumps(about | values).encode()


def consistent(about: dict[str, Any], weights: bytes, **values: Any) -> dict[str, bytes]:
    """Both files as a version would write them that has other models."""
    about = {k: v for k, v in about.items() if k != "sha256"} | values
    content = save(load(weights), {METADATA: json.dumps(about)})
    return {WEIGHTS: content, ABOUT: changed(about, sha256=hashlib.sha256(content).hexdigest())}


def framed(header: bytes) -> bytes:
    """A safetensors file of no tensors."""
    return len(header).to_bytes(8, "little") + header


def test_damage_is_one_line(written: Path, tmp_path: Path) -> None:
    files = {name: (written / name).read_bytes() for name in (WEIGHTS, ABOUT)}
    weights, about = files[WEIGHTS], json.loads(files[ABOUT])
    flipped = [weights[:i] + bytes([weights[i] ^ 1]) + weights[i + 1 :] for i in (3, 200, len(weights) - 1)]
    plain, end = save(load(weights)), 8 + int.from_bytes(weights[:8], "little")
    junk = [
        (content, "does not contain an encoder")
        for content in (b"", b"junk", plain, framed(b"[1]"), framed(b"[" * 99999))
    ]
    junk += [
        (framed(b'{"__metadata__": {"lwfedssl_jax": 3}}'), "does not contain an encoder"),
        (weights[:end], "cannot be rebui"),
    ]
    cases: list[tuple[dict[str, bytes], str]] = [
        *[({WEIGHTS: content}, "SHA-256") for content in (*flipped, weights[:-4], weights + b"\0", b"")],
        ({ABOUT: changed(about, sha256="0" * 64)}, "SHA-256"),
        ({ABOUT: changed(about, format_version=2)}, r"format_version 2 is unknown; accepted: 1"),
        ({ABOUT: changed(about, mean=[0.5] * 3)}, "differs from the metadata of encoder.safetensors"),
        ({ABOUT: changed(about, note="mine")}, "differs from the metadata of encoder.safetensors"),
        (consistent(about, weights, model=about["model"] | {"depth": 3}), r"cannot be rebuilt .*blocks.2"),
        (consistent(about, weights, model=about["model"] | {"width": 16}), r"cannot be rebuilt .*reshape"),
        (consistent(about, weights, model=about["model"] | {"name": "vit"}), "model 'vit' is not one of this"),
        (consistent(about, weights, precision="float33", lwfedssl_jax="9.0"), r"float33.* accepted: .* 9.0"),
        *[({WEIGHTS: c, ABOUT: changed(about, sha256=hashlib.sha256(c).hexdigest())}, what) for c, what in junk],
        ({ABOUT: b"{"}, "does not describe an encoder"),
        ({ABOUT: b"[1]"}, "does not describe an encoder"),
        ({ABOUT: b"\xff"}, "does not describe an encoder"),
    ]
    for replaced, message in cases:
        for name, content in (files | replaced).items():
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=message) as error:
            load_encoder(tmp_path)
        assert "; accepted: " in str(error.value)
        assert "\n" not in str(error.value)
    for name in (WEIGHTS, ABOUT):
        (tmp_path / name).write_bytes(files[name])
    assert isinstance(load_encoder(tmp_path), TrainedEncoder)
    for name in (ABOUT, WEIGHTS):
        (tmp_path / name).unlink()
        with pytest.raises(ConfigError, match=rf"{name}: cannot be read .* accepted: the work directory of"):
            load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8, 3), np.uint8), r"uint8 \(8, 8, 3\) does not fit; accepted: .* \(N, 8, 8, 3\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"uint8 \(2, 3, 8, 8\) does not fit"),
        (np.zeros((2, 8, 8, 3), np.int32), r"int32 \(2, 8, 8, 3\) does not fit"),
        (np.full((2, 8, 8, 3), 255.0), r"from 255.0 to 255.0; accepted: floats in \[0, 1\]"),
        (np.full((2, 8, 8, 3), -1e-3), r"from -0.001 to"),
        (np.full((2, 8, 8, 3), np.nan), r"from nan to nan"),
    ],
)
def test_other_images_are_refused(written: Path, images: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_encoder(written)(images)


def test_no_byte_is_anything_but_a_number(written: Path) -> None:
    """A safetensors file is a length, a JSON header of names, types and places, and the numbers: no pickle."""
    content = (written / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    assert list(header.pop("__metadata__")) == [METADATA]
    at = 0
    for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
        assert entry["dtype"] == "F32"
        assert entry["data_offsets"] == [at, at := at + 4 * int(np.prod(entry["shape"]))]
    assert 8 + length + at == len(content)


def test_the_same_encoder_gives_the_same_bytes(config: Config, params: Tree) -> None:
    files = [encoder_files(config, make_task(config), params) for _ in range(8)]
    assert all(again == files[0] for again in files)


def test_the_package_is_imported_without_jax() -> None:
    code = "import sys, lwfedssl_jax; lwfedssl_jax.load_encoder; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def import_or_skip(name: str) -> Any:
    """A module of the extra ``torch``.

    PyPI's torchvision is built for CUDA and cannot load its operators beside a CPU build of torch.
    Its models need none, but its import wants two to be declared.
    """
    torch = pytest.importorskip("torch")
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pytest.skip("no torchvision")
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip(name)


def run_snippet(page: Path, marker: str, path: Path, images: np.ndarray) -> np.ndarray:
    """What the page's only example with ``marker`` makes of the images."""
    (code,) = [x for x in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) if marker in x]
    names: dict[str, Any] = {"images": images}
    exec(code.replace("runs/mine", str(path)), names)
    features = names["features"]
    return np.asarray(features if isinstance(features, np.ndarray) else features.detach())


def test_the_readmes_line_in_jax(config: Config, params: Tree, written: Path) -> None:
    images = some_images(config, 300)
    found = run_snippet(ROOT / "README.md", "load_encoder", written, images)
    np.testing.assert_array_equal(found, encode_as_the_run(config, params, images))


def test_timm_finds_the_features_of_a_trained_encoder(tmp_path: Path) -> None:
    """By the lines of docs/encoder.md."""
    import_or_skip("timm")
    config = small_config(model__depth=2, objective__name="simclr", federation__rounds=2, federation__local_epochs=1)
    run = setup.prepare(config)
    simulator = Simulator([run])
    params = simulator.stack.place(setup.initial_params(run))
    for stage in run.stages:
        params, _, _ = run_round(simulator, stage, params, None, stage.number)
    check_timm(config, jax.device_get(params), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__name": "digits", "data__image_size": 16, "model__patch_size": 2, "model__heads": 4},
        {"model__name": "vit_tiny", "model__width": 192, "model__depth": 12, "data__image_size": 32},
    ],
)
def test_timm_finds_the_same_features(changes: dict[str, Any], tmp_path: Path) -> None:
    """Of gray images; with the paper's sizes."""
    import_or_skip("timm")
    config = small_config(**changes)
    check_timm(config, random_params(config), tmp_path)


def check_timm(config: Config, params: Tree, path: Path) -> None:
    write(config, params, path)
    images = some_images(config, 20, make_task(config).image_shape[-1])
    expected = encode_as_the_run(config, params, images, len(images))
    found = run_snippet(ROOT / "docs" / "encoder.md", "import timm", path, images)
    print("largest difference", np.abs(found - expected).max(), "of", np.abs(expected).max())
    np.testing.assert_allclose(found, expected, **TORCH_TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__image_size": 32},
        {"model__depth": 2, "model__stem": "small", "data__name": "digits"},
    ],
)
def test_torchvision_finds_the_same_features(changes: dict[str, Any], tmp_path: Path) -> None:
    """By the lines of docs/encoder.md, with running averages of every value."""
    import_or_skip("torchvision")
    config = small_config(**RESNET, **{"model__width": 0, "model__depth": 4} | changes)
    params = random_params(config)
    path = write(config, params, tmp_path)
    images = some_images(config, 20, make_task(config).image_shape[-1])
    expected = encode_as_the_run(config, params, images, len(images))
    found = run_snippet(ROOT / "docs" / "encoder.md", "import torchvision", path, images)
    print("largest difference", np.abs(found - expected).max(), "of", np.abs(expected).max())
    np.testing.assert_allclose(found, expected, **TORCH_TOLERANCE)


def test_a_resnet_of_a_width_that_torchvision_has_not(tmp_path: Path) -> None:
    config = small_config(**RESNET, model__width=4, model__depth=2)
    about = json.loads((write(config, random_params(config), tmp_path) / ABOUT).read_text())
    assert about["torchvision"] is None
    assert about["num_features"] == 8
