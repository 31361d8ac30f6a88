"""The engines that ``peers.py`` is held against: each runs rounds of the same PyTorch client as the plain loop.

What differs between them is what an engine adds: drawing and sending, processes or threads, averaging. Each function
returns the seconds of its rounds, without the first one.
"""

import contextlib
import copy
import io
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from peers_torch import Model, loss_of, train_client
from torch import Tensor


class Work(NamedTuple):
    """A round's work.

    Attributes:
      model: with the initial weights; a side trains a copy of it (``new_model``).
      images: of all clients.
      clients: each client's batches, ``TxB`` rows of ``images``.
      rate, temperature: the learning rate, and that of the loss.
      cores: how many an engine may use.
      rounds: how many are run, the first of which is not counted.
    """

    model: Model
    images: Tensor
    clients: list[Tensor]
    rate: float
    temperature: float
    cores: int
    rounds: int

    def new_model(self) -> Model:
        """Return a copy of the model."""
        return copy.deepcopy(self.model)


def flower(work: Work) -> list[float]:
    """Flower's simulation: a Ray actor on each core."""
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}
    from flwr.client import Client, ClientApp, NumPyClient
    from flwr.common import Context, ndarrays_to_parameters
    from flwr.server import ServerApp, ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    model = work.new_model()
    start = [p.detach().numpy().copy() for p in model.trainable()]

    class Local(NumPyClient):
        def __init__(self, number: int) -> None:
            self.number = number

        def fit(self, parameters: Any, config: Any) -> Any:
            torch.set_num_threads(1)
            mine, rows = list(model.trainable()), work.clients[self.number]
            state = [torch.from_numpy(np.asarray(p)) for p in parameters]
            train_client(mine, state, rows, work.rate, loss_of(model, work.images, work.temperature))
            return [p.detach().numpy() for p in mine], rows.numel(), {}

    def client(context: Context) -> Client:
        return Local(int(context.node_config["partition-id"])).to_client()

    times: list[float] = []

    def server(context: Context) -> ServerAppComponents:
        def evaluate(number: int, parameters: Any, config: Any) -> None:
            times.append(time.perf_counter())

        strategy = FedAvg(
            fraction_evaluate=0.0, min_fit_clients=len(work.clients), min_available_clients=len(work.clients),
            initial_parameters=ndarrays_to_parameters(start), evaluate_fn=evaluate,
        )  # fmt: skip
        return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=work.rounds))

    run_simulation(
        server_app=ServerApp(server_fn=server),
        client_app=ClientApp(client_fn=client),
        num_supernodes=len(work.clients),
        backend_config={
            "init_args": {"num_cpus": work.cores, "log_to_driver": False},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    return [b - a for a, b in itertools.pairwise(times[1:])]


def pfl(work: Work) -> list[float]:
    """pfl-research: its simulated backend in one process, whose products use all cores."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam.base import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    torch.set_num_threads(work.cores)
    model, numbers, times = work.new_model(), itertools.count(), [time.perf_counter()]
    trained = {id(p) for p in model.trainable()}
    for p in model.parameters():
        p.requires_grad_(id(p) in trained)
    model.loss = model.metrics = lambda *_, **__: {}  # type: ignore[assignment]  # asked for, and not used
    parameters = list(model.trainable())

    class Averaging(FederatedAveraging):  # type: ignore[misc]
        def train_one_user(self, initial_model_state: Any, model: Any, user_dataset: Any, central_context: Any) -> Any:
            (rows,) = user_dataset.raw_data
            state = [p.detach().clone() for p in parameters]
            train_client(
                parameters, state, rows, work.rate, loss_of(model.pytorch_model, work.images, work.temperature)
            )
            return model.get_model_difference(initial_model_state), Metrics()

    class Clock(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> Any:
            times.append(time.perf_counter())
            return False, Metrics()

    data = FederatedDataset(
        lambda i: Dataset((work.clients[i],), user_id=str(i)), lambda: next(numbers) % len(work.clients)
    )
    wrapped = PyTorchModel(model, torch.optim.AdamW, torch.optim.SGD(parameters, lr=1.0))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line of metrics per round
        Averaging().run(
            NNAlgorithmParams(work.rounds, work.rounds + 1, len(work.clients), 0),
            SimulatedBackend(data, data, [WeightByDatapoints()]),
            wrapped,
            NNTrainHyperParams(local_batch_size=None, local_num_epochs=1, local_learning_rate=work.rate),
            callbacks=[Clock()],
        )
    return [b - a for a, b in itertools.pairwise(times[1:])]


def blazefl(work: Work) -> list[float]:
    """BlazeFL: its pool of threads, one for each core."""
    from blazefl.core import ThreadPoolClientTrainer

    torch.set_num_threads(1)
    own = threading.local()

    class Trainer(ThreadPoolClientTrainer[Any, Any]):
        def __init__(self) -> None:
            self.num_parallels, self.device, self.device_count = work.cores, "cpu", 0
            self.cache, self.stop_event = [], threading.Event()

        def worker(self, cid: int, device: str, payload: Any, stop_event: threading.Event) -> Any:
            if not hasattr(own, "model"):
                own.model = work.new_model()
            mine = list(own.model.trainable())
            train_client(mine, payload, work.clients[cid], work.rate, loss_of(own.model, work.images, work.temperature))
            return [p.detach().clone() for p in mine], work.clients[cid].numel()

    trainer, seconds = Trainer(), []
    state = [p.detach().clone() for p in work.new_model().trainable()]
    for _ in range(work.rounds):
        began = time.perf_counter()
        trainer.local_process(state, list(range(len(work.clients))))
        packages, trainer.cache = trainer.cache, []
        total = sum(n for _, n in packages)
        state = [sum(n / total * p for p, n in zip(each, [n for _, n in packages], strict=True))
                 for each in zip(*(p for p, _ in packages), strict=True)]  # fmt: skip
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


ENGINES: dict[str, Callable[[Work], list[float]]] = {
    "Flower simulation": flower,
    "pfl-research": pfl,
    "BlazeFL": blazefl,
}
