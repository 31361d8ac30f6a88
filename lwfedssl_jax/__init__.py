"""LW-FedSSL, Prog-FedSSL and end-to-end federated self-supervised learning in JAX.

The method is arXiv 2401.11647. Array names carry their axes as a suffix
(``view_2xBxHxWxC``, ``params_W``):

========  ==========================================================
letter    axis
========  ==========================================================
W         lanes: clients that are trained in parallel
B         local batch
2         the two views of an image
H, W, C   image height, width and channels (after B: never lanes)
P         patches (tokens) of an image
D         width of an embedding
L         layers of the encoder
C         steps of one call of the round (in front of W: never channels)
N         examples of a data set
========  ==========================================================
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from lwfedssl_jax.api import Run
    from lwfedssl_jax.config import Config
    from lwfedssl_jax.data.memory import Data
    from lwfedssl_jax.evaluation.export import TrainedEncoder

__version__ = "0.1.0"

# Modules are imported when they are needed: importing JAX takes seconds.


def load_config(name: str, overrides: Mapping[str, Any] | None = None) -> "Config":
    """Load a config by name, replace ``{"section.field": value}`` and check it; see ``api.load_config``."""
    from lwfedssl_jax import api

    return api.load_config(name, overrides)


def train(
    config: "Config", directory: str | Path | None = None, progress: bool = True, data: "Data | None" = None
) -> "Run":
    """Train a config in a work directory, or continue an interrupted run; see ``api.train``."""
    from lwfedssl_jax import api

    return api.train(config, directory, progress, data)


def __getattr__(name: str) -> Any:
    """Import ``Data``, a data set in memory, when it is asked for; see ``data.memory.Data``."""
    if name == "Data":
        from lwfedssl_jax.data.memory import Data

        return Data
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_encoder(directory: str | Path, config_file: str = "") -> "TrainedEncoder":
    """Load the encoder of a finished run as a function ``images -> features``; see ``export.load_encoder``."""
    from lwfedssl_jax.evaluation import export

    return export.load_encoder(directory, config_file)


def load_results(*directories: str | Path) -> "pd.DataFrame":
    """Read the runs under the directories as a data frame with a row per run; see ``results.load_results``."""
    from lwfedssl_jax.analysis import results

    return results.load_results(*directories)
