"""ViT-Tiny with MoCo-v3, Prog-FedSSL: 6 layers a stage.

arXiv 2401.11647: several layers a stage. No accuracy is recorded here.

From shapes: 6.57 x 1000 MiB of traffic, 439.8 G multiply-adds a sample by the paper's rule,
1167.5 G executed.

    python run.py resources paper/vit_tiny_mocov3_progressive_6_layers
    python run.py train paper/vit_tiny_mocov3_progressive_6_layers

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "progressive", "strategy.layers_per_stage": 6},
)
