"""How ``benchmarks/h100.py`` counts a compiled program's kernels and bytes."""

import runpy
from pathlib import Path

import pytest
from conftest import ROOT

STATE = "(s32[], f32[8,100]{1,0}, f32[1,100]{1,0})"
TEXT = f"""HloModule jit_step

%fused_read (rows: f32[8,100], i: s32[]) -> f32[1,100] {{
  %rows = f32[8,100]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %row = f32[1,100]{{1,0}} dynamic-slice(%rows, %i, %zero), dynamic_slice_sizes={{1,100}}
  ROOT %double = f32[1,100]{{1,0}} add(%row, %row)
}}

%layer (state: {STATE}) -> {STATE} {{
  %state = {STATE} parameter(0)
  %number = s32[] get-tuple-element(%state), index=0
  %rows.1 = f32[8,100]{{1,0}} get-tuple-element(%state), index=1
  %read = f32[1,100]{{1,0}} fusion(%rows.1, %number), kind=kLoop, calls=%fused_read, metadata={{op_name="add"}}
  ROOT %next = (s32[], f32[8,100]{{1,0}}, /*index=2*/f32[1,100]{{1,0}}) tuple(%number, %rows.1, %read)
}}

%step (carry: {STATE}) -> {STATE} {{
  %carry = {STATE} parameter(0)
  %frozen = {STATE} while(%carry), condition=%more, body=%layer, metadata={{op_name="a/while"}}
  %trained = {STATE} while(%frozen), condition=%more, body=%layer, metadata={{op_name="jvp()/while"}}
  %part = f32[1,100]{{1,0}} get-tuple-element(%trained), index=2
  %copy = f32[1,100]{{1,0}} copy(%part)
  %n = s32[] get-tuple-element(%trained), index=0
  %all = f32[8,100]{{1,0}} get-tuple-element(%trained), index=1
  ROOT %end = {STATE} tuple(%n, %all, %copy)
}}

ENTRY %main (given: {STATE}) -> {STATE} {{
  %given = {STATE} parameter(0)
  ROOT %steps = {STATE} while(%given), condition=%more, body=%step
}}
"""


@pytest.mark.parametrize(("frozen", "trainable"), [(3, 1), (0, 5)])
def test_loops_count_once_for_each_turn_and_slices_for_their_own_bytes(
    monkeypatch: pytest.MonkeyPatch, frozen: int, trainable: int
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    executable = runpy.run_path(str(ROOT / "benchmarks" / "h100.py"))["Executable"]
    kernels, moved = executable(TEXT).step(frozen, trainable)
    turn, copy = 400 + 4 + 400, 2 * 400  # a row and its number are read, a row is written; the copy
    assert kernels == 2 * (frozen + trainable) + 1  # a fused kernel and the loop's condition
    assert moved == turn * (frozen + trainable) + copy


THUNKS = """000: kCopy         [source       | next=001 (1)] kCopy
001: kWhile        [prev=000 (1) | sink        ]
condition:
    002: kCustomKernel [source | sink] compare
  body:
    000: kCommandBuffer [source       | next=019 (1)]
        003: kCustomKernel [source       | next=004 (1)] add
        004: kCopy         [prev=003 (1) | sink        ] kCopy
    005: kWhile         [prev=000 (1) | next=000 (1)]
condition:
        006: kCustomKernel [source | sink] compare
      body:
        000: kCommandBuffer [source | sink]
            007: kCustomKernel [source       | sink] layer
        008: kCopy         [source | sink] kCopy
    000: kCustomKernel [prev=005 (1) | sink        ] rest
"""


def test_a_graph_is_one_launch_and_a_loop_outside_of_graphs_reads_its_condition(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    of_a_step = runpy.run_path(str(ROOT / "benchmarks" / "h100_loops.py"))["of_a_step"]
    before = tmp_path / "module_0001.jit_train_stage.thunk_sequence.txt"
    before.write_text(THUNKS)
    for turns in (0, 3):
        # The step's condition, graph and last kernel; the inner loop's graph and copy, and its condition once more.
        assert of_a_step(tmp_path, turns) == {"launches": 3 + 2 * turns + turns + 1, "conditions read": 1 + turns + 1}
    whole = "000: kCommandBuffer [source | sink]\n" + "".join(f"    {line}\n" for line in THUNKS.splitlines())
    before.with_name(before.stem + "_after_thunk_passes.txt").write_text(whole)
    assert of_a_step(tmp_path, 3) == {"launches": 0, "conditions read": 0}
