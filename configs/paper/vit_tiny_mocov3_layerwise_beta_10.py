"""ViT-Tiny with MoCo-v3, LW-FedSSL: unequal clients, Dirichlet 10.

Heterogeneity study, for arXiv 2401.11647. No accuracy is recorded here.

From shapes: 1.65 x 1000 MiB of traffic, 139.4 G multiply-adds a sample by the paper's rule,
311.0 G executed.

    python run.py resources paper/vit_tiny_mocov3_layerwise_beta_10
    python run.py train paper/vit_tiny_mocov3_layerwise_beta_10

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "layerwise", "partition.kind": "dirichlet", "partition.beta": 10.0},
)
