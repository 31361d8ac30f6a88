"""ViT-Tiny with SimCLR, FedSSL end to end: FedCA's dictionary and its alignment to a base model.

A baseline in arXiv 2401.11647. A client uploads an embedding of each of its images, up to 11,727: as many as a tenth of
COCO's images there, so that the ledger has the paper's traffic (30.69) and operations (1299 G). CIFAR-10's clients have
fewer, and the base model learns from a tenth of the images. Figures: docs/paper_figures.md.

    python run.py resources paper/vit_tiny_simclr_fedca
    python run.py train paper/vit_tiny_simclr_fedca

The first command runs on 2 CPU cores; the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_simclr"),
    {
        "strategy.name": "end_to_end",
        "partition.server_share": 0.1,
        "additions.dictionary": 11727,
        "additions.terms": ("base=1",),
        "additions.base_steps": 500,
    },
)
