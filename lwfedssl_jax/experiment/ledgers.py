"""Ledgers of runs, traced once per process."""

from lwfedssl_jax.config import Config, override
from lwfedssl_jax.costs import ledger, stored
from lwfedssl_jax.costs.ledger import Ledger
from lwfedssl_jax.costs.memory import Notice
from lwfedssl_jax.costs.operations import Known
from lwfedssl_jax.method.programs import ledger_config
from lwfedssl_jax.simulation.events import Compiling, Hear
from lwfedssl_jax.simulation.setup import Cache


def traced_ledger(config: Config, cache: Cache) -> Ledger:
    """Return the ledger of a run's own strategy, with peak memory only if it is on disk with that (``stored.py``)."""
    plain = ledger_config(config)
    return cache.get(("ledger", plain), lambda: stored.read(plain) or ledger.make_ledger(plain, known_traces(cache)))


def round_operations(config: Config, cache: Cache) -> list[float]:
    """Return the multiply-adds per sample in each round (``flops_executed``); all rounds of a stage cost the same."""
    per_stage = traced_ledger(config, cache)["per_stage"]
    return [row["flops_executed"] / row["rounds"] for row in per_stage for _ in range(row["rounds"])]


def compiled_ledger(config: Config, hear: Hear, cache: Cache) -> Ledger:
    """Return the ledger of a run's own strategy, with peak memory."""

    def compiled() -> Ledger:
        return ledger.ledgers_of({"": config}, memory=True, notify=_saying(hear), known=known_traces(cache))[""]

    return cache.get(("compiled ledger", ledger_config(config)), compiled)


def ledgers_of_run(config: Config, hear: Hear, cache: Cache) -> dict[str, Ledger]:
    """Return the ledger of every strategy under a run's config, with peak memory."""

    def compiled() -> dict[str, Ledger]:
        return ledger.all_strategies(config, memory=True, notify=_saying(hear), known=known_traces(cache))

    return cache.get(("ledgers", override(ledger_config(config), {"strategy.name": ""})), compiled)


def known_traces(cache: Cache) -> Known:
    """Return what the ledgers of this process have traced so far."""
    return cache.get("traces", dict)


def _saying(hear: Hear) -> Notice:
    return lambda what: hear(Compiling(what))
