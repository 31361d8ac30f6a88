"""One client's local training, by the same program as a lane of the simulator."""

import functools
import time
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lwfedssl_jax.config import Config
from lwfedssl_jax.data.partition import Population
from lwfedssl_jax.data.sources import Dataset
from lwfedssl_jax.method.aggregation import RoundContext
from lwfedssl_jax.method.compression import Message
from lwfedssl_jax.method.stages import Stage
from lwfedssl_jax.method.task import Broadcast
from lwfedssl_jax.simulation import cohort
from lwfedssl_jax.simulation.feed import Feed, streamed
from lwfedssl_jax.simulation.lanes import placer
from lwfedssl_jax.simulation.program import with_key
from lwfedssl_jax.simulation.rounds import BY_LANE, LANES, compression_key
from lwfedssl_jax.simulation.setup import Cache, Prepared, lay_out, parts_of
from lwfedssl_jax.simulation.simulator import Simulator
from lwfedssl_jax.simulation.state import RoundStart
from lwfedssl_jax.system.devices import program_memory
from lwfedssl_jax.tree import Tree


class Update(NamedTuple):
    """What a client has after a round of local training.

    Attributes:
      trained: its trainable part, or with compression its message; on the host.
      examples: its number of images.
      loss, samples: its loss summed over samples, and their number.
      layers: layers run, summed over the steps.
      train_seconds, compile_seconds: that training, and compiling its programs before, took.
      program_bytes: of device memory, of the compiled program.
    """

    trained: Tree
    examples: int
    loss: float
    samples: int
    layers: int
    train_seconds: float
    compile_seconds: float
    program_bytes: int


class LocalUpdate:
    """The local training of one client of a run; only its own images are there.

    Args:
      config: of the run, resolved.
      images_NxHxWxC: uint8, in the order of the client's examples.
      client: its number in the run, from 0.
      cache: of compiled programs; by default, its own.

    Raises:
      ConfigError: parts of the config are incompatible.
    """

    def __init__(self, config: Config, images_NxHxWxC: np.ndarray, client: int, cache: Cache | None = None) -> None:
        self.run = client_run(config, images_NxHxWxC, client)
        self._simulator, self._client = DeviceSimulator([self.run], cache=cache), client

    def __call__(self, stage: Stage, params: Tree, number: int) -> Update:
        """Train for one round.

        Args:
          stage: that the round is in.
          params: all parameters, of which only those are used that exist in the stage.
          number: of the round, from 1.
        """
        simulator, run = self._simulator, self.run
        began = time.monotonic()
        program = simulator.program(stage)
        compiled = time.monotonic()
        broadcast, carry, state = simulator.begin(program, stage, simulator.stack.place(params), None, {})
        context = simulator.context(stage, number, state.server)
        start = RoundStart(stage, number, program, broadcast, carry, context, state)
        carry = simulator.train(start, [cohort.pack_cohort(run, [self._client], number)])
        seconds = time.monotonic() - compiled
        trained, loss, samples, layers = jax.tree.map(
            lambda x: x[0], (carry.client.trainable, carry.loss, carry.samples, carry.layers)
        )
        if pack := self._pack:
            trained = pack(context, self._client, broadcast, trained)
        trained = jax.device_get(trained)
        return Update(
            trained=trained,
            examples=int(run.clients.sizes[self._client]),
            loss=float(loss),
            samples=int(samples),
            layers=int(layers),
            train_seconds=seconds,
            compile_seconds=compiled - began,
            program_bytes=program_memory(program.steps),
        )

    @functools.cached_property
    def _pack(self) -> "jax.stages.Wrapped | None":
        compression = self.run.method.compression
        if not compression:
            return None

        def pack(context: RoundContext, client: jax.Array, broadcast: Broadcast, trained: Tree) -> Message:
            return compression.pack(compression_key(with_key(context), client), broadcast, trained)

        return jax.jit(pack)


class DeviceSimulator(Simulator):
    """A simulator of one client, which does not aggregate."""

    skipped = frozenset({"finish"})

    def _make_feed(self) -> Feed:
        return streamed(self.run.dataset.train_images, placer(self.run.mesh, BY_LANE))


def client_run(config: Config, images_NxHxWxC: np.ndarray, client: int) -> Prepared:
    """Lay out a run of which only one client's images are there, for one lane on this machine's first device."""
    images = images_NxHxWxC
    sizes = np.zeros(max(config.partition.clients, client + 1), np.int64)
    sizes[client] = len(images)
    none = np.full(len(images), -1, np.int32)
    dataset = Dataset(images, none, images[:0], none[:0])
    clients = Population(sizes, lambda clients, positions: positions)
    return lay_out(config, parts_of(config), dataset, clients, 1, Mesh(np.array(jax.devices()[:1]), (LANES,)))
