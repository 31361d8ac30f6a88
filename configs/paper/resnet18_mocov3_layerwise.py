"""ResNet-18 with MoCo-v3, LW-FedSSL: 10 clients, uniform partition, 120 rounds, batch 512.

arXiv 2401.11647 with another encoder. Figures: docs/paper_figures.md.

    python run.py resources paper/resnet18_mocov3_layerwise
    python run.py train paper/resnet18_mocov3_layerwise

The first command runs on 2 CPU cores; the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "layerwise", "model.name": "resnet18", "model.patch_size": 0, "federation.rounds": 120},
)
