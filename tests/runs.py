"""Whole runs: trained ones, and work directories of finished ones written by hand."""

import json
import signal
from pathlib import Path
from typing import Any

from lwfedssl_jax.config import Config, override, resolve, to_dict
from lwfedssl_jax.experiment import train as experiment
from lwfedssl_jax.simulation import events, setup
from lwfedssl_jax.workdir import WorkDir


class Interrupting:
    """Sends this process a signal in the middle of a round, or as soon as it has ended."""

    def __init__(self, number: int, when: str = "after", sent: signal.Signals = signal.SIGINT) -> None:
        self.number, self.when, self.sent = number, when, sent
        self.notices: list[str] = []
        self.heard_after = 0

    def __call__(self, event: events.Event) -> None:
        match event:
            case events.StepsDone() if self.notices:
                self.heard_after += 1
            case events.StepsDone(number) if (number, self.when) == (self.number, "within"):
                signal.raise_signal(self.sent)
            case events.RoundDone(line) if (line["round"], self.when) == (self.number, "after"):
                signal.raise_signal(self.sent)
            case events.Note(text):
                self.notices.append(text)


def train(
    config: Config, path: Path, hear: events.Hear = events.ignore, cache: setup.Cache | None = None
) -> dict[str, Any]:
    return experiment.train(config, WorkDir(path, config), hear, cache)


MIB = 2**20
COST = {"end_to_end": 1.0, "layerwise": 0.25, "progressive": 0.5}


def ledger(share: float) -> dict[str, Any]:
    return {
        "total_bytes": int(share * 40 * MIB), "flops_paper_rule": share * 2e9, "flops_executed": share * 3e9,
        "peak_memory_bytes": int(share * 16 * MIB),
    }  # fmt: skip


def write_run(
    path: Path, accuracy: dict[str, float] | None = None, untrained: float = 0.25, **changes: Any
) -> dict[str, Any]:
    """A work directory of two stages of two rounds; without accuracies, the run is unfinished."""
    fields = {k.replace("__", "."): v for k, v in changes.items()}
    config = to_dict(resolve(override(Config(), {"federation.rounds": 4, "model.depth": 2} | fields)))
    path.mkdir(parents=True)
    about = {"config": config, "config_file": "", "device": "cpu: one", "versions": {"jax": "0.10.2"}}
    (path / "config.json").write_text(json.dumps(about))
    lines: list[dict[str, Any]] = [
        {"event": "evaluation", "round": 0, "protocol": p, "accuracy": untrained} for p in accuracy or {}
    ]
    for number in range(1, 5 if accuracy else 3):
        lines.append(
            {"round": number, "stage": (number + 1) // 2, "loss": 4.0 - number, "seconds": 2.0, "clients": 3,
             "dropped": 1, "download_bytes": 40, "upload_bytes": 24}
        )  # fmt: skip
    lines += [{"event": "evaluation", "round": 4, "protocol": p, "accuracy": a} for p, a in (accuracy or {}).items()]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    strategies = {name: ledger(share) for name, share in COST.items()}
    summary = {
        "strategy": config["strategy"]["name"],
        "rounds": 4,
        "seconds": 8.0,
        "evaluation": {p: {"accuracy": a, "std": 0.125} for p, a in (accuracy or {}).items()},
        "baselines": {"untrained": {p: {"accuracy": untrained} for p in accuracy or {}}},
        "resources": strategies[config["strategy"]["name"]]
        | {"measured": {"download_bytes": 500, "upload_bytes": 300, "clients": 10}},
        "strategies": strategies,
    }
    if accuracy:
        (path / "summary.json").write_text(json.dumps(summary))
    return config


# Accuracies by seed, in which layerwise is 4, 6 and 11 points below end_to_end.
SEEDS = {"end_to_end": (0.80, 0.82, 0.87), "layerwise": (0.76, 0.76, 0.76), "progressive": (0.80, 0.83, 0.86)}
