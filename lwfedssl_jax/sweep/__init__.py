"""Many runs in worker processes: grids of configs and seeds."""

from lwfedssl_jax.sweep.grid import Sweep

__all__ = ["Sweep"]
