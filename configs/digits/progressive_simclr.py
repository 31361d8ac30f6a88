"""Prog-FedSSL with SimCLR on scikit-learn's digits: the clients, encoder and rounds of the quick start."""

from lwfedssl_jax.config import load, override

config = override(
    load("quickstart"),
    {
        "strategy.name": "progressive",
        "evaluation.every": 6,
    },
)
