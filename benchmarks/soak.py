"""Whether memory, or anything else that a process holds, grows in a small run of very many rounds.

2,000 rounds with an evaluation every 100, checkpoints, and TensorBoard event files; a minute or two on 2 CPU cores. The
process's memory, its threads and open files, the arrays on the device, and the size of the work directory are noted
every 20 rounds; `--seconds` are those between checkpoints, by default as in a run. Each of the first 50 rounds has a
checkpoint, so that what the first ones allocate for good does not count as growth. Writes results/soak.json and
results/soak.png; the slope of memory is a least-squares line after round 100.
"""

import os
import tempfile
import threading
from pathlib import Path
from typing import Any

import common

FIELDS = {
    "partition.clients": 4, "partition.kind": "iid", "data.name": "synthetic", "data.image_size": 8,
    "data.synthetic_examples": 80, "model.width": 16, "model.depth": 4, "model.heads": 2, "objective.hidden_dim": 16,
    "objective.output_dim": 8, "federation.local_epochs": 1, "optimizer.batch_size": 16,
    "evaluation.labels_per_class": (0,), "evaluation.neighbours": 5, "strategy.first_stage_share": 0.0,
    "runtime.trackers": ("tensorboard",),
}  # fmt: skip
EVERY, WARM = 20, 100
KIB = 1024


def measure(directory: Path) -> dict[str, float]:
    """What this process holds now."""
    import jax

    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "host memory (MiB)": resident / KIB**2,
        "device arrays (MiB)": sum(array.nbytes for array in jax.live_arrays()) / KIB**2,
        "threads": len(os.listdir("/proc/self/task")),
        "Python threads": threading.active_count(),
        "open files": len(os.listdir("/proc/self/fd")),
        "work directory (MiB)": sum(p.stat().st_size for p in directory.rglob("*") if p.is_file()) / KIB**2,
    }


def main() -> None:
    options = common.arguments(
        __doc__ or "", rounds={"type": int, "default": 2000}, seconds={"type": float, "default": 60.0}
    )
    import numpy as np
    import orbax.checkpoint  # noqa: F401  the first checkpoint imports it, wherever that is
    from matplotlib.figure import Figure

    from lwfedssl_jax.config import load, override, resolve
    from lwfedssl_jax.experiment import train
    from lwfedssl_jax.simulation.events import Event, RoundDone
    from lwfedssl_jax.system import devices
    from lwfedssl_jax.workdir import WorkDir

    devices.set_up_cpu()
    devices.set_up_cache(None)
    fields = FIELDS | {"federation.rounds": options.rounds, "evaluation.every": max(1, options.rounds // 20)}
    config, noted = resolve(override(load("quickstart"), fields)), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"

        def hear(event: Event) -> None:
            if isinstance(event, RoundDone) and event.line["round"] == min(WARM, options.rounds) // 2:
                train.SECONDS_BETWEEN_CHECKPOINTS = options.seconds
            if isinstance(event, RoundDone) and event.line["round"] % EVERY == 0:
                noted.append({"round": event.line["round"], **measure(directory)})
                if event.line["round"] % (10 * EVERY) == 0:
                    print({name: round(value, 1) for name, value in noted[-1].items()}, flush=True)

        train.SECONDS_BETWEEN_CHECKPOINTS = 0.0
        train.train(config, WorkDir(directory, config), hear)
    after = [line for line in noted if line["round"] > min(WARM, options.rounds // 2)]
    rounds = np.array([line["round"] for line in after])
    names = [name for name in noted[0] if name != "round"]
    rows = []
    for name in names:
        values = np.array([line[name] for line in after], float)
        slope = float(np.polyfit(rounds, values, 1)[0])
        shown = f"{slope * KIB:+.3f} KiB" if "MiB" in name else f"{slope:+.5f}"
        rows.append(
            {
                "what": name,
                "first": round(float(values[0]), 2),
                "last": round(float(values[-1]), 2),
                "largest": round(float(values.max()), 2),
                "per round": shown,
            }
        )
    common.publish("soak", f"{options.rounds:,} rounds, from round {after[0]['round']} on", rows, noted=noted)
    figure = Figure(figsize=(9, 5), layout="constrained")
    for axes, name in zip(figure.subplots(2, 3).flat, names, strict=True):
        axes.plot([line["round"] for line in noted], [line[name] for line in noted])
        axes.set(title=name, xlabel="round")
        axes.set_ylim(bottom=0)
    figure.savefig(common.RESULTS / "soak.png", dpi=120)


if __name__ == "__main__":
    main()
