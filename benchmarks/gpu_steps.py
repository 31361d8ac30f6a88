"""The steps of ``gpu.py``, each run by it in a process of its own; a JSON line for each measurement."""

import contextlib
import functools
import gzip
import importlib.metadata
import importlib.util
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout needs no installation

import jax
import jax.numpy as jnp
import numpy as np
from gpu import NO_ACCELERATOR

from lwfedssl_jax.config import Config, override, resolve
from lwfedssl_jax.costs.memory import COMPILER_OPTIONS, step_and_arguments
from lwfedssl_jax.costs.operations import executed_operations, stage_parts
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.simulation import rounds, setup
from lwfedssl_jax.simulation.lanes import SAMPLES_AT_ONCE, lanes_and_mesh
from lwfedssl_jax.simulation.simulator import Simulator
from lwfedssl_jax.system.devices import program_memory, set_up_cpu
from lwfedssl_jax.tree import Tree

GIB = 2**30
REQUEST: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
TINY = bool(REQUEST.get("tiny"))
REPEATS, SECONDS = (2, 0.0) if TINY else (3, 2.0)  # least number of timed rounds, and least seconds of them
LONG = 5.0  # seconds after which two timed rounds are enough
VIT: dict[str, Any] = {"model.name": "vit_tiny"}
if TINY:
    VIT = {"model.width": 8, "model.depth": 3, "model.heads": 2, "objective.hidden_dim": 8, "objective.output_dim": 4}
DIGITS = {**VIT, "model.name": "vit_micro", "data.name": "digits", "data.views": "digits", "data.image_size": 16}
COMPILED_AT_ONCE = 4
PRECISIONS = ("bfloat16", "tensorfloat32", "float32")


def main() -> None:
    set_up_cpu()
    if jax.default_backend() == "cpu" and not TINY:
        sys.exit(NO_ACCELERATOR)
    print(json.dumps({"device": jax.devices()[0].device_kind}), flush=True)
    STEPS[REQUEST["step"]]()


def say(case: str, value: float, unit: str, **more: Any) -> None:
    """Report a measurement."""
    known = {name: what for name, what in more.items() if what == what}  # JSON has no NaN
    print(json.dumps({"case": case, "value": value, "unit": unit} | known), flush=True)


def note(text: str) -> None:
    """Report a remark."""
    print(json.dumps({"note": " ".join(text.split())[:300]}), flush=True)


def is_new(case: str) -> bool:
    """Whether a case is still to be measured."""
    return [REQUEST["step"], case] not in REQUEST.get("measured", [])


@contextlib.contextmanager
def failures(case: str) -> Iterator[None]:
    """Report a case that fails, such as for lack of memory, and go on with the next one."""
    try:
        yield
    except Exception as error:
        note(f"{case}: {type(error).__name__}: {error}")


def make_config(**changes: Any) -> Config:
    """A config of generated images, ``optimizer.batch_size`` x ``steps`` for each of ``clients``."""
    steps, clients, batch = changes.pop("steps", 4), changes.pop("clients", 1), changes.pop("batch", 32)
    base: dict[str, Any] = {
        "data.name": "synthetic", "data.image_size": 8 if TINY else 32, "data.views": "natural",
        "data.synthetic_examples": 128 if TINY else 5000, "partition.kind": "shared", "partition.clients": clients,
        "partition.examples_per_client": steps * batch, "objective.name": "simclr", "objective.temperature": 0.2,
        "federation.rounds": 12, "federation.local_epochs": 1, "optimizer.batch_size": batch,
        "evaluation.labels_per_class": (0,),
    }  # fmt: skip
    return resolve(override(Config(), base | {k.replace("__", "."): v for k, v in changes.items()}))


def make_simulator(config: Config, stages: Sequence[int] = (), devices: Any = None) -> Simulator:
    """A simulator on the first device of this machine, or on the given ones; ``stages`` are compiled, as in a run."""
    run = setup.prepare(config, devices or jax.devices()[:1])
    return Simulator([run], [run.stages[index] for index in stages])


def start(simulator: Simulator) -> Tree:
    """Initial parameters on the simulator's devices."""
    return simulator.resume(0, [{}] * len(simulator.runs))[0]


