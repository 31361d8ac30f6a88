"""ViT-Tiny with BYOL, FedSSL end to end: FedU's predictor rule.

A baseline in arXiv 2401.11647; each client keeps a model between rounds. Figures: docs/paper_figures.md.

    python run.py resources paper/vit_tiny_byol_fedu
    python run.py train paper/vit_tiny_byol_fedu

The first command runs on 2 CPU cores; the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_byol"),
    {"strategy.name": "end_to_end", "federation.client_start": "fedu"},
)
