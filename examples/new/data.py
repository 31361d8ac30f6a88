"""A data set of your own, from whatever Python can read; here scikit-learn's digits, six users of unequal size.

Images that lie in folders or in an npz file need no code: `--data.name folder:PATH`, `--data.name npz:FILE`.
"""

import numpy as np
from sklearn.datasets import load_digits

from lwfedssl_jax import Data


def make_data():
    """Images are uint8, of any sizes; labels are for evaluation alone, and clients need not be known."""
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    users = np.random.default_rng(0).choice(6, size=len(images), p=[0.3, 0.25, 0.2, 0.1, 0.1, 0.05])
    return Data(images, digits.target, clients=users)
