"""ViT-Tiny with MoCo-v3, Prog-FedSSL: 25 of 100 clients a round.

Expected (arXiv 2401.11647, partial participation): 85.18 % on CIFAR-10 after fine-tuning (pre-trained on COCO, here
on CIFAR-10).

From shapes: 5.04 x 1000 MiB of traffic, 318.3 G multiply-adds a sample by the paper's rule,
844.8 G executed.

    python run.py resources paper/vit_tiny_mocov3_progressive_25_of_100
    python run.py train paper/vit_tiny_mocov3_progressive_25_of_100

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "progressive", "partition.clients": 100, "federation.clients_per_round": 25},
)
