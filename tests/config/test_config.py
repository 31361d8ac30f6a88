"""Validation: one clear line for every bad value, before anything is compiled."""

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from lwfedssl_jax import cli
from lwfedssl_jax.config import (
    CONFIG_DIR,
    MODELS,
    SWEEPS,
    Config,
    ConfigError,
    ResNetSize,
    available,
    load,
    override,
    resolve,
    sections,
    to_dict,
)
from lwfedssl_jax.costs.ledger import all_strategies
from lwfedssl_jax.data.views import RECIPES
from lwfedssl_jax.method.checks import check_method
from lwfedssl_jax.method.stages import stage_depths
from lwfedssl_jax.method.task import make_task
from lwfedssl_jax.models import ARCHITECTURES
from lwfedssl_jax.simulation.setup import prepare

NAMES = [name for name, _ in available() if not name.startswith(SWEEPS)]


@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_valid_and_introduces_itself(name: str) -> None:
    resolve(load(name))
    assert len(dict(available())[name]) > 20


def test_the_configs_an_experimenter_expects_exist() -> None:
    digits = {
        f"digits/{s}_{o}" for s in ("layerwise", "progressive", "end_to_end") for o in ("simclr", "byol", "mocov3")
    }
    paper = {
        f"paper/vit_tiny_{o}{s}" for o in ("simclr", "byol", "mocov3") for s in ("", "_progressive", "_end_to_end")
    }
    assert digits | {"quickstart"} | paper <= set(NAMES)
    for name in digits:
        config = load(name)
        assert f"{config.strategy.name}_{config.objective.name}" == name.removeprefix("digits/")


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("paper/")])
def test_a_paper_config_is_what_its_name_and_header_say(name: str) -> None:
    header = ast.get_docstring(ast.parse((CONFIG_DIR / f"{name}.py").read_text())) or ""
    commands = [line.split() for line in header.splitlines() if line.startswith("    python run.py ")]
    assert ["python", "run.py", "train", name] in commands
    assert {command[-1] for command in commands} == {name}
    config = resolve(load(name))
    # Files named after a baseline say their strategy in the header alone.
    strategy = next((s for s in ("progressive", "end_to_end", "layerwise") if s in name), None)
    words = {"layerwise": "LW-FedSSL", "progressive": "Prog-FedSSL", "end_to_end": "FedSSL end to end"}
    title = header.split("\n")[0]
    assert f", {words[config.strategy.name]}: " in title or ", centralised: " in title
    assert strategy in (None, config.strategy.name)
    assert f"_{config.objective.name}" in name
    assert config.model.name in name


def test_no_two_configs_are_the_same() -> None:
    resolved = [json.dumps(to_dict(resolve(load(name)))) for name in NAMES]
    assert len(set(resolved)) == len(NAMES)


def test_resolve_fills_in_the_named_models_sizes() -> None:
    model = resolve(Config()).model
    assert (model.width, model.depth, model.heads) == (192, 12, 3)
    model = resolve(override(Config(), {"model.width": 96, "model.heads": 4})).model
    assert (model.width, model.depth, model.heads) == (96, 12, 4)


def test_derived_values() -> None:
    config = resolve(Config())
    assert len(stage_depths(resolve(override(config, {"strategy.layers_per_stage": 5})))) == 3
    assert len(stage_depths(resolve(override(config, {"strategy.name": "end_to_end"})))) == 1
    assert config.learning_rate == pytest.approx(1.5e-4 * 2)
    assert config.cohort_size == 10


