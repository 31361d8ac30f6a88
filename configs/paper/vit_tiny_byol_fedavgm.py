"""ViT-Tiny with BYOL, FedSSL end to end: server momentum (FedAvgM).

A baseline beside arXiv 2401.11647. Figures: docs/paper_figures.md.

    python run.py resources paper/vit_tiny_byol_fedavgm
    python run.py train paper/vit_tiny_byol_fedavgm

The first command runs on 2 CPU cores; the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_byol"),
    {"strategy.name": "end_to_end", "federation.aggregator": "fedavgm"},
)
