"""ViT-Tiny with MoCo-v3, arXiv 2401.11647: depth dropout of 0.32, layerwise and progressive.

In each round a client does without some of the layers that earlier stages have trained (Guo et al., 2023); the paper's
costs imply this rate. 2 runs of 180 rounds.

    python run.py sweep paper/depth_dropout

Needs an accelerator and CIFAR-10 (`tfds build cifar10 --file_format=array_record`). Figures: docs/paper_figures.md.
"""

from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base="paper/vit_tiny_mocov3",
    product={
        "strategy.name": ("layerwise", "progressive"),
        "additions.depth_dropout": (0.32,),
        "additions.depth_dropout_per": ("round",),
    },
)
