"""Encoders of one's own: Flax modules with a list of layers, written as a user would."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from conftest import small_config
from images import picture
from runs import train
from safetensors.numpy import load_file

from lwfedssl_jax import cli, load_encoder
from lwfedssl_jax.config import MODELS, Config, ConfigError, load, override, resolve, to_dict
from lwfedssl_jax.costs.ledger import all_strategies
from lwfedssl_jax.method.task import make_task
from lwfedssl_jax.models import ARCHITECTURES
from lwfedssl_jax.models.layered import add_model

MINE = """
import flax.linen as nn
import jax.numpy as jnp

from lwfedssl_jax.config import load
from lwfedssl_jax.models.layered import add_model


class MixerBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x).swapaxes(1, 2)
        x = x + nn.Dense(x.shape[1])(nn.gelu(nn.Dense(8)(y))).swapaxes(1, 2)
        return x + nn.Dense(x.shape[2])(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))


class Mixer(nn.Module):
    width: int
    depth: int
    patch_size: int

    def setup(self):
        self.patches = nn.Conv(self.width, (self.patch_size, self.patch_size), (self.patch_size, self.patch_size))
        self.layers = [MixerBlock() for _ in range(self.depth)]
        self.norm = nn.LayerNorm()

    def stem(self, images):
        x = self.patches(images)
        return x.reshape(len(x), -1, self.width)

    def pool(self, x):
        return self.norm(x).mean(1)


class ConvNextLayer(nn.Module):
    features: int
    stride: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.features, (self.stride, self.stride), (self.stride, self.stride))(nn.LayerNorm()(x))
        y = nn.Conv(self.features, (3, 3), feature_group_count=self.features)(x)
        return x + nn.Dense(self.features)(nn.gelu(nn.Dense(2 * self.features)(nn.LayerNorm()(y))))


class ConvNext(nn.Module):
    width: int
    depth: int

    def setup(self):
        self.stem = nn.Conv(self.width, (2, 2), (2, 2))
        self.layers = [ConvNextLayer(self.width * 2**i, 1 + (i > 0)) for i in range(self.depth)]
        self.norm = nn.LayerNorm()

    def pool(self, x):
        return self.norm(x.mean((1, 2)))


class Plain(nn.Module):
    depth: int

    def setup(self):
        self.layers = [nn.Dense(4) for _ in range(self.depth)]


add_model("mixer", Mixer, width=8, depth=3, patch_size=4)
add_model("convnext", ConvNext, width=4, depth=3)
add_model("plain", Plain, width=4, depth=2)
config = load("quickstart")
"""


@pytest.fixture(scope="module", autouse=True)
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's file; its entries are gone after these tests."""
    file = tmp_path_factory.mktemp("mine") / "mine.py"
    file.write_text(MINE, encoding="utf-8")
    with mock.patch.dict(MODELS), mock.patch.dict(ARCHITECTURES), jax.numpy_dtype_promotion("standard"):
        load(str(file))
        yield file


def config_of(model: str, **changes: Any) -> Config:
    sizes = {"model.name": model, "model.width": 0, "model.depth": 0, "model.heads": 0, "model.patch_size": 0}
    return resolve(override(small_config(**changes), sizes))


def test_each_parameter_belongs_to_its_layer() -> None:
    mixer, convnext = (make_task(config_of(name)).encoder for name in ("mixer", "convnext"))
    params = jax.eval_shape(mixer.init, jax.random.key(0))["encoder"]
    assert set(params) == {"patches", "layers_0", "layers_1", "layers_2", "norm"}
    numbers = {name: {int(n) for n in jax.tree.leaves(part)} for name, part in
               mixer.layers({"encoder": params})["encoder"].items()}  # fmt: skip
    assert numbers == {"patches": {1}, "layers_0": {1}, "layers_1": {2}, "layers_2": {3}, "norm": {0}}
    params = jax.eval_shape(convnext.init, jax.random.key(0))["encoder"]
    numbers = {name: {int(n) for n in jax.tree.leaves(part)} for name, part in
               convnext.layers({"encoder": params})["encoder"].items()}  # fmt: skip
    own = {f"stage{s}_{part}": {-s} for s in (1, 2) for part in ("pool", "reshape")}
    assert numbers == {"stem": {1}, "layers_0": {1}, "layers_1": {2}, "layers_2": {3}, "norm": {3}, **own}
    assert convnext.feature_dim == 16


@pytest.mark.parametrize("model", ["mixer", "convnext"])
def test_frozen_and_trainable_parts_together_are_the_module(model: str, mine: Path) -> None:
    task = make_task(config_of(model))
    encoder, images = task.encoder, np.random.default_rng(0).normal(size=(3, *task.image_shape)).astype(np.float32)
    params, mask = encoder.init(jax.random.key(0)), np.ones(3, bool)
    numbers = encoder.layers(params)
    results = []
    for frozen_depth in range(4):  # 3: as it is evaluated
        frozen = jax.tree.map(lambda n, x, d=frozen_depth: x if 0 < n <= d else None, numbers, params)
        rest = jax.tree.map(lambda n, x, d=frozen_depth: x if n == 0 or n > d else None, numbers, params)
        x = encoder.frozen_forward(frozen, images, frozen_depth, None)
        results.append(encoder.trainable_forward(rest, x, mask, 3 - frozen_depth, None)[0])
    for result in results[1:]:
        np.testing.assert_allclose(result, results[0], rtol=1e-5, atol=1e-6)
    assert np.std(results[0]) > 0.01


