"""ViT-Tiny with SimCLR, FedSSL end to end: the paper's default, 10 clients, uniform partition, 180 rounds, batch 512.

Expected (arXiv 2401.11647, its default setting): 1169 G multiply-adds a sample by the paper's rule; 8.03 x 1000 MiB
of traffic; 14.39 GB peak memory on a GPU.

From shapes: 8.04 x 1000 MiB of traffic, 1170.4 G multiply-adds a sample by the paper's rule,
1166.1 G executed.

    python run.py resources paper/vit_tiny_simclr_end_to_end
    python run.py train paper/vit_tiny_simclr_end_to_end

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_simclr"),
    {"strategy.name": "end_to_end"},
)
