"""FedCA's dictionary on the server, filled client by client, a batch of embeddings at a time."""

from collections.abc import Callable

import jax
import numpy as np

from lwfedssl_jax.method.aggregation import RoundContext
from lwfedssl_jax.method.task import Broadcast
from lwfedssl_jax.simulation import cohort
from lwfedssl_jax.simulation.feed import Feed
from lwfedssl_jax.simulation.lanes import placer
from lwfedssl_jax.simulation.packing import Schedule, pack_embeddings
from lwfedssl_jax.simulation.program import Program
from lwfedssl_jax.simulation.rounds import ALL, SCHEDULE_BY_LANE, Carry, Work
from lwfedssl_jax.simulation.setup import Prepared
from lwfedssl_jax.tree import Tree


class Dictionary:
    """What the clients of a round upload.

    Args:
      run: prepared.
      drawn: the round's clients, in order; a client's slots are at its place among them.
      number: of the round.
      between_calls: called before each batch of embeddings; may raise to abandon the round.

    Attributes:
      state: the dictionary so far, which the next round's broadcast has.
    """

    def __init__(self, run: Prepared, drawn: list[int], number: int, between_calls: Callable[[], None]) -> None:
        self._run, self._number, self._between_calls = run, number, between_calls
        most = run.exchange.embeddings
        self._slots = {client: range(place * most, (place + 1) * most) for place, client in enumerate(drawn)}
        self.state: Tree = run.exchange.start()

    def add(
        self,
        program: Program,
        feed: Feed,
        carry: Carry,
        broadcast: Broadcast,
        schedule: Schedule,
        context: RoundContext,
    ) -> None:
        """Add the embeddings of the clients that a call has finished, at most one per lane, unless they are not finite.

        Args:
          program: of the stage.
          feed: provides the images.
          carry: after the call.
          broadcast, context: of the round.
          schedule: the call's.
        """
        run, put, put_all = self._run, placer(self._run.mesh, SCHEDULE_BY_LANE), placer(self._run.mesh, ALL)
        finished = (schedule.weight.max(axis=0) > 0) & np.isfinite(jax.device_get(carry.loss))
        if not finished.any():
            return
        assert program.embed
        clients = [int(client) if done else None for client, done in zip(schedule.client[0], finished, strict=True)]
        layout, draw = cohort.layout_of(run), cohort.draw_of(run, self._number)
        calls = pack_embeddings(clients, run.clients, layout, draw, run.exchange.embeddings)
        for images, host, rows in feed.serve(calls):
            placed = put(host)
            for row in range(rows):
                self._between_calls()
                work = Work(images, placed, put_all(np.array(row, np.int32)), put_all(np.array(1, np.int32)))
                embeddings = jax.device_get(program.embed(carry.client.trainable, broadcast, work, context))
                for w in np.flatnonzero(host.busy[row]):
                    self._store(int(host.client[row, w]), embeddings[w, : host.real[row, w]])

    def _store(self, client: int, embeddings: np.ndarray) -> None:
        if np.isfinite(embeddings).all():
            free = self._slots[client]
            used, self._slots[client] = free[: len(embeddings)], free[len(embeddings) :]
            self.state["dictionary"][used] = embeddings[: len(used)]
            self.state["filled"][used] = True
