"""A round of ours against the same round in sequential PyTorch, torch.compile, torch.func.vmap, and engines for FL.

ViT of width 64 and depth 6 on 32x32 images, SimCLR, CLIENTS clients x 2 steps x batch 32, views included; layerwise at
stage 3, and end_to_end. All sides may use the same cores: PyTorch in threads of its products, or one client per core
(Flower in processes, BlazeFL in threads). Needs ``pip install -e ".[peers]"``; an engine that is not installed is left
out (``pfl``; ``blazefl``, from Python 3.12). On a GPU, ``gpu.py`` measures ours against PyTorch.
"""

import argparse
import importlib.util
import statistics
from typing import Any

import common

LAYERWISE, END_TO_END = "layerwise, stage 3", "end_to_end"
TEMPERATURE, STEPS, BATCH = 0.2, 2, 32
PACKAGES = {"Flower simulation": "flwr", "pfl-research": "pfl", "BlazeFL": "blazefl"}


def main() -> None:
    options = common.arguments(
        __doc__ or "",
        clients={"type": int, "default": 32},
        lanes={"type": int, "default": 0, "help": "ours; 0 chooses by device"},
    )
    from peers_engines import ENGINES

    engines = {name: run for name, run in ENGINES.items() if importlib.util.find_spec(PACKAGES[name])}
    rows, checks = [], {}
    for name in (LAYERWISE, END_TO_END):
        ours, simulator = our_side(name, options)
        checks[name] = largest_difference(name, simulator)
        work = work_of(name, simulator, options)
        sides = {
            "ours": ours,
            "PyTorch, sequential": torch_side(work, options.cores),
            "PyTorch, sequential, torch.compile": torch_side(work, options.cores, compiled=True),
            "PyTorch, torch.func.vmap": vmap_side(work, options.cores),
        }
        if options.cores > 1:
            sides["PyTorch, sequential, one thread"] = torch_side(work, 1)
        seconds = common.interleave(sides, options.repeats)
        ratios = {side: common.ratio(seconds["ours"], values) for side, values in seconds.items()}
        for engine, run in engines.items():  # not interleaved: their rounds have no partner among ours
            seconds[engine] = run(work)
            ratios[engine] = statistics.median(seconds["ours"]) / statistics.median(seconds[engine])
        for side, values in seconds.items():
            rows.append(
                {
                    "work": name,
                    "side": side,
                    "median s": statistics.median(values),
                    "fastest s": min(values),
                    "ours / side": ratios[side],
                }
            )
    common.publish(
        f"peers_cpu_{options.cores}_cores",
        f"One round, {options.clients} clients x {STEPS} steps x batch {BATCH}",
        rows,
        **{"largest difference of embeddings for the same weights and views": checks},
    )


def our_side(work: str, options: argparse.Namespace) -> tuple[Any, Any]:
    """A function that runs a round, and the simulator."""
    import jax
    import numpy as np

    from lwfedssl_jax.config import Config, override, resolve
    from lwfedssl_jax.simulation import setup
    from lwfedssl_jax.simulation.simulator import Simulator
    from lwfedssl_jax.system import devices

    devices.set_up_cpu()
    config = resolve(
        override(
            Config(),
            {
                "data.name": "synthetic", "data.image_size": 32, "data.views": "natural",
                "data.synthetic_examples": 5000,
                "partition.kind": "shared", "partition.examples_per_client": STEPS * BATCH,
                "partition.clients": options.clients,
                "model.name": "vit_micro", "objective.name": "simclr", "objective.temperature": TEMPERATURE,
                "strategy.name": work.split(",")[0], "federation.local_epochs": 1, "optimizer.batch_size": BATCH,
                "runtime.remat": True, "runtime.lanes": options.lanes,
            },
        )
    )  # fmt: skip
    run = setup.prepare(config)
    simulator = Simulator([run])
    params = simulator.stack.place(jax.tree.map(np.asarray, setup.initial_params(run)))
    stage = run.stages[2 if work == LAYERWISE else 0]

    def one_round() -> None:
        after = simulator.run_rounds(stage, params, None, stage.first_round + 1)
        jax.block_until_ready(after)

    return one_round, simulator


