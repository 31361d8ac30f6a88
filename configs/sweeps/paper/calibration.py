"""ViT-Tiny with MoCo-v3, arXiv 2401.11647: server-side calibration, 10 steps per round, three strategies.

The server trains all layers that exist so far on a tenth of the images (version 3 of the paper). 3 runs of 180 rounds.

    python run.py sweep paper/calibration

Needs an accelerator and CIFAR-10 (`tfds build cifar10 --file_format=array_record`). Figures: docs/paper_figures.md.
"""

from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base="paper/vit_tiny_mocov3",
    product={
        "strategy.name": ("layerwise", "progressive", "end_to_end"),
        "partition.server_share": (0.1,),
        "additions.calibration_steps": (10,),
    },
)
