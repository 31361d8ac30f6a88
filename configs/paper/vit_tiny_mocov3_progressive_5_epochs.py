"""ViT-Tiny with MoCo-v3, Prog-FedSSL: 5 local epochs a round.

arXiv 2401.11647: local epochs (3 is the default). No accuracy is recorded here.

From shapes: 5.04 x 1000 MiB of traffic, 530.4 G multiply-adds a sample by the paper's rule,
1407.9 G executed.

    python run.py resources paper/vit_tiny_mocov3_progressive_5_epochs
    python run.py train paper/vit_tiny_mocov3_progressive_5_epochs

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "progressive", "federation.local_epochs": 5},
)
