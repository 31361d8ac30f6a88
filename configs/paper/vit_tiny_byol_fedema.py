"""ViT-Tiny with BYOL, FedSSL end to end: FedEMA's personal start, tau 0.7.

A baseline beside arXiv 2401.11647. It keeps a model on each client. No accuracy is recorded here.

From shapes: 8.40 x 1000 MiB of traffic, 585.6 G multiply-adds a sample by the paper's rule,
1554.5 G executed.

    python run.py resources paper/vit_tiny_byol_fedema
    python run.py train paper/vit_tiny_byol_fedema

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_byol"),
    {"strategy.name": "end_to_end", "federation.client_start": "fedema"},
)