def torch_model(work: str, simulator: Any) -> Any:
    """PyTorch's model of the same shape with our initial weights."""
    import jax
    import numpy as np
    import torch
    from peers_torch import Model

    from lwfedssl_jax.simulation import setup

    config = simulator.run.config
    depth, trained = (3, 1) if work == LAYERWISE else (6, 6)
    model = Model(32, 4, 64, depth, 4, trained, config.objective.hidden_dim, config.objective.output_dim)
    params = jax.tree.map(np.asarray, setup.initial_params(simulator.run))
    encoder, tensors = params["encoder"], {}

    def linear(name: str, p: dict[str, Any]) -> None:
        tensors[f"{name}.weight"] = p["kernel"].T
        if "bias" in p:
            tensors[f"{name}.bias"] = p["bias"]

    def norm(name: str, p: dict[str, Any]) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = p["scale"], p["bias"]

    linear("embedding", encoder["embedding"]["patch"])
    tensors["position"] = encoder["embedding"]["position"]
    for i in range(depth):
        for name, p in encoder["blocks"].items():
            (norm if "norm" in name else linear)(f"blocks.{i}.{name}", {k: v[i] for k, v in p.items()})
    norm("norm", encoder["norm"])
    for name, p in params["projection"].items():
        kind, i = name.split("_")
        (linear if kind == "Dense" else norm)(f"head.{3 * int(i) + (kind != 'Dense')}", p)
    model.load_state_dict({k: torch.tensor(np.ascontiguousarray(v)) for k, v in tensors.items()})
    return model


def work_of(name: str, simulator: Any, options: argparse.Namespace) -> Any:
    """The same round as ours for PyTorch and the engines."""
    import torch
    from peers_engines import Work

    run = simulator.run
    return Work(
        model=torch_model(name, simulator),
        images=torch.tensor(run.dataset.train_images),
        clients=[torch.tensor(run.clients[i]).reshape(STEPS, BATCH) for i in range(options.clients)],
        rate=run.config.learning_rate,
        temperature=TEMPERATURE,
        cores=options.cores,
        rounds=options.repeats + 1,
    )


def torch_side(work: Any, threads: int, *, compiled: bool = False) -> Any:
    """A function that runs the round in sequential PyTorch."""
    import torch
    from peers_torch import simclr_loss, train_round, two_views

    model = work.new_model()
    state = [p.detach().clone() for p in model.trainable()]
    loss_of_views = lambda views: simclr_loss(model(views), work.temperature)  # noqa: E731
    loss_of_views = torch.compile(loss_of_views) if compiled else loss_of_views

    def one_round() -> None:
        torch.set_num_threads(threads)
        train_round(model, state, work.clients, work.rate, lambda rows: loss_of_views(two_views(work.images[rows])))

    return one_round


def vmap_side(work: Any, threads: int) -> Any:
    """A function that runs the round in PyTorch with all clients side by side."""
    import torch
    from peers_torch import simclr_loss, two_views
    from torch.func import functional_call, grad, vmap

    model, count = work.new_model(), len(work.clients)
    for block in model.blocks:
        block.fused = False
    trained = {id(p) for p in model.trainable()}
    names = [name for name, p in model.named_parameters() if id(p) in trained]
    fixed = {name: p.detach() for name, p in model.named_parameters() if id(p) not in trained}
    start = {name: p.detach() for name, p in model.named_parameters() if id(p) in trained}
    batches = torch.stack(work.clients, 1)

    def loss(parameters: dict[str, Any], views: Any) -> Any:
        return simclr_loss(functional_call(model, {**fixed, **parameters}, (views,)), work.temperature)

    gradients = vmap(grad(loss))

    def one_round() -> None:
        torch.set_num_threads(threads)
        many = {name: start[name].expand(count, *start[name].shape).clone() for name in names}
        optimizer = torch.optim.AdamW(list(many.values()), lr=work.rate, weight_decay=1e-5, fused=True)
        for rows in batches:
            views = two_views(work.images[rows.flatten()]).unflatten(1, (count, BATCH)).transpose(0, 1)
            for name, g in gradients(many, views).items():
                many[name].grad = g
            optimizer.step()
        for value in many.values():
            value.mean(0)

    return one_round


def largest_difference(work: str, simulator: Any) -> float:
    """Between PyTorch's embeddings and ours for the same weights and views: the sides do the same work."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from lwfedssl_jax import tree
    from lwfedssl_jax.method.pretext import embed
    from lwfedssl_jax.simulation import setup

    run = simulator.run
    views = np.random.default_rng(0).normal(size=(2, BATCH, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = torch_model(work, simulator)(torch.tensor(views)).numpy()
    stage = run.stages[2 if work == LAYERWISE else 0]
    params = setup.initial_params(run)
    frozen = tree.take(params, tree.rows(stage.frozen))
    x = run.task.encoder.frozen_forward(frozen, jnp.asarray(views).reshape(-1, 32, 32, 3), stage.frozen_depth, None)
    trainable = tree.take(params, tree.rows(stage.trainable))
    mask = jnp.ones(BATCH, bool)
    route = (stage.trainable_depth, None)
    ours = jax.jit(lambda t, x: embed(run.task, t, x, mask, route, ["projection"])[0][0])(trainable, x)
    return float(np.abs(np.asarray(ours) - theirs).max())


if __name__ == "__main__":
    main()
