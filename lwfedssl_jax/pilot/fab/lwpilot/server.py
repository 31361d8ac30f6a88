"""Flower's server: carries messages between its grid and the pilot's server, a process beside it."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from lwfedssl_jax.pilot.flower import carry

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Carry messages until the pilot's server closes the connection."""
    carry(grid, str(context.run_config["socket"]))
