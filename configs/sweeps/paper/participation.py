"""ViT-Tiny with MoCo-v3, arXiv 2401.11647: 25 of 100 clients per round under three strategies.

3 runs of 180 rounds.

    python run.py sweep paper/participation

Needs an accelerator and CIFAR-10 (`tfds build cifar10 --file_format=array_record`). Figures: docs/paper_figures.md.
"""

from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base="paper/vit_tiny_mocov3",
    product={
        "strategy.name": ("layerwise", "progressive", "end_to_end"),
        "partition.clients": (100,),
        "federation.clients_per_round": (25,),
    },
)
