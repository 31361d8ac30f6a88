"""All checks of a config that need neither data nor compilation."""

from lwfedssl_jax.config import Config
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
    trackers.check_trackers(config)
