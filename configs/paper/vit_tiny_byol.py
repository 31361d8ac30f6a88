"""ViT-Tiny with BYOL, LW-FedSSL: 10 clients, uniform partition, 180 rounds, batch 512.

A default setting of arXiv 2401.11647. Figures: docs/paper_figures.md.

    python run.py resources paper/vit_tiny_byol
    python run.py train paper/vit_tiny_byol

The first command runs on 2 CPU cores; the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(load("paper/vit_tiny_mocov3"), {"objective.name": "byol"})
