"""Prog-FedSSL with SimCLR on scikit-learn's digits: the quickstart's clients, encoder and rounds."""

from lwfedssl_jax.config import load, override

config = override(
    load("quickstart"),
    {
        "strategy.name": "progressive",
        "evaluation.every": 6,
    },
)