@pytest.mark.parametrize(
    ("model", "strategy"),
    [("mixer", "end_to_end"), ("convnext", "layerwise")],
)
def test_from_a_file_of_ones_own_to_features(
    model: str, strategy: str, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(
        model, strategy__name=strategy, runtime__remat=strategy == "progressive", evaluation__neighbours=0
    )
    summary = train(config, tmp_path / "run")
    assert summary["resources"]["total_bytes"] > 0
    assert all(np.isfinite(list(ledger["flops_executed"] for ledger in summary["strategies"].values())))
    names = set(load_file(tmp_path / "run" / "encoder.safetensors"))
    assert "layers_2.Dense_0.kernel" in names
    assert not [name for name in names if name.startswith("stage")]
    picture(tmp_path / "all" / "a.png", 5)
    words = ["embed", str(tmp_path / "run"), str(tmp_path / "all"), "--out", str(tmp_path / "f.npz")]
    assert cli.main([*words, "--config", str(mine)]) == 0
    with np.load(tmp_path / "f.npz") as found:
        np.testing.assert_allclose(
            found["features"], load_encoder(tmp_path / "run")([tmp_path / "all" / "a.png"]), 1e-5
        )
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    with mock.patch.dict(MODELS):
        del MODELS[model]
        assert cli.main(words) == 2
        assert f"the model {model!r} is not one of this package; accepted: a model of" in capsys.readouterr().err


def test_the_ledger_of_ones_own_model() -> None:
    strategies = all_strategies(config_of("convnext"), memory=False)
    assert [len(ledger["per_stage"]) for ledger in strategies.values()] == [1, 3, 3]
    assert strategies["layerwise"]["total_bytes"] < strategies["progressive"]["total_bytes"]
    assert to_dict(config_of("mixer"))["model"]["patch_size"] == 4


BAD = {
    "no list": "class Bad(nn.Module):\n    @nn.compact\n    def __call__(self, x):\n        return x\n",
    "norm": "class Bad(nn.Module):\n    def setup(self):\n"
    "        self.layers = [nn.BatchNorm(use_running_average=True), nn.Dense(3)]\n",
    "empty": "class Bad(nn.Module):\n    def setup(self):\n"
    "        self.layers = [nn.Dense(3), nn.Dropout(0.0, deterministic=True)]\n",
    "shared": "class Bad(nn.Module):\n    def setup(self):\n        one = nn.Dense(3)\n        self.one = one\n"
    "        self.layers = [self.one, self.one]\n",
    "crash": "class Bad(nn.Module):\n    def setup(self):\n        self.layers = [nn.Dense(3), nn.Dense(3)]\n"
    "    def stem(self, x):\n        return x.reshape(7)\n",
    "axes": "class Bad(nn.Module):\n    def setup(self):\n        self.layers = [nn.Dense(3), nn.Dense(3)]\n"
    "    def pool(self, x):\n        return x\n",
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no list", "Bad has no list `layers`; accepted: what add_model describes"),
        ("norm", r"layers\[0\] keeps batch_stats; accepted: parameters only"),
        ("empty", r"layers\[1\] has no parameters; accepted: layers that can be trained"),
        ("shared", r"layers\[\d\] shares one with another part; accepted: parts of their own"),
        ("crash", r"cannot run on images of \(8, 8, 3\) \(TypeError: cannot reshape"),
        ("axes", r"features have shape \(8, 8, 3\); accepted: one axis"),
    ],
)
def test_modules_of_another_form_are_refused(kind: str, message: str, tmp_path: Path) -> None:
    text = f"import flax.linen as nn\nfrom lwfedssl_jax.config import load\n{BAD[kind]}"
    text += "from lwfedssl_jax.models.layered import add_model\nadd_model('bad', Bad, width=3, depth=2)\n"
    (tmp_path / "bad.py").write_text(f"{text}config = load('quickstart')\n", encoding="utf-8")
    load(str(tmp_path / "bad.py"))
    with pytest.raises(ConfigError, match=message):
        make_task(config_of("bad"))


@pytest.mark.parametrize("name", ["vit", "vit_tiny", "resnet18"])
def test_the_packages_own_names_are_taken(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^add_model: {name!r} is a name of this package; accepted: another one"):
        add_model(name, lambda: None, width=1, depth=1)


def test_precisions_and_sizes_that_it_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^runtime.precision: bfloat16 needs a field dtype in .*; accepted: float32"):
        make_task(config_of("mixer", runtime__precision="bfloat16"))
    with pytest.raises(ConfigError, match=r"^model.heads: 2 does not apply to plain; accepted: leave it out"):
        resolve(override(config_of("plain"), {"model.heads": 2}))
