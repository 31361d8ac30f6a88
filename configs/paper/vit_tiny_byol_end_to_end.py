"""ViT-Tiny with BYOL, FedSSL end to end: the paper's default, 10 clients, uniform partition, 180 rounds, batch 512.

Expected (arXiv 2401.11647, its default setting): 586 G multiply-adds a sample by the paper's rule; 8.40 x 1000 MiB
of traffic.

From shapes: 8.40 x 1000 MiB of traffic, 585.6 G multiply-adds a sample by the paper's rule,
1554.5 G executed.

    python run.py resources paper/vit_tiny_byol_end_to_end
    python run.py train paper/vit_tiny_byol_end_to_end

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_byol"),
    {"strategy.name": "end_to_end"},
)
