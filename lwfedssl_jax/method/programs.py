"""Which configs share compiled programs and ledgers."""

import dataclasses
import operator
from typing import Any

from lwfedssl_jax.config import AdditionsConfig, Config, EvaluationConfig, FleetConfig, override

# Fields that programs take as arguments or never see: batches, cohorts and evaluation are handled on the host.
FREE_FIELDS = (
    "partition.kind",
    "partition.beta",
    "partition.shards_per_client",
    "partition.allow_empty",
    "partition.examples_per_client",
    "partition.size_sigma",
    "objective.temperature",
    "objective.momentum",
    "federation.sampling",
    "federation.dropout",
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "privacy.epsilon",
    "privacy.noise_multiplier",
    "privacy.delta",
    "privacy.count_noise",
    "privacy.noise_cohort",
    "runtime.seed",
    "runtime.partition_seed",
    "runtime.init_seed",
    "runtime.trackers",
)


def program_config(config: Config) -> Config:
    """Return one representative of all configs that share compiled programs.

    These differ in ``FREE_FIELDS``, in evaluation, in their fleet, and, where they are not 0, in the weights of terms,
    the rate of depth dropout, the clip and its quantile.
    """
    named = (text.partition("=") for text in config.additions.terms)
    free: dict[str, Any] = {name: operator.attrgetter(name)(Config()) for name in FREE_FIELDS}
    free["additions.terms"] = tuple(f"{name}=1" for name, _, weight in named if float(weight))
    free["additions.depth_dropout"] = 0.5 if config.additions.depth_dropout else 0.0
    free["privacy.clip"] = float(config.privacy.clip > 0)
    free["privacy.quantile"] = 0.5 if config.privacy.quantile else 0.0
    if not config.additions.depth_dropout:
        free["additions.depth_dropout_per"] = AdditionsConfig().depth_dropout_per
    return dataclasses.replace(override(config, free), evaluation=EvaluationConfig(), fleet=FleetConfig())


def ledger_config(config: Config) -> Config:
    """Return ``program_config`` with the rate of depth dropout: configs with the same result share a ledger."""
    return override(program_config(config), {"additions.depth_dropout": config.additions.depth_dropout})
