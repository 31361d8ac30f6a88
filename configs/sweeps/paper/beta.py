"""ViT-Tiny with MoCo-v3, arXiv 2401.11647: Dirichlet partitions, beta 0.1, 0.5, 1 and 10, three strategies.

A study of data heterogeneity, 12 runs of 180 rounds. The uniform partition is in `paper/vit_tiny_mocov3` and its
variants for the other strategies.

    python run.py sweep paper/beta

Needs an accelerator and CIFAR-10 (`tfds build cifar10 --file_format=array_record`). Figures: docs/paper_figures.md.
"""

from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base="paper/vit_tiny_mocov3",
    product={
        "strategy.name": ("layerwise", "progressive", "end_to_end"),
        "partition.kind": ("dirichlet",),
        "partition.beta": (0.1, 0.5, 1.0, 10.0),
    },
)
