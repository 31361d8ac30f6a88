"""One run's directory: its lock, config, metrics and checkpoints."""

from lwfedssl_jax.workdir.directory import WorkDir

__all__ = ["WorkDir"]
