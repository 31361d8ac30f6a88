"""The programs of a round lower for GPUs and TPUs, on a machine without either; nothing is compiled or run."""

import itertools
import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import pytest
from conftest import small_config
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from lwfedssl_jax.method.aggregation import AGGREGATORS
from lwfedssl_jax.method.objectives import OBJECTIVES
from lwfedssl_jax.method.stages import STRATEGIES
from lwfedssl_jax.models import attention
from lwfedssl_jax.models.dense import PRODUCTS
from lwfedssl_jax.simulation import setup
from lwfedssl_jax.simulation.program import trace_stage
from lwfedssl_jax.simulation.simulator import Simulator

PLATFORMS = ("cuda", "tpu")
# Shardings, and the kernel of JAX's random numbers on GPUs.
CUSTOM_CALLS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "cu_threefry2x32_ffi"}
RESNET: dict[str, Any] = {
    "model__name": "resnet18", "model__patch_size": 0, "model__heads": 0, "model__width": 4, "model__depth": 2,
}  # fmt: skip


@pytest.fixture(autouse=True)
def as_on_an_accelerator() -> Iterator[None]:
    """What asks for the platform does as on a GPU: vmap over lanes, XLA's convolutions."""
    with mock.patch.object(jax, "default_backend", return_value="gpu"):
        yield


def lowered(*, stacked: int = 1, number: int = -1, **changes: Any) -> list[str]:
    """The text of a stage's programs, each lowered for all platforms at once, after a look for what none may have."""
    config = small_config(**{"runtime__lanes": 2, **changes})
    simulator = Simulator([setup.prepare(config, jax.devices()[:1])] * stacked)
    traced = trace_stage(simulator.run, simulator.run.stages[number], simulator._feed, simulator.stack)
    texts = [program.lower(lowering_platforms=PLATFORMS).as_text() for program in traced.values()]
    for text in texts:
        assert set(re.findall(r"custom_call @(\w+)", text)) <= CUSTOM_CALLS
        assert "callback" not in text
        assert not re.search(r"[<x]f64>", text)
    return texts


@pytest.mark.parametrize(
    ("precision", "changes"),
    [
        ("float32", {"strategy__name": "end_to_end", "additions__dictionary": 4}),
        ("tensorfloat32", {"strategy__name": "progressive"}),
        ("bfloat16", {"strategy__name": "layerwise"}),
    ],
    ids=list(PRODUCTS),
)
def test_products_are_computed_as_the_config_says(precision: str, changes: dict[str, Any]) -> None:
    """Left to JAX's default, products of float32 would be TF32 on a GPU, and bfloat16 on a TPU."""
    _, steps, *_ = lowered(runtime__precision=precision, objective__name="mocov3", **changes)
    products = [line for line in steps.splitlines() if "stablehlo.dot_general" in line]
    half = [line for line in products if "bf16" in line]
    whole = [line for line in products if "bf16" not in line]
    assert bool(half) == (precision == "bfloat16")
    found = {re.search(r"precision = \[(\w+), ", line)[1] for line in whole}  # type: ignore[index]
    assert found - {"HIGHEST"} == {PRODUCTS[precision].upper()} - {"HIGHEST"}  # resizing an image is always exact


@pytest.mark.parametrize(
    "changes",
    [
        {**RESNET, "runtime__precision": "bfloat16", "objective__name": "byol"},
        {"number": 0, "runtime__feed": "streamed", "runtime__remat": True, "stacked": 2},
        {"additions__terms": ("alignment=0.7",), "additions__depth_dropout": 0.5, "federation__aggregator": "ldawa"},
    ],
    ids=["resnet18", "stacked", "additions"],
)
def test_a_round_lowers(changes: dict[str, Any]) -> None:
    lowered(**changes)


@pytest.mark.parametrize(
    "model", [{"runtime__precision": "float32"}, {"runtime__precision": "bfloat16", **RESNET}], ids=["vit", "resnet18"]
)
@pytest.mark.parametrize(
    ("strategy", "objective"),
    [*itertools.product(STRATEGIES, ("simclr", "byol", "mocov3")), ("layerwise", "vicreg"), ("layerwise", "mae")],
)
def test_every_strategy_and_objective_lowers(strategy: str, objective: str, model: dict[str, Any]) -> None:
    """The other two pairs of model and precision differ from these in the type of the factors of products only."""
    if OBJECTIVES[objective].hides_patches and "model__name" in model:
        pytest.skip("a residual network has no patches to hide")
    for number in (0, -1) if strategy == "layerwise" else (-1,):  # the others have one program
        lowered(strategy__name=strategy, objective__name=objective, number=number, **model)


def test_bfloat16_has_a_kernel_for_attention_if_the_gpu_has_it() -> None:
    """cuDNN's, which takes all lanes at once; whether it runs is asked on the device (``has_fused_attention``)."""
    with (
        mock.patch.object(attention, "has_fused_attention", return_value=True),
        mock.patch.object(cudnn, "check_cudnn_version", return_value=90800),
        mock.patch.object(cudnn, "check_compute_capability", return_value=True),
    ):
        config = small_config(
            runtime__precision="bfloat16", runtime__lanes=2, model__width=16, strategy__name="end_to_end"
        )
        simulator = Simulator([setup.prepare(config, jax.devices()[:1])])
        traced = trace_stage(simulator.run, simulator.run.stages[0], simulator._feed, simulator.stack)["steps"]
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = re.findall(r"custom_call @(__cudnn\$\w+)", text)
    assert len(kernels) == 3
    assert len(set(kernels)) == 2  # forward, again in the backward pass, and backward


OTHERS: dict[str, dict[str, Any]] = {
    **{f"aggregator {name}": {"federation__aggregator": name} for name in AGGREGATORS},
    "vit, bfloat16": {"runtime__precision": "bfloat16"},
    "resnet18, float32": RESNET,
    "lanes 1": {"runtime__lanes": 1},
    "lanes 4": {"runtime__lanes": 4},
    "streamed": {"runtime__feed": "streamed"},
    "remat": {"runtime__remat": True, "strategy__name": "progressive"},
    "proximal": {"additions__terms": ("proximal=0.3",)},
    "depth dropout": {"additions__depth_dropout": 0.5, "strategy__name": "progressive"},
    "stacked, streamed": {"stacked": 3, "runtime__feed": "streamed"},
    "kept clients": {"federation__client_start": "fedema", "objective__name": "byol", "strategy__name": "end_to_end"},
    "dictionary": {"additions__dictionary": 4, "strategy__name": "end_to_end"},
}


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_every_part_of_a_round_lowers(changes: dict[str, Any]) -> None:
    lowered(**changes)
