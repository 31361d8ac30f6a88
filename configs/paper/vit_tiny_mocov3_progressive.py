"""ViT-Tiny with MoCo-v3, Prog-FedSSL: the paper's default, 10 clients, uniform partition, 180 rounds, batch 512.

Expected (arXiv 2401.11647, its default setting): 86.53 % on CIFAR-10 after fine-tuning (from scratch 63.28;
pre-trained on COCO, here on CIFAR-10); 318 G multiply-adds a sample by the paper's rule; 5.04 x 1000 MiB of
traffic; 8.69 GB peak memory on a GPU.

From shapes: 5.04 x 1000 MiB of traffic, 318.3 G multiply-adds a sample by the paper's rule,
844.8 G executed.

    python run.py resources paper/vit_tiny_mocov3_progressive
    python run.py train paper/vit_tiny_mocov3_progressive

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "progressive"},
)
