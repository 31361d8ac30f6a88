"""What an experiment is, and every check that a config alone allows."""

from lwfedssl_jax.config.files import CONFIG_DIR, REPLACED, SWEEPS, available, load, run_file
from lwfedssl_jax.config.flat import flat, join_lists
from lwfedssl_jax.config.resolve import choose, device_classes, digest, divisors, override, resolve
from lwfedssl_jax.config.sections import (
    MODELS,
    AdditionsConfig,
    Config,
    DataConfig,
    EvaluationConfig,
    FederationConfig,
    FleetConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PartitionConfig,
    ResNetSize,
    RuntimeConfig,
    StrategyConfig,
    VitSize,
    to_dict,
)
from lwfedssl_jax.system.errors import ConfigError

__all__ = [
    "CONFIG_DIR",
    "MODELS",
    "REPLACED",
    "SWEEPS",
    "AdditionsConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "FederationConfig",
    "FleetConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PartitionConfig",
    "ResNetSize",
    "RuntimeConfig",
    "StrategyConfig",
    "VitSize",
    "available",
    "choose",
    "device_classes",
    "digest",
    "divisors",
    "flat",
    "join_lists",
    "load",
    "override",
    "resolve",
    "run_file",
    "to_dict",
]
