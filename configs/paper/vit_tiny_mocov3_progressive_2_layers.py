"""ViT-Tiny with MoCo-v3, Prog-FedSSL: 2 layers a stage.

arXiv 2401.11647: several layers a stage. No accuracy is recorded here.

From shapes: 5.35 x 1000 MiB of traffic, 342.6 G multiply-adds a sample by the paper's rule,
909.3 G executed.

    python run.py resources paper/vit_tiny_mocov3_progressive_2_layers
    python run.py train paper/vit_tiny_mocov3_progressive_2_layers

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "progressive", "strategy.layers_per_stage": 2},
)
