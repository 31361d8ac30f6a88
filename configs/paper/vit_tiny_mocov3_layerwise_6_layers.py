"""ViT-Tiny with MoCo-v3, LW-FedSSL: 6 layers a stage.

arXiv 2401.11647: several layers a stage. No accuracy is recorded here.

From shapes: 4.72 x 1000 MiB of traffic, 342.2 G multiply-adds a sample by the paper's rule,
876.4 G executed.

    python run.py resources paper/vit_tiny_mocov3_layerwise_6_layers
    python run.py train paper/vit_tiny_mocov3_layerwise_6_layers

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "layerwise", "strategy.layers_per_stage": 6},
)
