"""ViT-Tiny with MoCo-v3, arXiv 2401.11647: 1, 5 and 10 local epochs per round under three strategies.

The default of 3 is in `paper/vit_tiny_mocov3` and its variants for the other strategies. 9 runs of 180 rounds.

    python run.py sweep paper/local_epochs

Needs an accelerator and CIFAR-10 (`tfds build cifar10 --file_format=array_record`). Figures: docs/paper_figures.md.
"""

from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base="paper/vit_tiny_mocov3",
    product={
        "strategy.name": ("layerwise", "progressive", "end_to_end"),
        "federation.local_epochs": (1, 5, 10),
    },
)
