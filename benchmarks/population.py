"""A million clients on one machine: set-up, memory, a round of 1,000; and a round's memory by size of the cohort.

Every measurement is a process of its own; memory is what the operating system counts at its peak.
"""

import json
import resource
import subprocess
import sys
import time
from typing import Any

import common

CHILD = "--child"


def main() -> None:
    if CHILD in sys.argv:
        clients, cohort, rounds = map(int, sys.argv[sys.argv.index(CHILD) + 1 :])
        print(json.dumps(measure(clients, cohort, rounds)))
        return
    options = common.arguments(__doc__ or "")
    few = [child(10_000, 1000, 0) for _ in range(options.repeats)]
    many = [child(1_000_000, 1000, 0) for _ in range(options.repeats)]
    middle = options.repeats // 2
    rows: list[dict[str, Any]] = [
        {"what": "set-up of 1,000,000 clients, s", "figure": sorted(r["set-up"] for r in many)[middle]},
        {
            "what": "host memory beyond 10,000 clients', MB",
            "figure": sorted(r["memory after set-up"] for r in many)[middle]
            - sorted(r["memory after set-up"] for r in few)[middle],
        },
        {"what": "drawing a cohort of 1,000 and its work, s", "figure": sorted(r["draw"] for r in many)[middle]},
        {"what": "a round of 1,000 of them, s", "figure": child(1_000_000, 1000, 1)["round"]},
    ]
    peaks = {}
    for cohort in (64, 512, 4096):  # the same number of clients in all, so that only the cohort differs
        peaks[cohort] = child(1_000_000, cohort, 4096 // cohort)["peak"]
        what = f"peak memory of a process, {4096 // cohort} rounds of {cohort}, MB"
        rows.append({"what": what, "figure": peaks[cohort]})
    rows.append({"what": "4,096 / 64", "figure": peaks[4096] / peaks[64]})
    common.publish("population", "Populations", rows)


def child(*arguments: int) -> dict[str, float]:
    """A fresh process."""
    command = [sys.executable, __file__, CHILD, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(clients: int, cohort: int, rounds: int) -> dict[str, float]:
    """Set a population up and run rounds of it."""
    import jax
    import numpy as np

    from lwfedssl_jax.config import Config, override, resolve
    from lwfedssl_jax.simulation import setup
    from lwfedssl_jax.simulation.cohort import draw_cohort, pack_cohort
    from lwfedssl_jax.simulation.simulator import Simulator
    from lwfedssl_jax.system import devices

    devices.set_up_cpu()
    config = resolve(
        override(
            Config(),
            {
                "data.name": "synthetic", "data.image_size": 8, "data.synthetic_examples": 5000,
                "partition.kind": "shared", "partition.clients": clients, "partition.examples_per_client": 24,
                "partition.size_sigma": 0.5, "federation.clients_per_round": cohort, "model.name": "vit_micro",
                "model.width": 32, "model.heads": 2, "model.depth": 2, "objective.hidden_dim": 64,
                "objective.output_dim": 32, "objective.name": "simclr", "objective.temperature": 0.2,
                "federation.rounds": 2, "federation.local_epochs": 1, "optimizer.batch_size": 16, "runtime.remat": True,
            },
        )
    )  # fmt: skip
    jax.devices()
    began = time.perf_counter()
    run = setup.prepare(config)
    result = {"set-up": time.perf_counter() - began, "memory after set-up": peak()}
    began = time.perf_counter()
    reporting = draw_cohort(run, 1).reporting
    next(pack_cohort(run, reporting, 1).calls)
    result["draw"] = time.perf_counter() - began
    if rounds:
        simulator = Simulator([run])
        params = simulator.stack.place(jax.tree.map(np.asarray, setup.initial_params(run)))
        simulator.program(run.stages[1])
        began = time.perf_counter()
        for number in range(rounds):
            jax.block_until_ready(simulator.run_rounds(run.stages[1], params, None, 2 + number).params)
        result["round"] = (time.perf_counter() - began) / rounds
    return result | {"peak": peak()}


def peak() -> float:
    """The process's peak memory so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    main()
