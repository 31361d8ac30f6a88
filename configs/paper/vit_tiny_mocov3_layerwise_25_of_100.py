"""ViT-Tiny with MoCo-v3, LW-FedSSL: 25 of 100 clients a round.

Expected (arXiv 2401.11647, partial participation): 84.33 % on CIFAR-10 after fine-tuning (pre-trained on COCO, here
on CIFAR-10).

From shapes: 1.65 x 1000 MiB of traffic, 139.4 G multiply-adds a sample by the paper's rule,
311.0 G executed.

    python run.py resources paper/vit_tiny_mocov3_layerwise_25_of_100
    python run.py train paper/vit_tiny_mocov3_layerwise_25_of_100

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "layerwise", "partition.clients": 100, "federation.clients_per_round": 25},
)
