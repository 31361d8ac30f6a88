"""ViT-Tiny with MoCo-v3, centralised: all images in one place, 540 epochs.

What federation is held against, for arXiv 2401.11647: as many passes as 180 rounds of 3 epochs. No figure is
recorded here. `resources` prices it alone: layer by layer needs at least 12 rounds.

From shapes: 0.05 x 1000 MiB of traffic, 585.6 G multiply-adds a sample by the paper's rule,
1554.8 G executed.

    python run.py resources paper/vit_tiny_mocov3_centralised
    python run.py train paper/vit_tiny_mocov3_centralised

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "end_to_end", "partition.clients": 1, "federation.rounds": 1, "federation.local_epochs": 540},
)
