"""ViT-Tiny with MoCo-v3, Prog-FedSSL: unequal clients, Dirichlet 1.

Heterogeneity study, for arXiv 2401.11647. No accuracy is recorded here.

From shapes: 5.04 x 1000 MiB of traffic, 318.3 G multiply-adds a sample by the paper's rule,
844.8 G executed.

    python run.py resources paper/vit_tiny_mocov3_progressive_beta_1
    python run.py train paper/vit_tiny_mocov3_progressive_beta_1

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "progressive", "partition.kind": "dirichlet", "partition.beta": 1.0},
)
