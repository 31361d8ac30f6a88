"""How ``benchmarks/h100.py`` counts a compiled program's kernels and bytes."""

import runpy

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
