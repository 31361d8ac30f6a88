"""ResNet-18 with MoCo-v3, Prog-FedSSL: 10 clients, uniform partition, 120 rounds, batch 512.

arXiv 2401.11647 with another encoder. No accuracy is recorded here.

From shapes: 4.29 x 1000 MiB of traffic, 27.4 G multiply-adds a sample by the paper's rule,
71.7 G executed.

    python run.py resources paper/resnet18_mocov3_progressive
    python run.py train paper/resnet18_mocov3_progressive

The first runs on 2 CPU cores, the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {"strategy.name": "progressive", "model.name": "resnet18", "model.patch_size": 0, "federation.rounds": 120},
)
