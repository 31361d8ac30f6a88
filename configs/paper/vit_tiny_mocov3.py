"""ViT-Tiny with MoCo-v3, LW-FedSSL: 10 clients, uniform partition, 180 rounds, batch 512.

A default setting of arXiv 2401.11647. Figures: docs/paper_figures.md.

    python run.py resources paper/vit_tiny_mocov3
    python run.py train paper/vit_tiny_mocov3

The first command runs on 2 CPU cores; the second needs an accelerator and CIFAR-10
(`tfds build cifar10 --file_format=array_record`).
"""

from lwfedssl_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    FederationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
)

config = Config(
    data=DataConfig(name="tfds:cifar10", image_size=32),
    model=ModelConfig(name="vit_tiny", patch_size=4),
    objective=ObjectiveConfig(name="mocov3", temperature=0.05),
    federation=FederationConfig(rounds=180, local_epochs=3),
    optimizer=OptimizerConfig(batch_size=512, learning_rate=1.5e-4, weight_decay=1e-5),
    evaluation=EvaluationConfig(fine_tune_epochs=40),
)