BAD: list[tuple[dict[str, Any], str]] = [
    ({"strategy.name": "layer"}, "strategy.name: unknown 'layer'; accepted: end_to_end, layerwise, progressive"),
    ({"objective.name": "moco"}, "objective.name: unknown 'moco'; accepted: simclr, byol, mocov3"),
    ({"model.name": "resnet50"}, "model.name: unknown 'resnet50'; accepted: vit_micro"),
    ({"federation.rounds": 0}, "federation.rounds: 0 is out of range; accepted: at least 1"),
    ({"optimizer.batch_size": 1}, "optimizer.batch_size: 1 is out of range; accepted: at least 2"),
    ({"federation.rounds": 2.5}, "federation.rounds: 2.5 is not valid; accepted: int"),
    ({"federation.rounds": True}, "federation.rounds: True is not valid; accepted: int"),
    ({"federation.dropout": 1.1}, "federation.dropout: 1.1 is out of range; accepted: at least 0 and below 1"),
    ({"federation.dropout": float("nan")}, "federation.dropout: nan is not valid; accepted: float"),
    ({"objective.temperature": 0.0}, "objective.temperature: 0.0 is out of range; accepted: above 0"),
    ({"objective.momentum": "high"}, "objective.momentum: 'high' is not valid; accepted: float"),
    ({"optimizer.learning_rate": float("inf")}, "optimizer.learning_rate: inf is not valid; accepted: float"),
    ({"partition.beta": -1.0}, "partition.beta: -1.0 is out of range; accepted: at least 1e-06"),
    ({"runtime.seed": -1}, "runtime.seed: -1 is out of range; accepted: at least 0 and at most 4294967295"),
    ({"evaluation.labels_per_class": (5, -1)}, "evaluation.labels_per_class: -1 is out of range"),
    ({"evaluation.labels_per_class": 5}, "evaluation.labels_per_class: 5 is not a tuple"),
    ({"evaluation.labels_per_class": (), "evaluation.neighbours": 0}, "evaluation: every protocol is disabled"),
    (
        {"evaluation.fine_tune_epochs": 5},
        "evaluation.fine_tune_warmup_epochs: 10 is not below evaluation.fine_tune_epochs 5; accepted: 0 to 4",
    ),
    (
        {"data.name": "synthetic", "data.synthetic_examples": 9},
        "data.synthetic_examples: 9 is too few to cover all classes; accepted: at least data.synthetic_classes 10",
    ),
    ({"model.heads": 5}, "model.heads: 5 does not divide model.width 192; accepted: one of 1, 2, 3, 4, 6"),
    ({"model.patch_size": 5}, "model.patch_size: 5 does not divide data.image_size 16; accepted: one of 1, 2, 4, 8"),
    ({"federation.rounds": 11}, "federation.rounds: 11 rounds are fewer than the 12 stages; accepted: at least 12"),
    ({"strategy.layers_per_stage": 13}, "strategy.layers_per_stage: 13 is more than model.depth; accepted: 1 to"),
    ({"federation.clients_per_round": 11}, "federation.clients_per_round: 11 is more than the number of clients; acc"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_bad_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        prepare(resolve(override(Config(), changes)))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


OWN = """
from lwfedssl_jax.config import MODELS, Config, ResNetSize, VitSize, override
from lwfedssl_jax.data.views import RECIPES
from lwfedssl_jax.models import ARCHITECTURES
from lwfedssl_jax.models.vit import vit

class WideSize(VitSize):
    architecture = "wide"
    equal_layers = False
    cpu_lanes = 3

MODELS["vit_mine"] = VitSize(width=8, depth=2, heads=2)
MODELS["resnet_mine"] = ResNetSize(width=4, depth=2, stem="small")
MODELS["wide_mine"] = WideSize(width=16, depth=2, heads=4)
ARCHITECTURES["wide"] = lambda *arguments, **options: vit(*arguments, **options)._replace(feature_dim=16)
RECIPES["mirrored"] = RECIPES["digits"]._replace(flip=0.5)
config = override(Config(), {"model.name": NAME, "data.views": VIEWS, "optimizer.batch_size": 8})
"""


@pytest.fixture
def registries() -> Iterator[None]:
    """Entries that a test adds are gone after it."""
    with mock.patch.dict(MODELS), mock.patch.dict(RECIPES), mock.patch.dict(ARCHITECTURES):
        yield


def own_config(folder: Path, model: str, views: str = "mirrored") -> Config:
    file = folder / "mine.py"
    file.write_text(OWN.replace("NAME", repr(model)).replace("VIEWS", repr(views)))
    return load(str(file))


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    ("model", "sizes", "lanes"),
    [
        ("vit_mine", {"width": 8, "depth": 2, "heads": 2, "patch_size": 4}, 1),
        ("resnet_mine", {"width": 4, "depth": 2, "stem": "small"}, 4),
        ("wide_mine", {"width": 16, "depth": 2, "heads": 4, "patch_size": 4}, 3),
    ],
)
def test_a_config_file_may_add_a_model_and_a_recipe(
    model: str, sizes: dict[str, Any], lanes: int, tmp_path: Path
) -> None:
    config = resolve(own_config(tmp_path, model))
    assert {name: getattr(config.model, name) for name in sizes} == sizes
    assert config.cpu_lanes == lanes
    task = make_task(config)
    assert task.recipe.flip == 0.5
    assert task.encoder.feature_dim == 2 * sizes["width"] if model == "resnet_mine" else sizes["width"]
    strategies = all_strategies(config, memory=False)
    assert [len(ledger["per_stage"]) for ledger in strategies.values()] == [1, 2, 2]
    assert strategies["layerwise"]["total_bytes"] < strategies["end_to_end"]["total_bytes"]
    dropped = override(config, {"additions.depth_dropout": 0.5})
    if model == "vit_mine":
        check_method(dropped)
    else:
        with pytest.raises(ConfigError, match=rf"^additions.depth_dropout: 0.5 needs .* which {model} does not have; "):
            check_method(dropped)


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    ("model", "views", "message"),
    [
        (
            "vit_mien",
            "auto",
            r"model.name: unknown 'vit_mien'; accepted: vit_micro, .*, vit_mine, resnet_mine, wide_mine, lost",
        ),
        ("vit_mine", "mirorred", r"data.views: unknown 'mirorred'; accepted: auto, natural, digits, .*, mirrored"),
        ("lost", "auto", r"MODELS\['lost'\].architecture: unknown 'lost'; accepted: vit, resnet, wide"),
    ],
)
def test_names_that_a_config_file_does_not_add_are_refused(
    model: str, views: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], compiled: list[str]
) -> None:
    own_config(tmp_path, model, views)
    MODELS["lost"] = type("LostSize", (ResNetSize,), {"architecture": "lost"})(width=4, depth=2)
    for command in ("train", "resources", "plan"):
        words = ["--memory-gb", "1"] if command == "plan" else []
        assert cli.main([command, str(tmp_path / "mine.py"), *words]) == 2
        assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)
    assert compiled == []


