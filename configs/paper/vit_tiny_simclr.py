"""ViT-Tiny with SimCLR as in the paper: 10 clients, uniform partition, 180 rounds, batch 512.

    python run.py resources paper/vit_tiny_simclr

Expected there (arXiv 2401.11647, end_to_end / layerwise / progressive): 1169 / 278 / 635 G by the paper's
rule; traffic of layerwise and progressive 0.16 / 0.58 of end_to_end.
Training needs CIFAR-10 prepared by tensorflow-datasets (`tfds build cifar10
--file_format=array_record`) and an accelerator.
"""

from lwfedssl_jax.config import Config, DataConfig, FederationConfig, ModelConfig, ObjectiveConfig, OptimizerConfig

config = Config(
    data=DataConfig(name="tfds:cifar10", image_size=32),
    model=ModelConfig(name="vit_tiny", patch_size=4),
    objective=ObjectiveConfig(name="simclr", temperature=0.05),
    federation=FederationConfig(rounds=180, local_epochs=3),
    optimizer=OptimizerConfig(batch_size=512, learning_rate=1.5e-4, weight_decay=1e-5),
)
