"""Programs and seconds to compile all 12 stages of each strategy, against one stage alone, and from a warm cache."""

import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import common

CHILD = "--child"


def main() -> None:
    if CHILD in sys.argv:
        print(json.dumps(compile_stages(*sys.argv[sys.argv.index(CHILD) + 1 :])))
        return
    options = common.arguments(__doc__ or "")
    rows = []
    for strategy in ("layerwise", "progressive", "end_to_end"):
        sides: dict[str, list[dict[str, Any]]] = {"all": [], "one": [], "warm": []}
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory() as cache:
                sides["one"].append(child(strategy, "one", "off"))
                sides["all"].append(child(strategy, "all", cache))
                sides["warm"].append(child(strategy, "all", cache))
        seconds = {name: [run["seconds"] for run in runs] for name, runs in sides.items()}
        rows.append(
            {
                "strategy": strategy,
                "stages": sides["all"][0]["stages"],
                "programs": sides["all"][0]["programs"],
                "all stages, median s": sorted(seconds["all"])[options.repeats // 2],
                "one stage, median s": sorted(seconds["one"])[options.repeats // 2],
                "all / one": common.ratio(seconds["all"], seconds["one"]),
                "warm cache / all": common.ratio(seconds["warm"], seconds["all"]),
            }
        )
    common.publish("compile", "Compiling a round, ViT of width 64 and 12 blocks, mocov3", rows)


def child(*arguments: str) -> dict[str, Any]:
    """A fresh process: nothing is compiled yet."""
    done = subprocess.run([sys.executable, __file__, CHILD, *arguments], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compile_stages(strategy: str, which: str, cache: str) -> dict[str, Any]:
    """Trace and compile the stages' programs (``which``: all of them, or the middle one alone)."""
    import jax
    import jax.monitoring

    from lwfedssl_jax.config import Config, override, resolve
    from lwfedssl_jax.simulation import setup
    from lwfedssl_jax.simulation.simulator import Simulator
    from lwfedssl_jax.system import devices

    devices.set_up_cpu()
    devices.set_up_cache(cache)
    config = {"data.name": "synthetic", "data.image_size": 32, "model.name": "vit_micro", "model.depth": 12,
              "strategy.name": strategy, "optimizer.batch_size": 32, "data.views": "natural"}  # fmt: skip
    run = setup.prepare(resolve(override(Config(), config)))
    simulator = Simulator([run])
    jax.block_until_ready(setup.initial_params(run))
    programs = []

    def listen(event: str, duration: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and details["fun_name"] == "jit(train_stage)":
            programs.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    began = time.perf_counter()
    for stage in run.stages if which == "all" else run.stages[len(run.stages) // 2 :][:1]:
        simulator.program(stage)
    return {"seconds": time.perf_counter() - began, "programs": len(programs), "stages": len(run.stages)}


if __name__ == "__main__":
    main()
