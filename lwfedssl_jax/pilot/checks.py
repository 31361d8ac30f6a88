"""What a pilot cannot do, which its server and its devices refuse."""

from typing import Any

from lwfedssl_jax.config import Config, ConfigError

ACCEPTED: dict[str, tuple[Any, str]] = {
    "federation.client_start": ("global", "keeps models on clients between rounds"),
    "federation.dropout": (0.0, "devices drop out by themselves"),
    "additions.dictionary": (0, "uploads embeddings"),
    "additions.base_steps": (0, "sends a base model and images"),
    "privacy.secure_sum_bits": (0, "secure sums are only simulated"),
    "fleet.devices": ((), "the devices are real"),
    "evaluation.membership": (0, "looks at the clients' images"),
}


def check_pilot(config: Config) -> None:
    """Refuse what devices cannot do.

    Args:
      config: resolved.

    Raises:
      ConfigError: naming the field, the value and what is accepted.
    """
    for name, (accepted, why) in ACCEPTED.items():
        section, field = name.split(".")
        if (value := getattr(getattr(config, section), field)) != accepted:
            raise ConfigError(f"{name}: {value!r} cannot be part of a pilot: {why}; accepted: {accepted!r}")
    if config.additions.depth_dropout and config.additions.depth_dropout_per == "round":
        raise ConfigError(
            "additions.depth_dropout_per: 'round' cannot be part of a pilot: each device would have other layers; "
            "accepted: 'step'"
        )
    if config.data.name.startswith("memory:"):
        raise ConfigError(f"data.name: {config.data.name!r} is only in this process; accepted: data that have a name")
