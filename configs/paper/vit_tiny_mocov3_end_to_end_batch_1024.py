"""ViT-Tiny with MoCo-v3, FedSSL end to end: batch size 1024.

arXiv 2401.11647: batch size (512 is the default). No figure is recorded here.

    python run.py resources paper/vit_tiny_mocov3_end_to_end_batch_1024
    python run.py train paper/vit_tiny_mocov3_end_to_end_batch_1024

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "end_to_end", "optimizer.batch_size": 1024},
)
