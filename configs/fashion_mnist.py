"""LW-FedSSL (layerwise, simclr) on Fashion-MNIST: 60,000 images, 100 non-IID clients, ten minutes on 2 CPU cores."""

from lwfedssl_jax.config import load, override

config = override(
    load("quickstart"),
    {
        "data.name": "fashion_mnist",
        "data.image_size": 28,
        "partition.clients": 100,
        "model.patch_size": 7,
        "model.depth": 4,
        "federation.rounds": 40,
        "federation.local_epochs": 1,
        "optimizer.batch_size": 128,
        "optimizer.learning_rate": 0.008,
        "evaluation.labels_per_class": (5, 100),
    },
)
