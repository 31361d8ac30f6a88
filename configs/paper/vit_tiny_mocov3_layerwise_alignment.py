"""ViT-Tiny with MoCo-v3, LW-FedSSL: representation alignment, weight 1.

arXiv 2401.11647 v3: local representations pulled to the global model's. No figure is recorded here.

    python run.py resources paper/vit_tiny_mocov3_layerwise_alignment
    python run.py train paper/vit_tiny_mocov3_layerwise_alignment

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "layerwise", "additions.terms": ("alignment=1",)},
)
