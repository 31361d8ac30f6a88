"""ViT-Tiny with MoCo-v3, centralised: all images in one place, 540 epochs.

The non-federated reference of arXiv 2401.11647, with as many passes over the data as 180 rounds of 3 epochs.
`resources` shows only end_to_end, because layer-wise training needs at least 12 rounds. Figures: docs/paper_figures.md.

    python run.py resources paper/vit_tiny_mocov3_centralised
    python run.py train paper/vit_tiny_mocov3_centralised

The first command runs on 2 CPU cores; the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "end_to_end", "partition.clients": 1, "federation.rounds": 1, "federation.local_epochs": 540},
)
