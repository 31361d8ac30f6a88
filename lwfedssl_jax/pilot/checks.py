"""What a pilot cannot do, which its server and its devices refuse, and what a device cannot be."""

from typing import Any

from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.pilot.cache import DIGEST
from lwfedssl_jax.pilot.protocol import Hello, Result
from lwfedssl_jax.pilot.relay import Counted

MOST_BYTES = 2.0**50
MOST_IMAGES = 2**24  # whose number float32, in which updates are weighted, has exactly
LONGEST_NAME, LONGEST_TEXT = 64, 200

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


def check_hello(hello: Hello, owner: str, fewest: int) -> None:
    """Refuse a device that may not join for what it says of itself.

    Args:
      hello: what it says.
      owner: name of the device whose key it has, or empty.
      fewest: images that it needs.

    Raises:
      ValueError: naming what is wrong.
    """
    if not (hello.name.isprintable() and 0 < len(hello.name) <= LONGEST_NAME):
        raise ValueError(f"its name is {hello.name[:LONGEST_NAME]!r}; accepted: 1 to {LONGEST_NAME} characters")
    if owner and hello.name != owner:
        raise ValueError(f"it says that it is {hello.name}, with the key of {owner}")
    if not fewest <= hello.images <= MOST_IMAGES:
        raise ValueError(f"it has {hello.images} images; accepted: {fewest} to {MOST_IMAGES}")
    if not DIGEST.fullmatch(hello.data):
        raise ValueError("its hash of the images is not one; accepted: SHA-256")
    check_machine(hello)
    check_counted(hello)


def check_machine(hello: Hello) -> None:
    """Refuse what a device says of its machine if it cannot be.

    Raises:
      ValueError: naming it.
    """
    for name in ("software", "platform"):
        text = getattr(hello, name)
        if not (text.isprintable() and len(text) <= LONGEST_TEXT) or "=" in text:
            raise ValueError(f"its {name} is {text[:LONGEST_NAME]!r}")
    for name in ("cores", "memory_bytes", "available_bytes", "baseline_bytes"):
        if not 1 <= (value := getattr(hello, name)) < MOST_BYTES:
            raise ValueError(f"its {name} is {value}")


def check_counted(content: Hello | Result) -> Counted:
    """Return what a device says it has exchanged, unless it cannot be.

    Raises:
      ValueError: naming it.
    """
    for name in Counted._fields:
        if not 0 <= (value := getattr(content, name)) < MOST_BYTES:
            raise ValueError(f"its {name} is {value}")
    return Counted(*(getattr(content, name) for name in Counted._fields))
