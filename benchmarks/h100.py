"""What a round's programs cost an H100, from XLA's compiler, on a machine without one: nothing is run.

Kernels and bytes of a step in all lanes, and temporary memory, by precision. Needs ``pip install jax-cuda12-plugin
jax-cuda12-pjrt`` in JAX's version. Kernels are counted in the compiled program, in loops once for each turn; bytes are
those of every kernel's arguments and results, of an array of which a kernel reads or writes a slice those of the slice.
Tiles of matrix products are not tuned, since that needs a device, and caches are ignored.
"""

import collections
import contextlib
import itertools
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import common
import jax
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental import topologies
from jax.sharding import NamedSharding

from lwfedssl_jax.config import Config, load, override, resolve
from lwfedssl_jax.models import attention
from lwfedssl_jax.simulation import setup
from lwfedssl_jax.simulation.feed import Feed
from lwfedssl_jax.simulation.program import trace_stage
from lwfedssl_jax.simulation.rounds import ALL
from lwfedssl_jax.simulation.stack import Stack

TARGET = """gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000
l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
cuda_compute_capability { major: 9 minor: 0 } registers_per_core_limit: 65536 registers_per_block_limit: 65536 }
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3" """
OPTIONS = {"xla_gpu_autotune_level": 0}
MEMORY, CUDNN = 70 * 2**30, 90800  # what a run may ask for; the version of cuDNN
GIB = 2**30

LARGE: dict[str, Any] = {
    "data.name": "synthetic", "data.image_size": 32, "data.views": "natural", "data.synthetic_examples": 5120,
    "partition.kind": "shared", "partition.examples_per_client": 512, "partition.clients": 10,
    "federation.clients_per_round": 10, "objective.name": "mocov3", "optimizer.batch_size": 512, "runtime.lanes": 4,
}  # fmt: skip


class Case(NamedTuple):
    """A program.

    Attributes:
      name: of the case, without the precision.
      config: named config, or None for the defaults.
      changes: to it.
      stage: number of the stage.
    """

    name: str
    config: str | None
    changes: dict[str, Any]
    stage: int


def cases() -> Iterator[Case]:
    """All cases."""
    for name, stage in (("end_to_end", 1), ("progressive", 6), ("layerwise", 1), ("layerwise", 6), ("layerwise", 12)):
        changes = LARGE | {"model.name": "vit_tiny", "strategy.name": name}
        yield Case(f"ViT-Tiny, batch 512, 4 lanes: {name}, stage {stage}", None, changes, stage)
    changes = LARGE | {"model.name": "vit_tiny", "strategy.name": "end_to_end", "runtime.remat": True}
    yield Case("ViT-Tiny, batch 512, 4 lanes: end_to_end with remat, stage 1", None, changes, 1)
    changes = LARGE | {"model.name": "resnet18", "strategy.name": "end_to_end", "optimizer.batch_size": 128}
    yield Case("ResNet-18, batch 128, 4 lanes: end_to_end, stage 1", None, changes, 1)
    for name, stage in (("end_to_end", 1), ("layerwise", 4)):
        changes = {"strategy.name": name, "runtime.lanes": 10}
        yield Case(f"digits, batch 32, 10 lanes: {name}, stage {stage}", "quickstart", changes, stage)


def main() -> None:
    options = common.arguments(
        __doc__ or "",
        only={"default": "", "help": "cases whose names contain this"},
        texts={"type": Path, "default": None, "help": "folder for the compiled programs' texts"},
    )
    rows: list[dict[str, Any]] = []
    for case in (case for case in cases() if options.only in case.name):
        for precision in ("float32", "bfloat16"):
            row = measure(case, precision, options.texts)
            whole = rows[-1] if precision == "bfloat16" else row
            row |= {f"{name}, float32 / this": whole[name] / row[name] for name in ("GB a step", "temporary GiB")}
            rows.append(row)
            print(*row.values(), sep="  ", file=sys.stderr)
    common.publish("h100", "A step in all lanes, compiled for an H100; nothing was run", rows)


def measure(case: Case, precision: str, texts: Path | None) -> dict[str, Any]:
    """Compile a case and count."""
    base = load(case.config) if case.config else Config()
    config = resolve(override(base, case.changes | {"runtime.precision": precision}))
    began = time.perf_counter()
    with as_on_target():
        run = setup.prepare(config, targets())
        stage, images = run.stages[case.stage - 1], run.dataset.train_images
        pool = jax.ShapeDtypeStruct((1, *images.shape), images.dtype, sharding=NamedSharding(run.mesh, ALL))
        feed = Feed(True, lambda calls: ((pool, schedule, steps) for schedule, steps in calls))  # type: ignore[misc]
        traced = trace_stage(run, stage, feed, Stack(1, run.mesh), skipped=("start", "finish"))["steps"]
        program = traced.lower().compile(compiler_options=OPTIONS)
    text, sizes = program.as_text() or "", program.memory_analysis()
    if texts:
        texts.mkdir(parents=True, exist_ok=True)
        (texts / f"{re.sub(r'[^a-z0-9]+', '_', case.name.lower())}_{precision}.txt").write_text(text, encoding="utf-8")
    kernels, moved = Executable(text).step(stage.frozen_depth, stage.trainable_depth)
    return {
        "program": case.name,
        "precision": precision,
        "kernels a step": kernels,
        "GB a step": moved / 1e9,
        "temporary GiB": sizes.temp_size_in_bytes / GIB,
        "seconds to compile": time.perf_counter() - began,
    }


def targets() -> list[Any]:
    """The abstract device, for a mesh."""
    return list(topologies.get_topology_desc("h100", "cuda", target_config=TARGET, topology="1x1x1").devices)


