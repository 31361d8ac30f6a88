"""The device's side of a pilot: answers the server's messages, whatever carries them."""

import json
import platform
import secrets
import time
from collections.abc import Callable

import jax

from lwfedssl_jax import __version__
from lwfedssl_jax.config import ConfigError, from_dict, resolve
from lwfedssl_jax.data import sources
from lwfedssl_jax.method.checks import check_method
from lwfedssl_jax.pilot import machine, protocol
from lwfedssl_jax.pilot.cache import LayerCache
from lwfedssl_jax.pilot.checks import check_pilot
from lwfedssl_jax.pilot.images import DeviceImages
from lwfedssl_jax.pilot.protocol import Ask, Hello, Message, Missing, ProtocolError, Refused, Result, Train
from lwfedssl_jax.pilot.relay import Counted
from lwfedssl_jax.pilot.update import LocalUpdate
from lwfedssl_jax.pilot.wire import Wire, WireError
from lwfedssl_jax.simulation.setup import Cache

LONGEST_REASON = 500
NOTHING = Counted()


class Worker:
    """A device: its name, its images and the layers that it has.

    Args:
      name: the same whenever the device returns.
      images: its own.
      layers: that it has.
      programs: compiled ones; by default, its own.
      counted: returns what the connections to the server have carried so far.
    """

    def __init__(
        self,
        name: str,
        images: DeviceImages,
        layers: LayerCache,
        programs: Cache | None = None,
        counted: Callable[[], Counted] = Counted,
    ) -> None:
        self._name, self._images, self._cache, self._programs, self._counted = name, images, layers, programs, counted
        self._boot, self._baseline = secrets.token_hex(8), machine.peak_bytes()
        self._prepared: tuple[tuple[str, int], LocalUpdate, Wire] | None = None
        self._stage = 0

    def handle(self, message: Message) -> Message:
        """Return the answer to a message; what cannot be done is refused, with the reason."""
        began, counted = time.monotonic(), self._counted()
        try:
            request = protocol.read(message)
        except ProtocolError as error:
            return protocol.write(Refused(f"{self._name} was sent {error}"))
        if isinstance(request, Ask):
            return protocol.write(self.hello(counted))
        if not isinstance(request, Train):
            return protocol.write(Refused(f"{self._name} was sent a message {message.kind}"))
        try:
            return protocol.write(self._train(request, began, counted))
        except Exception as error:  # whatever a server sends, and whatever training lacks, the device goes on
            known = isinstance(error, ConfigError | WireError)
            why = str(error) if known else f"{type(error).__name__}: {error}"
            return protocol.write(Refused(f"{self._name}: {why}"[:LONGEST_REASON], request.round))

    def compile_ahead(self) -> None:
        """Begin to compile the programs of the stage after the last request's, beside whatever else is done."""
        if self._prepared and self._stage:
            _, update, _ = self._prepared
            following = [stage for stage in update.run.stages if stage.number == self._stage + 1]
            for stage in following:
                update.compile(stage)

    def hello(self, counted: Counted = NOTHING) -> Hello:
        """Say who the device is."""
        device = jax.local_devices()[0]
        limit = (device.memory_stats() or {}).get("bytes_limit", 0)  # of an accelerator's own memory
        versions = f"lwfedssl_jax {__version__}, jax {jax.__version__}, Python {platform.python_version()}"
        return Hello(
            name=self._name,
            boot=self._boot,
            software=versions,
            platform=f"{platform.system()} {platform.machine()}" + (f" with {device.device_kind}" if limit else ""),
            cores=machine.cores(),
            memory_bytes=machine.memory_bytes(),
            available_bytes=limit or machine.available_bytes(),
            baseline_bytes=self._baseline,
            images=len(self._images.files),
            data=self._images.digest,
            layers=",".join(self._cache.digests()),
            **counted._asdict(),
        )

    def _train(self, request: Train, began: float, counted: Counted) -> Result | Missing | Refused:
        update, wire = self._prepare(request.config, request.client)
        stages = {stage.number: stage for stage in update.run.stages}
        if request.stage not in stages:
            raise WireError(f"a stage {request.stage} of {len(stages)}")
        if not 1 <= request.round <= update.run.config.federation.rounds:
            raise WireError(f"a round {request.round} of {update.run.config.federation.rounds}")
        stage = stages[request.stage]
        layers, missing = dict[int, bytes](), []
        for number, digest in enumerate(protocol.split(request.frozen), start=1):
            content = request.arrays.get(digest)
            if content is not None:
                if wire.digest(number, content) != digest:
                    raise WireError(f"a layer {number} that is not the one with the hash {digest}")
                self._cache.put(digest, wire.header(number) + content)
            elif (kept := self._cache.get(digest)) is not None:
                content = kept.removeprefix(wire.header(number))
            if content is None:
                missing.append(digest)
            else:
                layers[number] = content
        if len(layers) + len(missing) != stage.frozen_depth:
            raise WireError(f"{len(layers) + len(missing)} frozen layers where there are {stage.frozen_depth}")
        if missing:
            return Missing(request.run, request.round, ",".join(missing))
        params = wire.params(stage, request.arrays.get("trainable", b""), layers)
        if time.monotonic() - began > request.seconds:
            return Refused(f"{self._name}: the time for round {request.round} is over", request.round)
        self._stage = stage.number
        trained = update(stage, params, request.round)
        return Result(
            run=request.run,
            round=request.round,
            client=request.client,
            examples=trained.examples,
            loss=trained.loss,
            samples=trained.samples,
            layers=trained.layers,
            train_seconds=trained.train_seconds,
            compile_seconds=trained.compile_seconds,
            overlap_seconds=trained.overlap_seconds,
            peak_bytes=machine.peak_bytes(),
            program_bytes=trained.program_bytes,
            **counted._asdict(),
            arrays={"update": wire.update(stage, trained.trained)},
        )

    def _prepare(self, text: str, client: int) -> tuple[LocalUpdate, Wire]:
        """The local training of a config, whose programs last as long as the run, and its bytes."""
        if self._prepared is None or self._prepared[0] != (text, client):
            self._stage = 0
            try:
                config = resolve(from_dict(json.loads(text)))
            except (ValueError, TypeError, RecursionError) as error:
                raise WireError(f"a config that cannot be read ({error})") from error
            check_method(config)
            check_pilot(config)
            if not 0 <= client < config.partition.clients:
                raise WireError(f"a client {client} of {config.partition.clients}")
            images = self._images.load(config.data.image_size, sources.find(config.data).channels)
            update = LocalUpdate(config, images, client, self._programs)
            self._prepared = (text, client), update, Wire(update.run)
        return self._prepared[1:]
