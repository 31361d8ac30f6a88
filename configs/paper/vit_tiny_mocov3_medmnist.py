"""ViT-Tiny with MoCo-v3 on MedMNIST, LW-FedSSL: 64x64 images, 10 clients, Dirichlet beta 5, batch 128.

A setting of arXiv 2401.11647, with PathMNIST: the clients own the training images, the encoder is fine-tuned on the
validation images and evaluated on the test images. Figures: docs/paper_figures.md.

    python run.py resources paper/vit_tiny_mocov3_medmnist
    python run.py train paper/vit_tiny_mocov3_medmnist

The first command runs on 2 CPU cores; the second needs an accelerator, and pathmnist_64.npz of MedMNIST in ~/.medmnist
or where `--data.name npz:PATH` says. `sweep paper/medmnist` trains all strategies on the four data sets of the paper.
"""

from lwfedssl_jax.config import load, override

config = override(
    load("paper/vit_tiny_mocov3"),
    {
        "data.name": "npz:~/.medmnist/pathmnist_64.npz",
        "data.image_size": 64,
        "partition.kind": "dirichlet",
        "partition.beta": 5.0,
        "optimizer.batch_size": 128,
        "evaluation.labelled_split": "val",
        "evaluation.labels_per_class": (5, 0),  # DermaMNIST's smallest class has few validation images
    },
)