def seconds_of(run: Callable[[], Any]) -> list[float]:
    """Seconds of each run, after one that is not counted: it compiles, and finds how many steps a call may have."""
    run()
    seconds: list[float] = []
    while not is_enough(seconds):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return seconds


def is_enough(seconds: Sequence[float]) -> bool:
    """Whether rounds have been timed often enough."""
    return (len(seconds) >= REPEATS and sum(seconds) >= SECONDS) or (len(seconds) > 1 and sum(seconds) >= LONG)


def time_stage(simulator: Simulator, stage: Stage) -> tuple[list[float], float]:
    """Seconds of each round of a stage, and those of its compilation, which may come from the cache."""
    params = start(simulator)
    began = time.perf_counter()
    simulator.program(stage)
    compiled = time.perf_counter() - began
    return seconds_of(
        lambda: jax.block_until_ready(simulator.run_rounds(stage, params, None, stage.first_round + 1).params)
    ), compiled


def measure_stage(case: str, simulator: Simulator, stage: Stage, *, steps: int) -> None:
    """Report the client steps a second of rounds in which each client has ``steps`` steps."""
    seconds, compile_seconds = time_stage(simulator, stage)
    median, run = statistics.median(seconds), simulator.run
    automatic = override(run.config, {"runtime.lanes": 0})
    say(
        case, len(run.clients) * steps / median, "client steps/s",
        **{"lanes": run.lanes, "chosen": lanes_and_mesh(automatic, "lanes", jax.devices()[:1])[0] == run.lanes,
           "precision": run.config.runtime.precision, "remat": run.config.runtime.remat, "round s": median,
           "program GiB": program_memory(simulator.program(stage).steps) / GIB, "runs": seconds,
           "work": work_of(run.config, stage.depth)},
        **({"compile s": compile_seconds} if compile_seconds > 0.1 else {}),
    )  # fmt: skip


def work_of(config: Config, depth: int) -> list[Any]:
    """What a side must have in common with its rival."""
    return [config.model.name, config.strategy.name, config.runtime.precision, config.optimizer.batch_size, depth]


def machine() -> None:
    """Versions, the device, and what it can do at most."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax", "chex", "numpy", "torch")
    versions = {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)}
    say(device.device_kind, float(len(jax.devices())), "devices", platform=device.platform, **versions)
    stats = device.memory_stats() or {}
    if stats:
        say("memory_stats", stats["bytes_limit"] / GIB, "GiB a program may use", keys=" ".join(sorted(stats)))
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        query = "name,driver_version,power.limit,clocks.max.sm,clocks.max.mem,temperature.gpu"
        answer = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        )
        note(f"nvidia-smi: {answer.stdout.strip()}")
    for precision in PRECISIONS:
        say(f"matrix product, {precision}", matrix_peak(precision) / 1e12, "TFLOP/s")
    say("copy", copy_peak() / 1e9, "GB/s read and written")


@functools.cache
def matrix_peak(precision: str) -> float:
    """FLOP/s of a large square product."""
    n = 256 if TINY else 8192
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    how = {"float32": "highest", "tensorfloat32": "high"}.get(precision)
    product = jax.jit(lambda a: jax.lax.dot(a, a, precision=how, preferred_element_type=jnp.float32))
    return 2 * n**3 / shortest(product, jax.random.normal(jax.random.key(0), (n, n), dtype))


@functools.cache
def copy_peak() -> float:
    """Bytes read and written a second by adding a number to a large array."""
    n = 2**16 if TINY else 2**28
    return 8 * n / shortest(jax.jit(lambda a: a + 1), jnp.ones(n, jnp.float32))


def shortest(f: Callable[[Any], Any], a: Any) -> float:
    """Seconds of a call: the least of three times ten calls that are queued together, once the clocks have risen."""
    began = time.perf_counter()
    while time.perf_counter() - began < (0 if TINY else 0.3):
        jax.block_until_ready(f(a))
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        jax.block_until_ready([f(a) for _ in range(10)][-1])
        best = min(best, (time.perf_counter() - began) / 10)
    return best


def parity() -> None:
    """The same round, 4 clients of 2 steps, on the CPU in float32 and on the accelerator by precision.

    For scale, the CPU with 1 lane against 2: rounding grows from step to step.
    """
    cpu, sizes = jax.devices("cpu")[:1], {**DIGITS, "clients": 4, "steps": 2}

    @functools.cache
    def update(strategy: str, precision: str, on_cpu: bool, lanes: int) -> np.ndarray:
        config = make_config(**sizes, strategy__name=strategy, runtime__precision=precision, runtime__lanes=lanes)
        simulator = make_simulator(config, devices=cpu if on_cpu else None)
        stage = simulator.run.stages[1 if strategy == "layerwise" else 0]
        before = start(simulator)
        params = simulator.run_rounds(stage, before, None, stage.first_round + 1).params
        return flat(jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, before))

    sides: dict[str, tuple[str, bool, int]] = {"float32": ("float32", False, 2)}
    sides["the CPU with 1 lane"] = ("float32", True, 1)
    sides |= {} if TINY else {precision: (precision, False, 2) for precision in ("tensorfloat32", "bfloat16")}
    for side, strategy in itertools.product(sides, ("layerwise", "end_to_end")[: 1 if TINY else None]):
        case = f"{strategy}, {side}"
        if is_new(case):
            with failures(case):
                found, expected = update(strategy, *sides[side]), update(strategy, "float32", True, 2)
                difference = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
                largest = {"largest difference": float(np.abs(found - expected).max())}
                say(case, difference, "relative L2 of a round's update", **largest)


def flat(params: Tree) -> np.ndarray:
    """All numbers of a tree."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])


