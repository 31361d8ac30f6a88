"""ViT-Tiny with MoCo-v3, arXiv 2401.11647: local batches of 64, 128, 256 and 1024 images under three strategies.

The default of 512 is in `paper/vit_tiny_mocov3` and its variants for the other strategies. 12 runs of 180 rounds.

    python run.py sweep paper/batch_size

Needs an accelerator and CIFAR-10 (`tfds build cifar10 --file_format=array_record`). Figures: docs/paper_figures.md.
"""

from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base="paper/vit_tiny_mocov3",
    product={
        "strategy.name": ("layerwise", "progressive", "end_to_end"),
        "optimizer.batch_size": (64, 128, 256, 1024),
    },
)
