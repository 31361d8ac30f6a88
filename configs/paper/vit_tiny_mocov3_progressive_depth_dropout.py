"""ViT-Tiny with MoCo-v3, Prog-FedSSL: depth dropout 0.5.

arXiv 2401.11647 with depth dropout (Guo et al., 2023). No accuracy is recorded here.

From shapes: 5.04 x 1000 MiB of traffic, 184.6 G multiply-adds a sample by the paper's rule,
489.7 G executed.

    python run.py resources paper/vit_tiny_mocov3_progressive_depth_dropout
    python run.py train paper/vit_tiny_mocov3_progressive_depth_dropout

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "progressive", "additions.depth_dropout": 0.5},
)