def lanes() -> None:
    """Digits, the quick start's encoder and batch."""
    steps = 2 if TINY else 20
    for count in (2,) if TINY else (0, 100, 10, 1):
        sizes: dict[str, Any] = {**DIGITS, "clients": 4 if TINY else 100, "steps": steps, "runtime.lanes": count}
        for strategy in ("layerwise", "end_to_end"):
            case = f"{strategy}, {count or 'automatic'} lanes"
            if is_new(case):
                with failures(case):
                    simulator = make_simulator(make_config(**sizes, strategy__name=strategy), [-1])
                    measure_stage(case, simulator, simulator.run.stages[-1], steps=steps)


def stages(batch: int = 512) -> None:
    """ViT-Tiny by strategy, stage, precision and lanes; the cases that tell most come first.

    Programs of a few cases are compiled at once, during which only XLA times kernels, to choose among them.
    """
    steps, batch, numbers = (2, 4, (3, 1)) if TINY else (4, batch, (12, 3, 1))
    clients = 2 * SAMPLES_AT_ONCE // batch if batch < 512 else 16  # the same for all numbers of lanes
    sides = [(count, PRECISIONS[0]) for count in (4, 16)] + [(4, p) for p in PRECISIONS[1:]]
    automatic = [0] * (SAMPLES_AT_ONCE // batch not in (4, 16))
    sides += [(count, PRECISIONS[0]) for count in (1, *automatic)]
    cases = []
    for (count, precision), (strategy, remat) in itertools.product(
        sides[:1] if TINY else sides, (("layerwise", False), ("end_to_end", False), ("end_to_end", True))
    ):
        name = f"{strategy}{', remat' * remat}, {precision}, {count or 'automatic'} lanes"
        config = make_config(
            **VIT, strategy__name=strategy, runtime__remat=remat, runtime__precision=precision,
            runtime__lanes=count, clients=4 if TINY else clients, batch=batch, steps=steps,
        )  # fmt: skip
        named = {f"{name}, stage {n}": n - 1 for n in (numbers if strategy == "layerwise" else (1,))}
        if wanted := {case: index for case, index in named.items() if is_new(case)}:
            cases.append((config, wanted))
    for first in range(0, len(cases), COMPILED_AT_ONCE):
        group = cases[first : first + COMPILED_AT_ONCE]
        with ThreadPoolExecutor(COMPILED_AT_ONCE) as pool:
            simulators = list(pool.map(lambda case: compiled(*case), group))
        for simulator, (_, wanted) in zip(simulators, group, strict=True):
            for case, index in wanted.items() if simulator else ():
                with failures(case):
                    measure_stage(case, simulator, simulator.run.stages[index], steps=steps)


def compiled(config: Config, wanted: dict[str, int]) -> Simulator | None:
    """A simulator with the programs of the stages compiled, or None if they do not fit into memory."""
    with failures(next(iter(wanted))):
        return make_simulator(config, list(wanted.values()))
    return None


def rival() -> None:
    """Sequential PyTorch with the frozen prefix shared by both views: eager, compiled, compiled with CUDA graphs."""
    if not importlib.util.find_spec("torch"):
        note("PyTorch is not installed")
        return
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    clients, steps = (2, 2) if TINY else (4, 4)
    modes = {"eager": "", "compiled, CUDA graphs": "reduce-overhead", "compiled": "default"}
    first = itertools.product(["eager"], (512, 64), PRECISIONS[:2])  # in seconds; a compilation may take a minute
    later = itertools.product(list(modes)[1:], (512, 64), PRECISIONS[:2])
    for (mode, batch, precision), strategy in itertools.product(
        [("eager", 4, PRECISIONS[0])] if TINY else [*first, *later], ("layerwise", "end_to_end")
    ):
        case = f"{strategy}, {precision}, batch {batch}, {mode}"
        if is_new(case):
            config = make_config(
                **VIT, strategy__name=strategy, batch=batch, steps=steps, clients=clients, runtime__precision=precision
            )
            with failures(case):  # also what torch.compile raises
                torch._dynamo.utils.counters.clear()
                seconds = seconds_of(rival_round(config, modes[mode], precision))
                skipped = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
                more = {"not run as CUDA graphs": skipped} if skipped else {}
                work = work_of(config, config.model.depth)
                say(
                    case,
                    clients * steps / statistics.median(seconds),
                    "client steps/s",
                    runs=seconds,
                    work=work,
                    **more,
                )


def rival_round(config: Config, compile_mode: str, precision: str) -> Callable[[], None]:
    """A round of a config's last stage in PyTorch; ``torch.compile`` gets the whole loss, with its views.

    In bfloat16, views and loss are in float32 and the activations between products in bfloat16, as ours.
    """
    import torch
    from peers_torch import Model, simclr_loss, train_round, two_views

    device, size, head = "cuda" if torch.cuda.is_available() else "cpu", config.model, config.objective
    trained = 1 if config.strategy.name == "layerwise" else size.depth
    model = Model(
        config.data.image_size, size.patch_size, size.width, size.depth, size.heads, trained,
        head.hidden_dim, head.output_dim,
    ).to(device)  # fmt: skip
    rng, batch = np.random.default_rng(0), config.optimizer.batch_size
    pixels = rng.integers(0, 256, (config.data.synthetic_examples, *[config.data.image_size] * 2, 3), np.uint8)
    shape = config.partition.clients, config.partition.examples_per_client // batch, batch
    images, rows = torch.tensor(pixels).to(device), torch.tensor(rng.integers(0, len(pixels), shape)).to(device)
    state = [p.detach().clone() for p in model.trainable()]

    def loss_of(batch_images: Any) -> Any:
        views = two_views(batch_images)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            embeddings = model(views)
        return simclr_loss(embeddings.float(), head.temperature)

    if compile_mode:
        torch._dynamo.reset()  # cases do not share what they compile, or recompile for each other's shapes
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # instead of going on without compilation
        loss_of = torch.compile(loss_of, mode=compile_mode, dynamic=False)

    def one_round() -> None:
        train_round(model, state, list(rows), config.learning_rate, lambda batch_rows: loss_of(images[batch_rows]))
        if device == "cuda":
            torch.cuda.synchronize()

    return one_round


def memory() -> None:
    """Peak of one client's step: the device's own count, and the compiler's figures.

    The ledger's figure is of a program that is not autotuned. The device counts from the start of the process, so that
    the smaller programs come first, and a peak that did not grow is only a bound.
    """
    device = jax.devices()[0]
    for name, remat in (("layerwise", False), ("end_to_end", True), ("end_to_end", False)):
        case = f"{name}{', remat' * remat}"
        with failures(case):
            config = make_config(**VIT, batch=4 if TINY else 512, strategy__name=name, runtime__remat=remat)
            step, arguments = step_and_arguments(config, stage_parts(config)[-1])
            lowered = jax.jit(step, donate_argnums=0).lower(*arguments)
            ledgers = math.nan
            with failures(f"{case}, the ledger's program"):
                ledgers = program_memory(lowered.compile(COMPILER_OPTIONS.get(jax.default_backend())))
            program = lowered.compile()
            held = sum(x.nbytes for x in jax.tree.leaves(arguments) if x.dtype != jax.random.key(0).dtype)
            before = device.memory_stats() or {}
            jax.block_until_ready(program(*arguments))
            after = device.memory_stats() or {}
            peak = (after.get("peak_bytes_in_use", math.nan) - before.get("bytes_in_use", 0) + held) / GIB
            grew = after.get("peak_bytes_in_use", 0) > before.get("peak_bytes_in_use", 0)
            say(
                case, program_memory(program) / GIB, "GiB of the program that runs",
                **{"GiB by the ledger": ledgers / GIB, "measured GiB" if grew else "measured GiB, at most": peak},
            )  # fmt: skip


def kernels() -> None:
    """The share of the measured peaks that a step reaches, and the longest kernels of a round of layerwise.

    XLA counts the body of a loop once. The steps for the shares have at most one layer in each loop.
    """
    batch, steps = (4, 2) if TINY else (512, 4)
    for strategy, number in (("layerwise", 2), ("end_to_end", 1)):
        depth = {} if strategy == "layerwise" else {"model__depth": 1}
        for precision in PRECISIONS[: 1 if TINY else None]:
            case = f"{strategy}, {number} layers, {precision}"
            with failures(case):
                config = make_config(
                    **VIT | {"model.depth": 2}, **depth, strategy__name=strategy, batch=batch,
                    runtime__precision=precision,
                )  # fmt: skip
                part = stage_parts(config)[number - 1]
                step, arguments = step_and_arguments(config, part)
                program = jax.jit(step).lower(*arguments).compile()
                median = statistics.median(seconds_of(functools.partial(run_program, program, arguments)))
                flops = 2 * executed_operations(config, part) * batch
                moved = float((program.cost_analysis() or {}).get("bytes accessed", math.nan))
                say(
                    case, 1000 * median, "ms a step",
                    **{"GFLOP": flops / 1e9, "share of matrix peak": flops / median / matrix_peak(precision),
                       "GB moved": moved / 1e9, "share of copy peak": moved / median / copy_peak()},
                )  # fmt: skip
    config = make_config(
        **VIT, strategy__name="layerwise", batch=batch, steps=steps, clients=4, runtime__lanes=4,
        runtime__precision="bfloat16",
    )  # fmt: skip
    simulator = make_simulator(config)
    stage, params = simulator.run.stages[-1], start(simulator)

    def one_round() -> None:
        jax.block_until_ready(simulator.run_rounds(stage, params, None, stage.first_round + 1).params)

    one_round(), one_round()
    seconds, count = Counter[str](), Counter[str]()
    with failures("trace"), tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            one_round()
        for name, length in traced_kernels(Path(folder)):
            seconds[name] += length
            count[name] += 1
    if not seconds:
        note("the profiler's trace has no kernels")
        return
    total = sum(seconds.values())
    say(
        f"a round of {steps} steps of 4 lanes", sum(count.values()) / steps, "kernels a step of all lanes",
        **{"device ms a step": 1000 * total / steps},
    )  # fmt: skip
    for name, value in seconds.most_common(12):
        say(name, 100 * value / total, "% of the time on the device", launches=count[name])


def run_program(program: Any, arguments: Any) -> None:
    """Run a compiled program to its end."""
    jax.block_until_ready(program(*arguments))


def traced_kernels(folder: Path) -> Iterator[tuple[str, float]]:
    """Name and seconds of each kernel in a profiler's trace; on a CPU, of each of XLA's operations."""
    content = json.loads(gzip.decompress(next(folder.rglob("*.trace.json.gz")).read_bytes()))
    events = content["traceEvents"]
    processes = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    where, which = ("/device:", "Stream") if any("/device:" in p for p in processes.values()) else ("CPU", "XLA")
    for event in events:
        process, thread = processes.get(event.get("pid"), ""), threads.get((event.get("pid"), event.get("tid")), "")
        if event.get("ph") == "X" and where in process and which in thread:
            yield event["name"], event["dur"] / 1e6


def clients() -> None:
    """Clients of log-normal sizes with 64 images in the median, of which a part takes part in each round."""
    populations = ((1000, 20),) if TINY else ((1_000, 1_000), (1_000_000, 1_000), (10_000, 10_000))
    for count, cohort in populations:
        case = f"{count:,} clients, {cohort:,} a round"
        sizes: dict[str, Any] = VIT | {
            "model.name": "vit_micro", "clients": count, "federation.clients_per_round": cohort,
            "partition.examples_per_client": 8 if TINY else 64, "partition.size_sigma": 1.0, "batch": 4 if TINY else 32,
            "runtime.precision": "tensorfloat32",
        }  # fmt: skip
        with failures(case):
            simulator = make_simulator(make_config(**sizes), [1])
            seconds, _ = time_stage(simulator, simulator.run.stages[1])
            more = {"round s": statistics.median(seconds), "lanes": simulator.run.lanes, "runs": seconds}
            say(case, cohort / statistics.median(seconds), "clients/s", precision="tensorfloat32", **more)


def seeds() -> None:
    """Runs of the quick start's sizes that differ in their seed only."""
    count, steps = (2, 2) if TINY else (8, 20)
    sizes: dict[str, Any] = {**DIGITS, "clients": 10, "steps": steps}
    cache = setup.Cache()
    runs = [
        setup.prepare(make_config(**sizes, runtime__seed=seed), jax.devices()[:1], cache=cache) for seed in range(count)
    ]
    stage = runs[0].stages[-1]
    groups = {"one after the other": [runs[i : i + 1] for i in range(count)], "in one program": [runs]}
    for case, sides in groups.items():
        with failures(case):
            simulators = [Simulator(group, cache=cache) for group in sides]
            started = [(s, start(s)) for s in simulators]

            def one_round(started: Any = started) -> None:
                for simulator, params in started:
                    jax.block_until_ready(simulator.run_rounds(stage, params, None, stage.first_round + 1).params)

            seconds = seconds_of(one_round)
            more = {"lanes": runs[0].lanes, "precision": "float32", "runs": seconds}
            say(case, count / statistics.median(seconds), "rounds/s of all runs", **more)


def feed() -> None:
    """The same round with its images on the device, and sent to it call by call."""
    steps = 2 if TINY else 8
    for kind in ("resident", "streamed"):
        with failures(kind):
            config = make_config(
                **VIT, batch=4 if TINY else 128, steps=steps, clients=16, runtime__feed=kind,
                runtime__precision="bfloat16",
            )  # fmt: skip
            simulator = make_simulator(config, [-1])
            measure_stage(kind, simulator, simulator.run.stages[-1], steps=steps)


def resnet() -> None:
    """Four clients of ResNet-18, end to end."""
    steps, batch = (1, 4) if TINY else (4, 128)
    sizes = {"model.name": "resnet18", "model.stem": "small"} | ({"model.width": 4, "model.depth": 2} if TINY else {})
    config = make_config(**sizes, strategy__name="end_to_end", batch=batch, steps=steps, clients=4, runtime__lanes=4,
                         runtime__precision="bfloat16")  # fmt: skip
    for case, vmapped in (("one after the other", False), ("under vmap", True)):

        def over_lanes(f: Callable[..., Any], _: bool, *lanes: Tree, vmapped: bool = vmapped) -> Tree:
            return jax.vmap(f)(*lanes) if vmapped else jax.lax.map(lambda lane: f(*lane), lanes)

        with failures(case), mock.patch.object(rounds, "over_lanes", over_lanes):
            simulator = make_simulator(config)
            measure_stage(case, simulator, simulator.run.stages[0], steps=steps)


STEPS: dict[str, Callable[[], None]] = {
    "machine": machine, "parity": parity, "lanes": lanes, "stages": stages, "rival": rival, "memory": memory,
    "kernels": kernels, "clients": clients, "seeds": seeds, "feed": feed, "resnet": resnet,
    "stages_64": functools.partial(stages, 64),
}  # fmt: skip

if __name__ == "__main__":
    main()
