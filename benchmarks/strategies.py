"""A whole pass over all stages of each strategy: seconds, executed operations, peak memory.

Seconds: mocov3 on a ViT of width 64 and 12 blocks, one round a stage (12 rounds of end_to_end). Operations and memory:
ViT-Tiny as published (``configs/paper/vit_tiny_mocov3.py``), by the ledger, with and without rematerialisation.
"""

from typing import Any

import common

DEPTH = 12


def main() -> None:
    options = common.arguments(
        __doc__ or "",
        batch={"type": int, "default": 32},
        memory={"choices": ["yes", "no"], "default": "yes", "help": "also compile ViT-Tiny's steps"},
    )
    import jax
    import numpy as np

    from lwfedssl_jax.config import Config, load, override, resolve
    from lwfedssl_jax.costs import ledger
    from lwfedssl_jax.method.stages import STRATEGIES
    from lwfedssl_jax.simulation import setup
    from lwfedssl_jax.simulation.simulator import Simulator
    from lwfedssl_jax.system import devices

    devices.set_up_cpu()

    def one_pass(strategy: str) -> Any:
        config = resolve(
            override(
                Config(),
                {
                    "data.name": "synthetic", "data.image_size": 32, "data.views": "natural",
                    "partition.kind": "shared", "partition.examples_per_client": 2 * options.batch,
                    "partition.clients": 4, "model.name": "vit_micro", "model.depth": DEPTH,
                    "strategy.name": strategy, "federation.rounds": DEPTH, "federation.local_epochs": 1,
                    "optimizer.batch_size": options.batch, "runtime.remat": jax.default_backend() == "cpu",
                },
            )
        )  # fmt: skip
        run = setup.prepare(config)
        simulator = Simulator([run])
        params = simulator.stack.place(jax.tree.map(np.asarray, setup.initial_params(run)))

        def run_pass() -> None:
            for stage in run.stages:
                for number in range(stage.rounds):
                    after = simulator.run_rounds(stage, params, None, stage.first_round + number + 1)
                    jax.block_until_ready(after)

        return run_pass

    seconds = common.interleave({name: one_pass(name) for name in STRATEGIES}, options.repeats)
    paper = resolve(load("paper/vit_tiny_mocov3"))
    ledgers = {
        remat: ledger.all_strategies(
            override(paper, {"runtime.remat": remat}), memory=options.memory == "yes", notify=print
        )
        for remat in (False, True)
    }
    plain, whole = ledgers[False], ledgers[False]["end_to_end"]
    rows, stages = [], {}
    for name in STRATEGIES:
        row: dict[str, Any] = {
            "strategy": name,
            "pass, median s": sorted(seconds[name])[options.repeats // 2],
            "seconds / end_to_end": common.ratio(seconds[name], seconds["end_to_end"]),
            "operations / end_to_end": plain[name]["flops_executed"] / whole["flops_executed"],
            "recomputed by remat, share": ledgers[True][name]["flops_recomputed"] / plain[name]["flops_executed"],
        }
        if options.memory == "yes":
            for remat, ledger in ledgers.items():
                peak = ledger[name]["peak_memory_bytes"]
                row[f"peak GiB{', remat' * remat}"] = peak / 2**30
                row[f"peak / end_to_end{', remat' * remat}"] = peak / ledger["end_to_end"]["peak_memory_bytes"]
                of_stages = [stage["peak_memory_bytes"] for stage in ledger[name]["per_stage"]]
                stages[f"{name}{', remat' * remat}"] = [round(b / 2**30, 4) for b in of_stages]
                row[f"last / first stage{', remat' * remat}"] = of_stages[-1] / of_stages[0]
        rows.append(row)
    common.publish(
        "strategies", "A pass over all stages (seconds: width 64; the rest: ViT-Tiny, batch 512)", rows,
        **{"peak GiB by stage": stages},
    )  # fmt: skip


if __name__ == "__main__":
    main()
