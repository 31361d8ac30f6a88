"""All checks of the method's config fields that need neither data nor compilation; each part checks its own fields."""

from lwfedssl_jax.config import MODELS, Config, ConfigError, choose
from lwfedssl_jax.data.partition import PARTITIONS
from lwfedssl_jax.method import calibration, fedca, stateful_clients
from lwfedssl_jax.method.aggregation import make_aggregator
from lwfedssl_jax.method.stages import stage_depths, stage_rounds
from lwfedssl_jax.method.task import make_task


def check_method(config: Config) -> None:
    """Refuse unknown names and incompatible parts of a (resolved) config.

    Raises:
      ConfigError: naming the field, the value and what is accepted.
    """
    fewest, batch_size = make_task(config).objective.fewest, config.optimizer.batch_size
    if batch_size < fewest:
        raise ConfigError(
            f"optimizer.batch_size: {batch_size} is fewer than the {fewest} samples that objective.name "
            f"{config.objective.name} learns from; accepted: at least {fewest}"
        )
    stages = len(stage_depths(config))
    stage_rounds(config, stages)
    choose("partition.kind", config.partition.kind, PARTITIONS)
    make_aggregator(config)
    stateful_clients.check_client_start(config)
    calibration.check_calibration(config)
    fedca.check_fedca(config)
    rate = config.additions.depth_dropout
    if rate and stages == 1:
        raise ConfigError(
            f"additions.depth_dropout: {rate} skips layers that an earlier stage has trained, and strategy.name "
            f"{config.strategy.name} with strategy.layers_per_stage {config.strategy.layers_per_stage} has one stage; "
            "accepted: 0.0, or more stages"
        )
    if rate and not MODELS[config.model.name].equal_layers:
        raise ConfigError(
            f"additions.depth_dropout: {rate} needs equal layers (ModelSize.equal_layers), which {config.model.name} "
            "does not have; accepted: 0.0, or a vit"
        )
