"""One client's local training, by the same program as a lane of the simulator."""

import functools
import time
from concurrent.futures import Future, ThreadPoolExecutor
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
from lwfedssl_jax.simulation.program import Program, with_key
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
      train_seconds: that training took.
      compile_seconds: that compiling its programs took, before or ahead of the first round of a stage; 0 in later ones.
      overlap_seconds: of the training, in which other programs were compiled.
      program_bytes: of device memory, of the compiled program.
    """

    trained: Tree
    examples: int
    loss: float
    samples: int
    layers: int
    train_seconds: float
    compile_seconds: float
    overlap_seconds: float
    program_bytes: int


class Compiled(NamedTuple):
    """A stage's programs, and when compiling them began and ended."""

    program: Program
    began: float
    ended: float


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
        self._compiler = ThreadPoolExecutor(1)
        self._compiled, self._used = dict[int, Future[Compiled]](), set[int]()

    def compile(self, stage: Stage) -> Future[Compiled]:
        """Begin to compile a stage's programs in a thread, one stage after the other, unless that was done before."""
        known = self._compiled.get(stage.number)
        if known is None or (known.done() and known.exception()):  # which may have been for lack of memory
            known = self._compiled[stage.number] = self._compiler.submit(self._compile, stage)
        return known

    def _compile(self, stage: Stage) -> Compiled:
        began = time.monotonic()
        return Compiled(self._simulator.program(stage), began, time.monotonic())

    def _overlap(self, began: float, ended: float, stage: Stage) -> float:
        """Seconds of an interval in which another stage's programs were being compiled."""
        seconds = 0.0
        for number, future in self._compiled.items():
            is_done = future.done()  # read once: it may be done a moment later
            if number != stage.number and not (is_done and future.exception()):
                start, end = future.result()[1:] if is_done else (began, ended)
                seconds += max(0.0, min(end, ended) - max(start, began))
        return seconds

    def __call__(self, stage: Stage, params: Tree, number: int) -> Update:
        """Train for one round.

        Args:
          stage: that the round is in.
          params: all parameters, of which only those are used that exist in the stage.
          number: of the round, from 1.
        """
        simulator, run = self._simulator, self.run
        compiled = self.compile(stage).result()
        program, began = compiled.program, time.monotonic()
        broadcast, carry, state = simulator.begin(program, stage, simulator.stack.place(params), None, {})
        context = simulator.context(stage, number, state.server)
        start = RoundStart(stage, number, program, broadcast, carry, context, state)
        carry = simulator.train(start, [cohort.pack_cohort(run, [self._client], number)])
        jax.block_until_ready(carry)
        ended = time.monotonic()
        trained, loss, samples, layers = jax.tree.map(
            lambda x: x[0], (carry.client.trainable, carry.loss, carry.samples, carry.layers)
        )
        if pack := self._pack:
            trained = pack(context, self._client, broadcast, trained)
        trained, is_first = jax.device_get(trained), stage.number not in self._used
        self._used.add(stage.number)
        return Update(
            trained=trained,
            examples=int(run.clients.sizes[self._client]),
            loss=float(loss),
            samples=int(samples),
            layers=int(layers),
            train_seconds=ended - began,
            compile_seconds=compiled.ended - compiled.began if is_first else 0.0,
            overlap_seconds=self._overlap(began, ended, stage),
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
