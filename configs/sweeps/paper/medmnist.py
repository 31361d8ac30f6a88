"""ViT-Tiny with MoCo-v3, arXiv 2401.11647: Path-, Blood-, Derma- and OrganAMNIST, three strategies.

A study of medical images, 12 runs of 180 rounds.

    python run.py sweep paper/medmnist

Needs an accelerator and MedMNIST's files of 64x64 pixels in ~/.medmnist, where the package medmnist puts them. Figures:
docs/paper_figures.md.
"""

from lwfedssl_jax.sweep import Sweep

sweep = Sweep(
    base="paper/vit_tiny_mocov3_medmnist",
    product={
        "strategy.name": ("layerwise", "progressive", "end_to_end"),
        "data.name": tuple(f"npz:~/.medmnist/{name}mnist_64.npz" for name in ("path", "blood", "derma", "organa")),
    },
)
