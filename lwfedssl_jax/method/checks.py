"""All checks of the method's config fields that need neither data nor compilation; each part checks its own fields."""

from lwfedssl_jax.config import Config, ConfigError, choose
from lwfedssl_jax.data.partition import PARTITIONS
from lwfedssl_jax.method import calibration, depth_dropout, fedca, stateful_clients
from lwfedssl_jax.method.aggregation import make_aggregator
from lwfedssl_jax.method.compression import check_compression
from lwfedssl_jax.method.pretext import check_pretext
from lwfedssl_jax.method.privacy import check_privacy
from lwfedssl_jax.method.stages import stage_depths, stage_rounds
from lwfedssl_jax.method.task import make_task


def check_method(config: Config) -> None:
    """Refuse unknown names and incompatible parts of a (resolved) config.

    Raises:
      ConfigError: naming the field, the value and what is accepted.
    """
    task = make_task(config)
    check_pretext(config, task)
    fewest, batch_size = task.objective.fewest, config.optimizer.batch_size
    if batch_size < fewest:
        raise ConfigError(
            f"optimizer.batch_size: {batch_size} is fewer than the {fewest} samples that objective.name "
            f"{config.objective.name} learns from; accepted: at least {fewest}"
        )
    stage_rounds(config, len(stage_depths(config)))
    choose("partition.kind", config.partition.kind, PARTITIONS)
    check_privacy(config, task, make_aggregator(config))
    check_compression(config)
    stateful_clients.check_client_start(config)
    calibration.check_calibration(config)
    fedca.check_fedca(config)
    depth_dropout.check_depth_dropout(config)
