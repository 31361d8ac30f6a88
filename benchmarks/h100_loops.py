"""What of a step the host launches on an H100, from XLA's compiler, on a machine without one: nothing is run.

    python benchmarks/h100_loops.py

XLA puts kernels into CUDA graphs ("command buffers"), each of which is launched as one. A loop whose length is known
only when it runs stays outside by default: the host reads its condition in each turn. With XLA's flags for loops (CUDA
12.3 or newer) it can be part of a graph. Counted are a layerwise step's launches and readings; a graph does its own
itself. Needs what ``h100.py`` needs.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import common

CHILD = "--child"
GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE"
FLAGS = {
    "default": "",
    "graphs of any size": "--xla_gpu_graph_min_graph_size=1",
    "loops in graphs": f"--xla_gpu_enable_command_buffer={GRAPHS}",
    "loops in graphs of any size": f"--xla_gpu_enable_command_buffer={GRAPHS} --xla_gpu_graph_min_graph_size=1",
}
VERSIONS = "".join(f' {name}_version: "12.8.0"' for name in ("driver", "runtime", "compile_time_toolkit"))
CASES = {"digits, batch 32, 10 lanes: layerwise, stage 4": 3, "ViT-Tiny, batch 512, 4 lanes: layerwise, stage 12": 11}


class Node(NamedTuple):
    """A line of XLA's list of what a program does, and what is in it, such as the kernels of a graph."""

    kind: str
    body: list["Node"]
    condition: list["Node"]


def main() -> None:
    if CHILD in sys.argv:
        compile_case(sys.argv[-1])
        return
    common.arguments(__doc__ or "")
    rows = []
    for case, frozen in CASES.items():
        for name, flags in FLAGS.items():
            with tempfile.TemporaryDirectory() as folder:
                dump = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
                environment = os.environ | {"XLA_FLAGS": f"{flags} {dump}"}
                subprocess.run([sys.executable, __file__, CHILD, case], env=environment, check=True)
                rows.append({"program": case, "XLA_FLAGS": name, **of_a_step(Path(folder), frozen)})
    common.publish("h100_loops", "What the host does in a step, compiled for an H100", rows, flags=FLAGS)


def compile_case(name: str) -> None:
    """Compile a case in bfloat16, in a process with XLA's flags."""
    import h100

    h100.TARGET = h100.TARGET.replace("registers_per_block_limit: 65536", "registers_per_block_limit: 65536" + VERSIONS)
    (case,) = [case for case in h100.cases() if case.name == name]
    h100.measure(case, "bfloat16", None)


def of_a_step(folder: Path, frozen: int) -> dict[str, int]:
    """What the host does in a turn of the outermost loop, from XLA's list of what the program does ("thunks")."""
    texts = {path.name: path.read_text() for path in folder.glob("*train_stage*.thunk_sequence*.txt")}
    first = min(texts)[:11]  # module_0001, which is the whole program
    *_, final = (text for name, text in sorted(texts.items()) if name.startswith(first))  # after passes, if any
    top = parse(final)
    if [node.kind for node in top] == ["kCommandBuffer"]:
        return {"launches": 0, "conditions read": 0}
    (steps,) = [node for node in top if node.kind == "kWhile"]
    launches, conditions = count(steps.body, frozen)
    return {"launches": launches + len(steps.condition), "conditions read": conditions + 1}


def parse(text: str) -> list[Node]:
    """The tree that the lines' indentation gives."""
    top = list[Node]()
    inside: list[tuple[int, list[Node], Node | None]] = [(-1, top, None)]
    for line in text.splitlines():
        if line.strip() == "body:":
            while (loop := inside[-1][2]) is None or inside[-1][1] is not loop.condition:
                inside.pop()
            inside[-1] = inside[-1][0], loop.body, loop
        elif found := re.match(r"( *)\d+: (k\w+)", line):
            node, indent = Node(found[2], [], []), len(found[1])
            while inside[-1][0] >= indent:
                inside.pop()
            inside[-1][1].append(node)
            is_loop = node.kind == "kWhile"
            inside.append((indent, node.condition if is_loop else node.body, node))
    return top


def count(nodes: list[Node], turns: int) -> tuple[int, int]:
    """Launches of kernels, copies and graphs, and conditions that the host reads.

    All loops have ``turns`` turns: those of a layerwise stage are over the frozen layers.
    """
    launches = conditions = 0
    for node in nodes:
        if node.kind != "kWhile":
            launches += 1
            continue
        of_body, read = count(node.body, turns)
        launches += turns * of_body + (turns + 1) * len(node.condition)
        conditions += turns * read + turns + 1
    return launches, conditions


if __name__ == "__main__":
    main()
