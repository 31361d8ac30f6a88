"""All checks of a config that need neither data nor compilation."""

import dataclasses

from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.costs.accountant import check_accountant
from lwfedssl_jax.data import sources
from lwfedssl_jax.experiment import trackers
from lwfedssl_jax.method.checks import check_method


def check(config: Config) -> None:
    """Refuse a config that cannot be trained or tracked.

    Args:
      config: resolved.

    Raises:
      ConfigError: naming the field, the value and what is accepted.
    """
    check_method(config)
    check_accountant(config)
    for name in config.evaluation.data:
        try:
            sources.find(dataclasses.replace(config.data, name=name))
        except ConfigError as error:
            raise ConfigError(f"evaluation.data: {str(error).removeprefix('data.name: ')}") from None
    trackers.check_trackers(config)
