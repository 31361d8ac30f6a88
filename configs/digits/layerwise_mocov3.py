"""LW-FedSSL with MoCo-v3 on scikit-learn's digits: the clients, encoder and rounds of the quick start."""

from lwfedssl_jax.config import load, override

config = override(
    load("quickstart"),
    {
        "strategy.name": "layerwise",
        "objective.name": "mocov3",
        "objective.momentum": 0.9,
        "evaluation.every": 6,
    },
)
