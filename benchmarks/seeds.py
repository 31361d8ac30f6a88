"""Several seeds of one config: as one sweep against separate runs, and in one program against one after the other.

    python benchmarks/seeds.py                          # whole commands, and rounds
    python benchmarks/seeds.py --rounds-only --seeds 8  # on an accelerator the second part says most

The first part times whole commands; each side begins with an empty folder for compiled programs, which separate runs
share as well, as they do by default. The second times one round of all
runs, alone (``Simulator`` for each) and side by side under ``vmap``, interleaved.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

ROOT = Path(__file__).parent.parent
SWEEP = """from lwfedssl_jax.config import load, override
from lwfedssl_jax.sweep import Sweep
sweep = Sweep(override(load("quickstart"), {{"federation.rounds": {rounds}}}), seeds=range({seeds}))
"""


def main() -> None:
    options = common.arguments(
        __doc__ or "",
        seeds={"type": int, "default": 8},
        rounds={"type": int, "default": 6},
        config={"default": "quickstart"},
        rounds_only={"action": "store_true"},
        whole_repeats={"type": int, "default": 1},
    )
    rows = [] if options.rounds_only else whole_commands(options.seeds, options.rounds, options.whole_repeats)
    rows += one_round(options.config, options.seeds, options.repeats)
    import jax

    title = f"{options.seeds} seeds of {options.config}; whole commands with {options.rounds} rounds"
    common.publish(f"seeds_{jax.default_backend()}", title, rows)


def whole_commands(seeds: int, rounds: int, repeats: int) -> list[dict[str, Any]]:
    """Wall-clock seconds of the commands that a user would give."""

    def separate(folder: Path) -> list[list[str]]:
        return [
            ["train", "quickstart", "--federation.rounds", str(rounds), "--runtime.seed", str(seed), "--workdir",
             str(folder / str(seed)), "--compilation-cache", str(folder / "cache")]
            for seed in range(seeds)
        ]  # fmt: skip

    def sweep(folder: Path, *more: str) -> list[list[str]]:
        (folder / "seeds.py").write_text(SWEEP.format(rounds=rounds, seeds=seeds))
        where = ["--workdir", str(folder / "out"), "--compilation-cache", str(folder / "cache")]
        return [["sweep", str(folder / "seeds.py"), *where, *more]]

    sides = {
        "separate runs": separate,
        "one sweep": sweep,
        "one sweep, 2 jobs": lambda folder: sweep(folder, "--jobs", "2"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, commands in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                began = time.perf_counter()
                for command in commands(Path(folder)):
                    subprocess.run([sys.executable, str(ROOT / "run.py"), *command], check=True, capture_output=True)
                seconds[name].append(time.perf_counter() - began)
                print(f"{name}: {seconds[name][-1]:.0f} s", flush=True)
    rival = next(iter(seconds))
    return [
        {
            "what": name,
            "median s": statistics.median(values),
            "against": rival,
            "x": common.ratio(values, seconds[rival]),
        }
        for name, values in seconds.items()
    ]


def one_round(name: str, seeds: int, repeats: int) -> list[dict[str, Any]]:
    """A round of all runs, of the last stage."""
    from lwfedssl_jax.config import load, override, resolve
    from lwfedssl_jax.simulation import setup
    from lwfedssl_jax.simulation.simulator import Simulator
    from lwfedssl_jax.system import devices

    devices.set_up_cpu()
    shared = setup.Cache()
    configs = [resolve(override(load(name), {"runtime.seed": seed})) for seed in range(seeds)]
    runs = [setup.prepare(config, cache=shared) for config in configs]
    stage = runs[0].stages[-1]

    def rounds(simulators: list[Simulator]) -> Any:
        started = [(s, s.resume(0, [{}] * len(s.runs))[0]) for s in simulators]
        return lambda: [s.run_rounds(stage, params, None, stage.first_round + 1) for s, params in started]

    sides = {"a round, one run after the other": rounds([Simulator([run], cache=shared) for run in runs])}
    for count in {2, seeds}:
        groups = [runs[i : i + count] for i in range(0, seeds, count)]
        sides[f"a round, {count} runs at a time under vmap"] = rounds(
            [Simulator(group, cache=shared) for group in groups]
        )
    seconds = common.interleave(sides, repeats)
    rival = next(iter(seconds))
    return [
        {
            "what": side,
            "median s": statistics.median(values),
            "against": rival,
            "x": common.ratio(values, seconds[rival]),
        }
        for side, values in seconds.items()
    ]


if __name__ == "__main__":
    main()
