"""LW-FedSSL, Prog-FedSSL and end-to-end federated self-supervised learning in JAX.

The method is arXiv 2401.11647. Array names carry their axes as a suffix
(``view_2xBxHxWxC``, ``params_W``):

========  ==========================================================
letter    axis
========  ==========================================================
W         lanes: clients that are trained side by side
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

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from lwfedssl_jax.export import TrainedEncoder

__version__ = "0.1.0"


def load_encoder(directory: str | Path) -> "TrainedEncoder":
    """``images -> features`` of a finished run; see ``export.load_encoder``."""
    from lwfedssl_jax import export  # not before it is needed: JAX takes seconds

    return export.load_encoder(directory)


def load_results(*directories: str | Path) -> "pd.DataFrame":
    """A row for each run under the directories; see ``results.load_results``."""
    from lwfedssl_jax import results

    return results.load_results(*directories)
