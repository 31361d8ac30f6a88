"""Cohorts: which clients are drawn in a round, which of them report, and how their work is packed into lanes."""

from typing import NamedTuple

import numpy as np

from lwfedssl_jax.costs import accountant
from lwfedssl_jax.simulation.packing import Draw, Layout, PackedRound, make_queue, pack_round, queues
from lwfedssl_jax.simulation.setup import Prepared
from lwfedssl_jax.system import seeds

CALL_STEPS = 32  # steps that are laid out, and at most run, at once


def eligible_clients(run: Prepared, number: int) -> np.ndarray:
    """Return the clients whose devices can take part in a round: all, or those that can afford its stage."""
    if not run.fleet:
        return np.arange(run.config.partition.clients)
    stage = next(stage for stage in run.stages if number <= stage.last_round)
    return np.flatnonzero(run.fleet.can[stage.number])


class Cohort(NamedTuple):
    """The clients of a round, by number and in order.

    Attributes:
      drawn: those that are drawn and have enough examples for the objective to learn from.
      reporting: of these, those that report.
      too_few: how many more are drawn, with fewer examples.
    """

    drawn: list[int]
    reporting: list[int]
    too_few: int = 0


def draw_cohort(run: Prepared, number: int) -> Cohort:
    """Draw the clients of a round."""
    rng = seeds.rng(run.config.runtime.seed, seeds.RngTag.SAMPLING, number)
    clients = eligible_clients(run, number)
    if run.config.federation.sampling == "poisson":
        drawn = clients[rng.random(len(clients)) < probability(run, number)]
    else:
        drawn = np.sort(rng.choice(clients, min(run.config.cohort_size, len(clients)), replace=False))
    stays = rng.random(len(drawn)) >= run.config.federation.dropout
    has_data = run.clients.sizes[drawn] >= run.task.objective.fewest
    return Cohort(drawn[has_data].tolist(), drawn[has_data & stays].tolist(), int((~has_data).sum()))


def probability(run: Prepared, number: int) -> float:
    """Return with which probability a client is drawn in a round by Poisson sampling; 1 otherwise."""
    return accountant.release(run.config, max(len(eligible_clients(run, number)), 1))[0]


def expected_reports(run: Prepared, number: int) -> float:
    """Return how many clients report in a round on average; it depends on the population, not on who is drawn."""
    return accountant.expected_reports(run.config, len(eligible_clients(run, number)))


def layout_of(run: Prepared) -> Layout:
    """Return how clients are packed into the run's lanes."""
    return Layout(
        lanes=run.lanes,
        batch_size=run.batch,
        fewest=run.task.objective.fewest,
        epochs=run.config.federation.local_epochs,
        call_steps=CALL_STEPS,
        one_per_call=run.keeps_clients or run.exchange.embeddings > 0,
    )


def draw_of(run: Prepared, number: int) -> Draw:
    """Return what the order of the examples depends on in a round."""
    return Draw(run.config.runtime.seed, number)


def samples_of(run: Prepared, examples: int) -> int:
    """Return the number of samples that a client with this many examples trains on in a round."""
    layout = layout_of(run)
    (per_epoch,) = make_queue(np.zeros(1), np.array([examples], np.int64), layout).per_epoch.tolist()
    return layout.epochs * min(examples, per_epoch * layout.batch_size)


def order_in_lane(run: Prepared, clients: list[int]) -> list[int]:
    """Return clients in the order in which a single lane trains them."""
    queue = make_queue(np.asarray(clients), run.clients.sizes[clients].astype(np.int64), layout_of(run))
    return [clients[i] for i in queues(queue.steps.tolist(), 1)[0]]


def pack_cohort(run: Prepared, clients: list[int], number: int) -> PackedRound | None:
    """Pack the work of a round's clients into the run's lanes; return None if there are no clients."""
    return pack_round(clients, run.clients, layout_of(run), draw_of(run, number)) if clients else None
