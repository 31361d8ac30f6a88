"""A whole pilot on this machine: server and devices as processes of their own, and its twin in the simulator."""

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from lwfedssl_jax.config import Config, ConfigError, override, resolve
from lwfedssl_jax.experiment.active import ActiveRun
from lwfedssl_jax.experiment.train import train_together
from lwfedssl_jax.pilot.checks import check_pilot
from lwfedssl_jax.pilot.device import end_supernode
from lwfedssl_jax.pilot.images import write_images
from lwfedssl_jax.pilot.keys import CA, DEVICES, make_keys
from lwfedssl_jax.pilot.processes import SECONDS_TO_END, Process, check_flower, free_port
from lwfedssl_jax.pilot.server import serve
from lwfedssl_jax.pilot.superlink import FlowerLink
from lwfedssl_jax.simulation.events import Hear
from lwfedssl_jax.simulation.setup import Prepared, prepare, with_full_batch
from lwfedssl_jax.simulation.simulator import Simulator
from lwfedssl_jax.workdir import WorkDir
from lwfedssl_jax.workdir.directory import PILOT

MOST_DEVICES = 64


def local_config(config: Config, devices: int) -> Config:
    """Return a config with this number of devices as clients, all of which take part in every round.

    Raises:
      ConfigError: it cannot be run on devices, or there are too few or too many.
    """
    if not 1 <= devices <= MOST_DEVICES:
        raise ConfigError(f"--devices: {devices} is out of range; accepted: 1 to {MOST_DEVICES}")
    changes = {"partition.clients": devices, "federation.clients_per_round": 0, "runtime.lanes": 1}
    config = resolve(override(config, changes))
    check_pilot(config)
    return config


def device_names(config: Config) -> list[str]:
    """Return the names of the devices of a config, by their numbers."""
    return [f"local-{number}" for number in range(config.partition.clients)]


class LocalDevices:
    """Devices as processes of this machine, each with its own folder of images.

    Args:
      config: as ``local_config`` returned it; its partition deals the images.
      folder: for what each device has and writes.
      keys: a folder with keys for all of them, if connections are encrypted.

    Attributes:
      names: of the devices, by their numbers.
      processes: by name.
    """

    def __init__(self, config: Config, folder: Path, keys: Path | None = None) -> None:
        self._folder, self._keys = folder, keys
        self.names = device_names(config)
        self.processes: dict[str, Process] = {}
        run = prepare(config)
        for number, name in enumerate(self.names):
            write_images(folder / name / "images", run.dataset.train_images, run.clients[number])

    def start(self, port: int) -> None:
        """Start all of them; the server's port is on this machine."""
        for name in self.names:
            self.start_one(name, port)

    def start_one(self, name: str, port: int) -> None:
        """Start a device, again if it was started before."""
        if name in self.processes:
            self._end(name)
        own = self._folder / name
        command = [Path(sys.executable).name, "-m", "lwfedssl_jax", "pilot", "device", f"127.0.0.1:{port}"]
        command += ["--data", str(own / "images"), "--name", name, "--folder", str(own)]
        if self._keys:
            command += ["--ca", str(self._keys / CA), "--key", str(self._keys / DEVICES / name)]
        else:
            command += ["--insecure"]
        self.processes[name] = Process(command, own / "device.log", own)

    def stop(self) -> None:
        """End all of them."""
        for process in self.processes.values():
            process.ask_to_stop()
        for name in self.processes:
            self._end(name)

    def _end(self, name: str) -> None:
        """End a device, which itself ends its SuperNode unless it has to be killed."""
        self.processes[name].stop(2 * SECONDS_TO_END)
        end_supernode(self._folder / name)


def run_local(config: Config, workdir: WorkDir, deadline: float, hear: Hear, *, tls: bool = False) -> dict[str, Any]:
    """Run a config on devices that are processes of this machine, or continue it.

    Args:
      config: as ``local_config`` returned it.
      workdir: belongs to this config.
      deadline: seconds for a round.
      hear: called with each event.
      tls: encrypt connections, and let only devices with a key join.

    Returns:
      The content of ``summary.json``.

    Raises:
      ConfigError: Flower is not installed; and as ``serve``.
      OSError: a process does not start.
    """
    check_flower()
    folder, port = workdir.path / PILOT, free_port()
    keys, names = folder / "keys" if tls else None, device_names(config)
    if keys:
        make_keys(keys, names, [])
    with contextlib.ExitStack() as ends:
        link = FlowerLink(folder / "server", port, keys)
        ends.callback(link.close)
        link.start()
        devices = LocalDevices(config, folder, keys)
        ends.callback(devices.stop)
        devices.start(port)
        return serve(config, workdir, link, len(names), deadline, hear, names=names)


def compare(config: Config, workdir: Path, simulated: WorkDir, hear: Hear) -> float:
    """Simulate a config, and return the largest difference between the encoders' parameters."""
    run = ActiveRun(config, simulated, [hear])
    train_together([run], make=make_simulator)
    if run.error:
        raise run.error
    on_devices, expected = (load_file(path / "encoder.safetensors") for path in (workdir, simulated.path))
    if on_devices.keys() != expected.keys():
        return float("inf")
    differences: Callable[[str], float] = functools.partial(_difference, on_devices, expected)
    return max(map(differences, expected))


def make_simulator(runs: Sequence[Prepared], *args: Any, **options: Any) -> Simulator:
    """Make a simulator whose steps have room for a whole batch, as those of devices do."""
    return Simulator([with_full_batch(run) for run in runs], *args, **options)


def _difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray], name: str) -> float:
    return float(np.abs(a[name].astype(np.float64) - b[name].astype(np.float64)).max(initial=0))