def test_bad_section() -> None:
    with pytest.raises(ConfigError, match="data: 'digits' is not valid; accepted: DataConfig"):
        resolve(dataclasses.replace(Config(), data="digits"))  # type: ignore[arg-type]


def test_every_field_has_a_help_text_and_is_plain_json() -> None:
    config = resolve(Config())
    assert json.loads(json.dumps(to_dict(config))) == to_dict(config)
    source = Path(sections.__file__).read_text()
    for section in dataclasses.fields(Config):
        for f in dataclasses.fields(getattr(config, section.name)):
            following = source.split(f"class {type(getattr(config, section.name)).__name__}")[1].split(
                f"    {f.name}: "
            )[1]
            assert following.split("\n")[1].strip().startswith('"""'), f.name


def test_unknown_config_suggests_near_ones() -> None:
    with pytest.raises(ConfigError, match=r"CONFIG: 'quickstrat' is not a config; accepted: .*quickstart"):
        load("quickstrat")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = 3", r"does not define `config`, found int; accepted: `config = Config"),
        ("1 / 0", "ZeroDivisionError"),
        ("config = (", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
    ],
)
def test_config_file_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(str(file))


def test_default_config_is_the_papers() -> None:
    config = resolve(Config())
    assert (config.federation.rounds, config.federation.local_epochs, config.optimizer.batch_size) == (180, 3, 512)
