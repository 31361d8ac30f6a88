"""A round of ours against the same round in sequential PyTorch, torch.func.vmap and Flower's simulation.

ViT of width 64 and depth 6 on 32x32 images, SimCLR, CLIENTS clients x 2 steps x batch 32, views included; layerwise at
stage 3, and end_to_end. All sides may use the same cores. On a GPU (``--device cuda``) ours runs there too.
Needs ``pip install -e ".[peers]"``.
"""

import argparse
import itertools
import logging
import os
import statistics
import time
from typing import Any

import common

LAYERWISE, END_TO_END = "layerwise, stage 3", "end_to_end"
TEMPERATURE, STEPS, BATCH = 0.2, 2, 32


def main() -> None:
    options = common.arguments(
        __doc__ or "",
        clients={"type": int, "default": 32},
        device={"default": "cpu", "choices": ["cpu", "cuda"]},
        lanes={"type": int, "default": 0, "help": "ours; 0 chooses by device"},
        skip={"nargs": "*", "default": [], "choices": ["vmap", "flower"]},
    )
    rows, checks = [], {}
    for work in (LAYERWISE, END_TO_END):
        ours, simulator = our_side(work, options)
        checks[work] = largest_difference(work, simulator, options)
        sides = {"ours": ours, "PyTorch, sequential": torch_side(work, simulator, options)}
        if "vmap" not in options.skip:
            sides["PyTorch, torch.func.vmap"] = vmap_side(work, simulator, options)
        seconds = common.interleave(sides, options.repeats)
        if "flower" not in options.skip and options.device == "cpu":
            seconds["Flower simulation"] = flower_seconds(work, simulator, options)
        for name, values in seconds.items():
            rows.append(
                {
                    "work": work,
                    "side": name,
                    "median s": statistics.median(values),
                    "fastest s": min(values),
                    "ours / side": common.ratio(seconds["ours"], values),
                }
            )
    common.publish(
        f"peers_{options.device}_{options.cores}_cores" if options.device == "cpu" else f"peers_cuda_{options.clients}",
        f"One round, {options.clients} clients x {STEPS} steps x batch {BATCH}, on {options.device}",
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

    if options.device == "cpu":
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
                "runtime.remat": options.device == "cpu", "runtime.lanes": options.lanes,
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


def torch_model(work: str, simulator: Any, options: argparse.Namespace) -> Any:
    """PyTorch's model of the same shape with our initial weights."""
    import jax
    import numpy as np
    import torch
    from peers_torch import Model

    from lwfedssl_jax.simulation import setup

    torch.set_num_threads(options.cores)
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
    return model.to(options.device)


def work_of(simulator: Any, options: argparse.Namespace) -> tuple[Any, list[Any], float]:
    """The images and each client's batches as tensors, and the learning rate."""
    import torch

    run = simulator.run
    images = torch.tensor(run.dataset.train_images).to(options.device)
    clients = [torch.tensor(run.clients[i]).reshape(STEPS, BATCH).to(options.device) for i in range(options.clients)]
    return images, clients, run.config.learning_rate


def torch_side(work: str, simulator: Any, options: argparse.Namespace) -> Any:
    """A function that runs the round in sequential PyTorch."""
    import torch
    from peers_torch import loss_of, train_round

    model = torch_model(work, simulator, options)
    images, clients, rate = work_of(simulator, options)
    state = [p.detach().clone() for p in model.trainable()]
    loss = loss_of(model, images, TEMPERATURE)

    def one_round() -> None:
        train_round(model, state, clients, rate, loss)
        if options.device == "cuda":
            torch.cuda.synchronize()

    return one_round


def vmap_side(work: str, simulator: Any, options: argparse.Namespace) -> Any:
    """A function that runs the round in PyTorch with all clients side by side."""
    import torch
    from peers_torch import simclr_loss, two_views
    from torch.func import functional_call, grad, vmap

    model = torch_model(work, simulator, options)
    images, clients, rate = work_of(simulator, options)
    for block in model.blocks:
        block.fused = False
    trained = {id(p) for p in model.trainable()}
    names = [name for name, p in model.named_parameters() if id(p) in trained]
    fixed = {name: p.detach() for name, p in model.named_parameters() if id(p) not in trained}
    start = {name: p.detach() for name, p in model.named_parameters() if id(p) in trained}
    batches = torch.stack(clients, 1)

    def loss(parameters: dict[str, Any], views: Any) -> Any:
        return simclr_loss(functional_call(model, {**fixed, **parameters}, (views,)), TEMPERATURE)

    gradients = vmap(grad(loss))

    def one_round() -> None:
        many = {name: start[name].expand(options.clients, *start[name].shape).clone() for name in names}
        optimizer = torch.optim.AdamW(list(many.values()), lr=rate, weight_decay=1e-5, fused=True)
        for rows in batches:
            views = two_views(images[rows.flatten()]).unflatten(1, (options.clients, BATCH)).transpose(0, 1)
            for name, g in gradients(many, views).items():
                many[name].grad = g
            optimizer.step()
        for value in many.values():
            value.mean(0)
        if options.device == "cuda":
            torch.cuda.synchronize()

    return one_round


def largest_difference(work: str, simulator: Any, options: argparse.Namespace) -> float:
    """Between PyTorch's embeddings and ours for the same weights and views: the sides do the same work."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch

    from lwfedssl_jax import tree
    from lwfedssl_jax.method.client import embed
    from lwfedssl_jax.simulation import setup

    run = simulator.run
    views = np.random.default_rng(0).normal(size=(2, BATCH, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = torch_model(work, simulator, options)(torch.tensor(views).to(options.device)).cpu().numpy()
    stage = run.stages[2 if work == LAYERWISE else 0]
    params = setup.initial_params(run)
    frozen = tree.take(params, tree.rows(stage.frozen))
    x = run.task.encoder.frozen_forward(frozen, jnp.asarray(views).reshape(-1, 32, 32, 3), stage.frozen_depth, None)
    trainable = tree.take(params, tree.rows(stage.trainable))
    mask = jnp.ones(BATCH, bool)
    route = (stage.trainable_depth, None)
    ours = jax.jit(lambda t, x: embed(run.task, t, x, mask, route, ["projection"])[0][0])(trainable, x)
    return float(np.abs(np.asarray(ours) - theirs).max())


def flower_seconds(work: str, simulator: Any, options: argparse.Namespace) -> list[float]:
    """Seconds of each round in Flower's simulation engine, the first one (its start) left out."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import numpy as np
    import torch
    from flwr.client import Client, ClientApp, NumPyClient
    from flwr.common import Context, ndarrays_to_parameters
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.simulation import run_simulation
    from peers_torch import loss_of, train_client

    logging.getLogger("flwr").setLevel(logging.ERROR)
    model = torch_model(work, simulator, options)
    images, clients, rate = work_of(simulator, options)
    start = [p.detach().numpy().copy() for p in model.trainable()]

    class Local(NumPyClient):
        def __init__(self, number: int) -> None:
            self.number = number

        def fit(self, parameters: Any, config: Any) -> Any:
            torch.set_num_threads(1)
            mine = list(model.trainable())
            state = [torch.from_numpy(np.asarray(p)) for p in parameters]
            train_client(mine, state, clients[self.number], rate, loss_of(model, images, TEMPERATURE))
            return [p.detach().numpy() for p in mine], STEPS * BATCH, {}

    def client(context: Context) -> Client:
        return Local(int(context.node_config["partition-id"])).to_client()

    times: list[float] = []

    def server(context: Context) -> ServerAppComponents:
        def evaluate(number: int, parameters: Any, config: Any) -> None:
            times.append(time.perf_counter())

        strategy = FedAvg(
            fraction_evaluate=0.0, min_fit_clients=options.clients, min_available_clients=options.clients,
            initial_parameters=ndarrays_to_parameters(start), evaluate_fn=evaluate,
        )  # fmt: skip
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=options.repeats + 1))

    run_simulation(
        server_app=ServerApp(server_fn=server),
        client_app=ClientApp(client_fn=client),
        num_supernodes=options.clients,
        backend_config={
            "init_args": {"num_cpus": options.cores, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    return [b - a for a, b in itertools.pairwise(times[1:])]


if __name__ == "__main__":
    main()
