"""ViT-Tiny with BYOL, LW-FedSSL: the paper's default, 10 clients, uniform partition, 180 rounds, batch 512.

Expected (arXiv 2401.11647, its default setting): 139 G multiply-adds a sample by the paper's rule; 1.66 x 1000 MiB
of traffic.

From shapes: 1.65 x 1000 MiB of traffic, 139.4 G multiply-adds a sample by the paper's rule,
310.8 G executed.

    python run.py resources paper/vit_tiny_byol
    python run.py train paper/vit_tiny_byol

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(load("paper/vit_tiny_mocov3"), {"objective.name": "byol"})
