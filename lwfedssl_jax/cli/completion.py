"""The command ``completion``: what a shell runs to complete commands and options."""

from collections.abc import Mapping
from typing import Annotated, Any, Union

import tyro

from lwfedssl_jax.cli.options import (
    SHELLS,
    EmbedOptions,
    NewOptions,
    PlanOptions,
    ReportOptions,
    ResourcesOptions,
    SweepOptions,
    TrainOptions,
)
from lwfedssl_jax.cli.pilot_options import PARSERS
from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.system.program import INSTALLED


def print_completion(shell: str) -> None:
    """Print what a shell runs to complete this program's commands and options.

    Raises:
      ConfigError: the parser knows no such shell.
    """
    if shell not in SHELLS:
        raise ConfigError(f"completion: unknown shell {shell!r}; accepted: {', '.join(SHELLS)}")
    parsers = {"train": TrainOptions, "resources": ResourcesOptions, "plan": PlanOptions,
               "sweep": SweepOptions, "report": ReportOptions, "embed": EmbedOptions,
               "new": NewOptions}  # fmt: skip
    tyro.cli(one_of(parsers | {"pilot": one_of(PARSERS)}), prog=INSTALLED, args=["--tyro-print-completion", shell])


def one_of(parsers: Mapping[str, Any]) -> Any:
    """Return the type of what is parsed after one of some words."""
    return Union[tuple(Annotated[parser, tyro.conf.subcommand(name)] for name, parser in parsers.items())]  # noqa: UP007
