"""ViT-Tiny with MoCo-v3, FedSSL end to end: 1 local epoch a round.

arXiv 2401.11647: local epochs (3 is the default). No accuracy is recorded here.

From shapes: 8.40 x 1000 MiB of traffic, 195.2 G multiply-adds a sample by the paper's rule,
518.3 G executed.

    python run.py resources paper/vit_tiny_mocov3_end_to_end_1_epochs
    python run.py train paper/vit_tiny_mocov3_end_to_end_1_epochs

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "end_to_end", "federation.local_epochs": 1},
)
