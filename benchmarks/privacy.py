"""Differential privacy and the three strategies: accuracy at one epsilon, beside noise alone, with a clip for each.

    python benchmarks/privacy.py                          # 112 runs that choose clips, 36 that are reported
    python benchmarks/privacy.py --seeds 0 1 2 --epsilon 8

On digits, 200 clients of 64 images, of which 20 take part in a round (Poisson), with the noise of this federation and
of one of 2,000 clients, 200 in a round, which they stand for. The clip of each strategy and federation is the one that
is most accurate (linear probe, 20 labels per class) on seeds that are not reported: a choice that looks at data,
without privacy of its own. Runs are kept in runs/privacy, and are not repeated.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import pandas as pd

from lwfedssl_jax.analysis.results import load_results

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "privacy"
CHOSEN_BY = "linear_probe_20"
PROTOCOLS = ("linear_probe_20", "linear_probe_all", "knn")
STRATEGIES: dict[str, dict[str, Any]] = {
    "layerwise": {"strategy.name": "layerwise", "model.depth": 6},
    "progressive": {"strategy.name": "progressive", "model.depth": 6},
    "end_to_end": {"strategy.name": "end_to_end", "model.depth": 6},
    "end_to_end, 1 layer": {"strategy.name": "end_to_end", "model.depth": 1},
}
COHORTS = {0: "200 clients, 20 per round", 200: "2,000 clients, 200 per round"}
CLIPS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
SWEEP = '''"""{about}"""

from lwfedssl_jax.config import load, override
from lwfedssl_jax.sweep import Sweep

base = override(
    load("quickstart"),
    {{
        "model.width": 32, "model.heads": 4, "objective.hidden_dim": 64, "objective.output_dim": 32,
        "partition.kind": "shared", "partition.clients": 200, "partition.examples_per_client": 64,
        "federation.clients_per_round": 20, "federation.sampling": "poisson", "federation.local_epochs": 2,
        "evaluation.labels_per_class": (20, 0),
    }},
)
sweep = Sweep(base=base, runs={runs!r}, seeds={seeds!r})
'''


def main() -> None:
    options = common.arguments(
        __doc__ or "",
        seeds={"type": int, "nargs": "+", "default": [0, 1, 2]},
        tuning_seeds={"type": int, "nargs": "+", "default": [100, 101]},
        epsilon={"type": float, "default": 8.0},
        delta={"type": float, "default": 1e-5},
    )
    promised = {"privacy.epsilon": options.epsilon, "privacy.delta": options.delta}
    tried = [
        strategy | {"privacy.noise_cohort": cohort, "privacy.clip": clip} | promised
        for strategy in STRATEGIES.values()
        for cohort in COHORTS
        for clip in CLIPS
    ]
    found = run_sweep(f"clips_{options.epsilon:g}", "Which clip suits each strategy.", tried, options.tuning_seeds)
    keys = ["strategy", "privacy.noise_cohort"]
    means = found.groupby([*keys, "privacy.clip"])[f"accuracy.{CHOSEN_BY}"].mean()
    clips = {key: float(group.idxmax()[-1]) for key, group in means.groupby(level=keys)}
    chosen = [*STRATEGIES.values()]
    chosen += [
        STRATEGIES[strategy] | {"privacy.noise_cohort": cohort, "privacy.clip": clip} | promised
        for (strategy, cohort), clip in clips.items()
    ]
    results = run_sweep(f"chosen_{options.epsilon:g}", "The strategies with their clips.", chosen, options.seeds)
    rows = [
        row(results[(results["strategy"] == strategy) & private(results, cohort)], strategy, cohort)
        for cohort in (None, *COHORTS)
        for strategy in STRATEGIES
    ]
    name = "privacy" if options.epsilon == 8 else f"privacy_{options.epsilon:g}"
    clip_rows = [
        {"strategy": strategy, "federation": COHORTS[cohort], "clip": clip, CHOSEN_BY: round(100 * accuracy, 1)}
        for (strategy, cohort, clip), accuracy in means.items()
    ]
    common.publish(
        name, f"Accuracy at epsilon {options.epsilon:g}", rows,
        seeds=options.seeds, tuning_seeds=options.tuning_seeds, delta=options.delta, clips=clip_rows,
    )  # fmt: skip


def run_sweep(name: str, about: str, runs: list[dict[str, Any]], seeds: list[int]) -> pd.DataFrame:
    """Train what is not trained yet; return a row for each run."""
    RUNS.mkdir(parents=True, exist_ok=True)
    file = RUNS / f"{name}.py"
    file.write_text(SWEEP.format(about=about, runs=runs, seeds=tuple(seeds)))
    command = [sys.executable, str(ROOT / "run.py"), "sweep", str(file), "--workdir", str(RUNS / name)]
    subprocess.run(command, check=True, cwd=ROOT)
    found = load_results(RUNS / name)
    found["strategy"] = found["strategy.name"].where(found["model.depth"] > 1, found["strategy.name"] + ", 1 layer")
    return found[found["finished"]]


def private(results: pd.DataFrame, cohort: int | None) -> Any:
    """Which runs have the noise of a federation; None: those without any."""
    if cohort is None:
        return results["privacy.clip"] == 0
    return (results["privacy.clip"] > 0) & (results["privacy.noise_cohort"] == cohort)


def row(runs: pd.DataFrame, strategy: str, cohort: int | None) -> dict[str, Any]:
    """Means and standard deviations over seeds, in percent, of a setting and of its noise alone."""
    shown: dict[str, Any] = {"federation": "no noise" if cohort is None else COHORTS[cohort], "strategy": strategy}
    shown |= {"clip": float(runs["privacy.clip"].iloc[0]), "seeds": len(runs)}
    for protocol in PROTOCOLS:
        shown[protocol] = spread(runs[f"accuracy.{protocol}"])
        shown[f"{protocol}, untrained"] = spread(runs[f"untrained.{protocol}"])
        alone = runs[f"noise_only.{protocol}"]
        shown[f"{protocol}, noise only"] = "" if cohort is None else spread(alone)
    rank, alone = runs["label_free.effective_rank"], runs["noise_only.label_free.effective_rank"]
    return shown | {
        "effective rank": f"{rank.mean():.1f}",
        "rank, noise only": "" if cohort is None else f"{alone.mean():.1f}",
    }


def spread(values: pd.Series) -> str:
    return f"{100 * values.mean():.1f} ± {100 * values.std():.1f}"


if __name__ == "__main__":
    main()
