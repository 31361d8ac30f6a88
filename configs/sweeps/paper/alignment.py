"""ViT-Tiny with MoCo-v3, arXiv 2401.11647: representation alignment, weight 1, under three strategies.

Local representations are pulled towards those of the global model (version 3 of the paper). 3 runs of 180 rounds.

    python run.py sweep paper/alignment

Needs an accelerator and CIFAR-10 (`tfds build cifar10 --file_format=array_record`). Figures: docs/paper_figures.md.
"""

from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base="paper/vit_tiny_mocov3",
    product={
        "strategy.name": ("layerwise", "progressive", "end_to_end"),
        "additions.terms": (("alignment=1",),),
    },
)
