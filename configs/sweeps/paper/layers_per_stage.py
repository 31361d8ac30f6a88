"""ViT-Tiny with MoCo-v3, arXiv 2401.11647: 2, 3, 4 and 6 layers per stage, layerwise and progressive.

One layer per stage is in `paper/vit_tiny_mocov3` and `paper/vit_tiny_mocov3_progressive`. 8 runs of 180 rounds.

    python run.py sweep paper/layers_per_stage

Needs an accelerator and CIFAR-10 (`tfds build cifar10 --file_format=array_record`). Figures: docs/paper_figures.md.
"""

from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base="paper/vit_tiny_mocov3",
    product={
        "strategy.name": ("layerwise", "progressive"),
        "strategy.layers_per_stage": (2, 3, 4, 6),
    },
)
