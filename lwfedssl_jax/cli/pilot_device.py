"""The command ``pilot device``, which needs only what a device has to have."""

import contextlib
import socket
import time
from pathlib import Path

from lwfedssl_jax.cli.pilot_options import DeviceOptions, address
from lwfedssl_jax.pilot.cache import LayerCache
from lwfedssl_jax.pilot.device import run_device
from lwfedssl_jax.pilot.images import DeviceImages
from lwfedssl_jax.pilot.keys import check_files
from lwfedssl_jax.pilot.processes import check_flower
from lwfedssl_jax.pilot.relay import Relay
from lwfedssl_jax.pilot.worker import Worker
from lwfedssl_jax.system import devices


def run_pilot_device(options: DeviceOptions) -> None:
    """Run ``pilot device``."""
    host, port = address(options.server)
    check_flower()
    images, folder = DeviceImages(options.data), options.folder or Path.home() / ".lwfedssl-device"
    check_files(options.ca, options.key)
    images.check()
    devices.set_up(options.compilation_cache)
    name, layers, relay = options.name or socket.gethostname(), LayerCache(folder / "layers"), Relay(host, port)
    worker = Worker(name, images, layers, counted=relay.counted)
    security = ["--insecure"] if options.insecure else []
    if options.ca:
        security += ["--root-certificates", str(options.ca)]
    if options.key:
        security += ["--auth-supernode-private-key", str(options.key)]

    def tell(text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody may read it
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    tell(f"{len(images.files)} images in {options.data}; waiting for {options.server}")
    try:
        run_device(worker, relay, folder, tell, security)
    except KeyboardInterrupt:
        tell("interrupted")
        devices.leave(130)  # without waiting for what is being compiled ahead
