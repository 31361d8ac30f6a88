"""LW-FedSSL (layerwise, simclr) on scikit-learn's digits: 10 non-IID clients, two minutes on 2 CPU cores.

The first stage has 26 of the 36 rounds: the embedding and the first layer, which are frozen afterwards, need more steps
than six rounds give them (docs/guides/stages.md).
"""

from lwfedssl_jax.config import (
    Config,
    DataConfig,
    FederationConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PartitionConfig,
    StrategyConfig,
)

config = Config(
    data=DataConfig(name="digits", image_size=16),
    partition=PartitionConfig(kind="dirichlet", clients=10, beta=0.5),
    model=ModelConfig(name="vit_micro"),
    objective=ObjectiveConfig(name="simclr", temperature=0.2, hidden_dim=128, output_dim=64),
    strategy=StrategyConfig(name="layerwise", first_stage_share=0.72),
    federation=FederationConfig(rounds=36, local_epochs=3),
    optimizer=OptimizerConfig(batch_size=32, learning_rate=0.032),
)
