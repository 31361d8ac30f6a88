"""ViT-Tiny with MoCo-v3, FedSSL end to end: batch size 1024.

arXiv 2401.11647: batch size (512 is the default). No accuracy is recorded here.

From shapes: 8.40 x 1000 MiB of traffic, 585.6 G multiply-adds a sample by the paper's rule,
1555.1 G executed.

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