@contextlib.contextmanager
def as_on_target() -> Iterator[None]:
    """Make what asks for the device see the target."""
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (jax, "default_backend", lambda: "gpu"),
            (setup, "memory_limit", lambda mesh: MEMORY),
            (attention, "has_fused_attention", lambda dtype, tokens, features: dtype == "bfloat16"),
            (cudnn, "check_cudnn_version", lambda: CUDNN),
            (cudnn, "check_compute_capability", lambda capability: capability <= "9.0"),
            (cudnn, "is_cuda_compute_capability_equal", lambda capability: capability == "9.0"),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


BYTES = {"pred": 1, "bf16": 2} | {f"{kind}{bits}": bits // 8 for kind in "sufc" for bits in (8, 16, 32, 64, 128)}
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "async-done", "copy-done"}
LINE = re.compile(
    r"\s*(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<code>[a-z][\w\-]*)\((?P<rest>.*)"
)


class Instruction(NamedTuple):
    """A line of a program's text: its name, the bytes of its result, what it does, its operands, and all else."""

    name: str
    nbytes: int
    code: str
    operands: list[str]
    rest: str
    is_root: bool

    def calls(self, *keys: str) -> str:
        """Name of the computation that it calls, or an empty string."""
        found = re.search(rf"\b(?:{'|'.join(keys)})=%([\w.\-]+)", self.rest)
        return found[1] if found else ""


class Executable:
    """A compiled program's computations by name.

    Args:
      text: as XLA prints it.
    """

    def __init__(self, text: str) -> None:
        self._computations: dict[str, dict[str, Instruction]] = {}
        self._entry, instructions = "", dict[str, Instruction]()
        for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
            if begin := re.match(r"(ENTRY )?%([\w.\-]+) \(", line):
                instructions = self._computations[begin[2]] = {}
                self._entry = begin[2] if begin[1] else self._entry
            elif found := LINE.match(line):
                instructions[found["name"]] = parse(found)

    def step(self, frozen: int, trainable: int) -> tuple[int, int]:
        """Kernels and bytes of one step of a round: one turn of the entry's only loop.

        Args:
          frozen, trainable: how many layers of each kind run, which is the length of the loops over them.
        """

        def turns(loop: Instruction) -> int:
            if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
                return int(known[1])
            name = re.search(r'op_name="([^"]*)"', loop.rest)
            return trainable if name and "jvp" in name[1] else frozen  # only what is trained is differentiated

        (steps,) = [i for i in self._computations[self._entry].values() if i.code == "while"]
        return self._count(steps.calls("body"), turns)

    def _count(self, name: str, turns: Callable[[Instruction], int]) -> tuple[int, int]:
        kernels, moved = 0, 0
        instructions = self._computations[name]
        for one in instructions.values():
            if one.code in FREE:
                continue
            if one.code in ("while", "call", "async-start"):
                inner, inner_moved = self._count(one.calls("body", "to_apply", "calls"), turns)
                times = turns(one) if one.code == "while" else 1
                kernels += times * (inner + (one.code == "while"))  # a loop's condition is a kernel of its own
                moved += times * inner_moved
                continue
            kernels += 1
            if one.code == "fusion":
                moved += fusion_bytes(self._computations[one.calls("calls")])
            elif one.code in ("dynamic-slice", "gather"):
                moved += 2 * one.nbytes
            elif one.code == "dynamic-update-slice":
                moved += 2 * instructions[one.operands[1]].nbytes
            else:
                moved += one.nbytes + sum(instructions[x].nbytes for x in one.operands if x in instructions)
        return kernels, moved


def parse(found: re.Match[str]) -> Instruction:
    """An instruction from the parts of its line."""
    rest = found["rest"]
    open_brackets = itertools.accumulate(((c in "({[") - (c in ")}]") for c in rest), initial=1)
    end = next((i for i, count in enumerate(open_brackets) if not count), len(rest))  # the operands'
    shapes = re.findall(r"([a-z]+\d*)\[([0-9,]*)\]", found["shape"])
    nbytes = sum(BYTES.get(kind, 0) * math.prod(map(int, filter(None, sizes.split(",")))) for kind, sizes in shapes)
    operands = re.findall(r"%([\w.\-]+)", rest[:end])
    return Instruction(found["name"], nbytes, found["code"], operands, rest[end:], bool(found["root"]))


def fusion_bytes(instructions: dict[str, Instruction]) -> int:
    """Bytes that a fused kernel reads and writes."""
    users = collections.defaultdict(list)
    for one in instructions.values():
        for position, operand in enumerate(one.operands):
            users[operand].append((one, position))

    def read(name: str, whole: int) -> int:
        total = 0
        for user, position in users[name]:
            if user.code in ("bitcast", "reshape"):
                total += read(user.name, whole)
            elif user.code == "slice" or (user.code in ("dynamic-slice", "gather") and not position):
                total += user.nbytes
            elif user.code not in ("dynamic-update-slice", "scatter") or position:
                return whole
        return min(total, whole)

    def written(one: Instruction) -> int:
        while one.code == "bitcast":
            one = instructions[one.operands[0]]
        if one.code in ("dynamic-update-slice", "scatter"):
            return instructions[one.operands[1 if one.code == "dynamic-update-slice" else 2]].nbytes
        return one.nbytes

    (root,) = [one for one in instructions.values() if one.is_root]
    results = [instructions[name] for name in root.operands] if root.code == "tuple" else [root]
    reads = sum(read(one.name, one.nbytes) for one in instructions.values() if one.code == "parameter")
    return reads + sum(map(written, results))


if __name__ == "__main__":
    main()
