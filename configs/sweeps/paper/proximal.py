"""ViT-Tiny with MoCo-v3, arXiv 2401.11647: a proximal term, weight 0.01, under three strategies.

Local models are kept near the global one (FedProx's term). 3 runs of 180 rounds.

    python run.py sweep paper/proximal

Needs an accelerator and CIFAR-10 (`tfds build cifar10 --file_format=array_record`). Figures: docs/paper_figures.md.
"""

from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base="paper/vit_tiny_mocov3",
    product={
        "strategy.name": ("layerwise", "progressive", "end_to_end"),
        "additions.terms": (("proximal=0.01",),),
    },
)
