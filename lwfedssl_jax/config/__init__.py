"""The definition of an experiment, and every check that needs only the config."""

from lwfedssl_jax.config.files import (
    CONFIG_DIR,
    REPLACED,
    SWEEPS,
    available,
    code_digest,
    code_of,
    find_file,
    load,
    named,
    run_file,
)
from lwfedssl_jax.config.flat import flat, join_lists
from lwfedssl_jax.config.model_sizes import MODELS, ModelSize, ResNetSize, VitSize
from lwfedssl_jax.config.plain import INERT_FIELDS, digest, from_dict, to_dict
from lwfedssl_jax.config.resolve import choose, device_classes, override, resolve
from lwfedssl_jax.config.rules import divisors
from lwfedssl_jax.config.sections import (
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
    PrivacyConfig,
    RuntimeConfig,
    StrategyConfig,
)
from lwfedssl_jax.system.errors import ConfigError

__all__ = [
    "CONFIG_DIR",
    "INERT_FIELDS",
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
    "ModelSize",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PartitionConfig",
    "PrivacyConfig",
    "ResNetSize",
    "RuntimeConfig",
    "StrategyConfig",
    "VitSize",
    "available",
    "choose",
    "code_digest",
    "code_of",
    "device_classes",
    "digest",
    "divisors",
    "find_file",
    "flat",
    "from_dict",
    "join_lists",
    "load",
    "named",
    "override",
    "resolve",
    "run_file",
    "to_dict",
]
