"""What clipping, noise, canaries, compression and secure sums add to the time and the memory of a round.

    python benchmarks/private_rounds.py

Rounds of 20 clients of 64 images on the quick start's encoder, end to end, which uploads most; each beside the same
round without. At the end, runs of five epsilons are trained, and the compiled programs of rounds counted.
"""

import tempfile
from pathlib import Path
from typing import Any

import common
import jax
import jax.monitoring

from lwfedssl_jax.config import load, override, resolve
from lwfedssl_jax.experiment.train import train
from lwfedssl_jax.simulation import setup
from lwfedssl_jax.simulation.simulator import Simulator
from lwfedssl_jax.system.devices import program_memory
from lwfedssl_jax.workdir import WorkDir

BASE: dict[str, Any] = {
    "strategy.name": "end_to_end", "partition.kind": "shared", "partition.clients": 200,
    "partition.examples_per_client": 64, "federation.clients_per_round": 20, "federation.local_epochs": 2,
}  # fmt: skip
NOISE: dict[str, Any] = {"privacy.clip": 0.004, "privacy.noise_multiplier": 1.0}
SIDES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip and noise": NOISE,
    "adapted clip": NOISE | {"privacy.quantile": 0.5},
    "200 canaries": NOISE | {"privacy.canaries": 200},
    "secure sum, 16 bits": NOISE | {"privacy.secure_sum_bits": 16},
    "int8": {"federation.compression": "int8"},
    "top=0.01": {"federation.compression": "top=0.01"},
}
EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0)


def main() -> None:
    options = common.arguments(__doc__ or "")
    simulators: dict[str, Any] = {}
    for name, changes in SIDES.items():
        run = setup.prepare(resolve(override(load("quickstart"), BASE | changes)))
        simulator = Simulator([run], run.stages)
        params = simulator.stack.place(setup.initial_params(run))
        simulators[name] = simulator, params

    def a_round(name: str) -> None:
        simulator, params = simulators[name]
        jax.block_until_ready(simulator.run_rounds(simulator.run.stages[0], params, None, 1).params)

    seconds = common.interleave({name: lambda name=name: a_round(name) for name in SIDES}, options.repeats)
    plain = memory(simulators["plain"][0])
    rows = [
        {
            "round": name, "seconds": sorted(times)[len(times) // 2], "of plain": common.ratio(times, seconds["plain"]),
            "MiB": memory(simulators[name][0]) / 2**20, "MiB of plain": memory(simulators[name][0]) / plain,
        }
        for name, times in seconds.items()
    ]  # fmt: skip
    common.publish("private_rounds", "Time and memory of a round", rows, compiled_for_epsilons=compiled())


def memory(simulator: Simulator) -> int:
    program = simulator.program(simulator.run.stages[0])
    return max(program_memory(program.steps), program_memory(program.finish))


def compiled() -> dict[str, int]:
    """How many programs of rounds are compiled for the first of five epsilons, and for the others."""
    names: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **about: (
            names.append(str(about.get("fun_name"))) if event == "/jax/core/compile/backend_compile_duration" else None
        )
    )
    counts, cache = {}, setup.Cache()
    with tempfile.TemporaryDirectory() as folder:
        for epsilon in EPSILONS:
            changes = {"privacy.clip": 0.004, "privacy.epsilon": epsilon, "federation.rounds": 2, "model.depth": 2,
                       "federation.sampling": "poisson", "privacy.delta": 1e-5}  # fmt: skip
            config = resolve(override(load("quickstart"), BASE | changes))
            names.clear()
            train(config, WorkDir(Path(folder) / str(epsilon), config), cache=cache)
            counts[f"epsilon {epsilon:g}"] = sum("stage" in name for name in names)
    return counts


if __name__ == "__main__":
    main()
