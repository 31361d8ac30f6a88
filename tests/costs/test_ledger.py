"""The ledger against the compiler and against hand counts; `config/test_paper.py` holds it against the paper."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from conftest import known_traces, small_config

from lwfedssl_jax.config import Config
from lwfedssl_jax.costs import ledger, memory, operations
from lwfedssl_jax.costs.ledger import all_strategies, each_strategy, make_ledger
from lwfedssl_jax.costs.operations import alignment_operations, executed_operations, stage_parts
from lwfedssl_jax.models import attention
from lwfedssl_jax.system.devices import program_memory


@pytest.mark.parametrize("strategy", ["end_to_end", "layerwise"])
def test_bfloat16_keeps_what_float32_keeps_for_the_backward_pass(strategy: str) -> None:
    executed = {
        (precision, remat): make_ledger(
            small_config(strategy__name=strategy, runtime__precision=precision, runtime__remat=remat), known_traces()
        )["flops_executed"]
        for precision in ("float32", "bfloat16")
        for remat in (False, True)
    }
    recomputed = executed["float32", True] - executed["float32", False]
    assert recomputed > 0
    assert executed["bfloat16", True] - executed["bfloat16", False] == recomputed
    assert executed["bfloat16", False] < executed["float32", False] + recomputed / 2


@pytest.mark.parametrize("strategy", ["layerwise", "progressive"])
def test_alignment_costs_two_passes_of_each_layer_trained_before(strategy: str) -> None:
    config = small_config(strategy__name=strategy, additions__terms=("alignment=0.1",))
    first, second, third = (alignment_operations(config, part, {}) for part in stage_parts(config))
    width, patches = config.model.width, (config.data.image_size // config.model.patch_size) ** 2
    block = patches * (12 * width**2 + 2 * patches * width)  # multiply-adds of products
    assert first == 0
    assert third == 2 * second
    assert 2 * block <= second < 2.5 * block  # the paper's rule counts normalisation as well


def test_operations_are_the_same_where_attention_is_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(strategy__name="end_to_end", runtime__precision="bfloat16")
    plain = make_ledger(config)
    monkeypatch.setattr(attention, "has_fused_attention", lambda dtype, tokens, features: True)
    monkeypatch.setattr(attention, "fused", lambda q, k, v: v)  # a kernel whose products are not seen
    kernel = make_ledger(config)
    for name in ("flops_executed", "flops_paper_rule"):
        assert kernel[name] == plain[name]  # type: ignore[literal-required]


def test_bytes_by_hand() -> None:
    """Width 8, 4 patches of 48 values, hidden 12, output 6, simclr: every leaf counted on paper."""
    block = (8 * 24 + 24) + (8 * 8 + 8) + (8 * 32 + 32) + (32 * 8 + 8) + 4 * 8
    embedding, norm = (48 * 8 + 8) + 4 * 8, 2 * 8
    head = 8 * 12 + 12 * 12 + 12 * 6 + 4 * 12
    result = make_ledger(small_config(objective__name="simclr", federation__rounds=7), known_traces())
    first, second, third = result["per_stage"]
    assert [s["rounds"] for s in (first, second, third)] == [3, 2, 2]
    assert first["trainable_parameters"] == embedding + block + norm + head
    assert second["trainable_parameters"] == block + norm + head
    assert second["download_bytes"] == second["upload_bytes"] == 2 * 4 * (block + norm + head)
    assert result["total_bytes"] == 2 * 4 * (7 * (block + norm + head) + 3 * embedding)
    everything = [embedding + d * block + norm + head for d in (1, 2, 3)]
    downloads = 4 * (3 * everything[0] + 2 * everything[1] + 2 * everything[2])
    assert result["worst_case_total_bytes"] == downloads + result["upload_bytes"]


@pytest.mark.parametrize("strategy", ["end_to_end", "progressive"])
def test_worst_case_equals_regular_where_everything_is_exchanged(strategy: str) -> None:
    result = make_ledger(small_config(strategy__name=strategy), known_traces())
    assert result["worst_case_total_bytes"] == result["total_bytes"]


def test_last_stage_of_progressive_costs_what_end_to_end_costs_a_round() -> None:
    config = small_config(strategy__name="progressive", federation__rounds=3, strategy__layers_per_stage=2)
    seen: list[str] = []
    strategies = all_strategies(config, memory=True, notify=seen.append)
    last, whole = strategies["progressive"]["per_stage"][-1], strategies["end_to_end"]["per_stage"][0]
    assert last["trainable_parameters"] == whole["trainable_parameters"]
    for key in ("download_bytes", "flops_paper_rule", "flops_executed"):
        assert last[key] / last["rounds"] == whole[key] / whole["rounds"] > 0
    assert last["peak_memory_bytes"] == whole["peak_memory_bytes"] == strategies["end_to_end"]["peak_memory_bytes"] > 0
    assert strategies["layerwise"]["peak_memory_bytes"] < whole["peak_memory_bytes"]
    # Of 1 + 2 + 2 programs the first and last of progressive are those of layerwise and end_to_end.
    assert sum("program" in text for text in seen) == 3


def test_peak_memory_is_that_of_the_program_as_it_would_run() -> None:
    config = small_config()
    program, _ = memory.lower_step(config, operations.stage_parts(config)[0])
    (peak,) = memory.peak_memory([program], lambda _: None).values()
    assert peak == pytest.approx(program_memory(program.compile()), rel=0.005)


def test_ledgers_that_share_what_is_known_trace_no_layer_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    known = operations.Known()
    alone = make_ledger(small_config(), known)
    config = small_config(runtime__seed=3, optimizer__learning_rate=0.2)  # its steps are the same
    traced: list[tuple[int, int]] = []

    def executed(config: Config, part: operations.StagePart) -> float:
        traced.append((part.stage.frozen_depth, part.stage.depth))
        return executed_operations(config, part)

    known |= {(executed, *key[1:]): value for key, value in known.items() if key[0] is executed_operations}
    monkeypatch.setattr(ledger, "executed_operations", executed)
    assert all_strategies(config, memory=False, known=known)["layerwise"] == alone
    assert traced == [(0, 2)]  # of end_to_end and progressive; layerwise has counted one layer of either kind


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy__layers_per_stage": 2, "objective__name": "mocov3", "runtime__remat": True},
        {"additions__terms": ("alignment=0.1",), "objective__name": "byol"},
        {"additions__depth_dropout": 1.0, "strategy__layers_per_stage": 2},
    ],
    ids=["simclr", "mocov3", "byol", "depth dropout"],
)
def test_operations_of_all_layers_are_those_of_their_program(changes: dict[str, Any]) -> None:
    config = small_config(model__depth=4, federation__rounds=4, **changes)
    for strategy_config in each_strategy(config)[0].values():
        part = operations.stage_parts(strategy_config)[-1]
        stage, skipped = part.stage, part.stage.trained_before if strategy_config.additions.depth_dropout else 0
        run = part._replace(
            stage=stage._replace(
                depth=stage.depth - skipped, frozen_depth=stage.frozen_depth - min(skipped, stage.frozen_depth)
            )
        )
        for rule in (operations.paper_operations, executed_operations):
            counted = operations.operations_per_sample(strategy_config, part, rule, known_traces())
            assert counted == rule(strategy_config, run)


def test_operations_where_a_stage_trains_only_layers_that_depth_dropout_may_skip() -> None:
    part = operations.stage_parts(config := small_config(strategy__name="end_to_end"))[0]
    none = part._replace(stage=part.stage._replace(depth=0))
    assert operations.count_layers(config, none, executed_operations, known_traces()) == executed_operations(
        config, none
    )


def test_count_of_products_loops_and_branches() -> None:
    a, b = jnp.ones((3, 4)), jnp.ones((4, 5))
    count = lambda f, *args: operations.count(jax.make_jaxpr(f)(*args))  # noqa: E731
    assert count(lambda a, b: a @ b, a, b) == 3 * 4 * 5
    assert count(lambda a, b: jnp.einsum("ik,kj->ij", a, b) + 1, a, b) == 3 * 4 * 5
    assert count(jax.vmap(lambda a, b: a @ b), jnp.ones((7, 3, 4)), jnp.ones((7, 4, 5))) == 7 * 3 * 4 * 5
    assert count(jax.jit(lambda a, b: jax.checkpoint(jnp.matmul)(a, b)), a, b) == 3 * 4 * 5
    square = jnp.ones((4, 4))
    assert count(lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=6)[0], square) == 6 * 4**3
    branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
    assert count(lambda i, x: jax.lax.switch(i, branches, x), 0, square) == 2 * 4**3
    # The gradient of a product costs it twice more, once more where only one factor needs one.
    assert count(jax.grad(lambda a: (a @ b).sum()), a) in (3 * 4 * 5, 2 * 3 * 4 * 5)
    with pytest.raises(ValueError, match="unknown length"):
        count(lambda n, x: jax.lax.fori_loop(0, n, lambda _, c: c @ c, x), 3, square)


@pytest.mark.parametrize("strategy", ["layerwise", "end_to_end"])
def test_executed_operations_agree_with_the_compiler(strategy: str) -> None:
    """XLA counts two for a multiply-add, and elementwise work besides: a small part at this size.

    One block is in each loop, because XLA counts a loop's body once.
    """
    config = small_config(
        strategy__name=strategy,
        objective__name="mocov3",
        objective__hidden_dim=64,
        model__width=64,
        model__depth=2 if strategy == "layerwise" else 1,
        data__image_size=16,
    )
    row, part = make_ledger(config)["per_stage"][-1], operations.stage_parts(config)[-1]
    theirs = memory.lower_step(config, part)[0].compile().cost_analysis()["flops"]
    ours = row["flops_executed"] / (config.federation.local_epochs * row["rounds"]) * config.optimizer.batch_size
    assert ours == pytest.approx(theirs / 2, rel=0.25)


def test_remat_executes_one_more_forward_pass_and_is_counted() -> None:
    plain = make_ledger(small_config(strategy__name="end_to_end"), known_traces())
    remat = make_ledger(small_config(strategy__name="end_to_end", runtime__remat=True), known_traces())
    assert remat["flops_paper_rule"] == plain["flops_paper_rule"]
    assert 1.1 < remat["flops_executed"] / plain["flops_executed"] < 1.34
