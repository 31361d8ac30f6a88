"""Flower's client: passes a message to the device's worker, a process beside it, and its answer back."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from lwfedssl_jax.pilot.flower import ask_worker

app = ClientApp()


@app.query()  # type: ignore[untyped-decorator]
def query(message: Message, context: Context) -> Message:
    """Ask the device who it is."""
    return ask_worker(message, str(context.node_config["socket"]))


@app.train()  # type: ignore[untyped-decorator]
def train(message: Message, context: Context) -> Message:
    """Train for a round."""
    return ask_worker(message, str(context.node_config["socket"]))
