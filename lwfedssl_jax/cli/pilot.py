"""The command ``pilot``: rounds on real devices."""

import socket
import time
from pathlib import Path

from rich.console import Console

from lwfedssl_jax.analysis import terminal
from lwfedssl_jax.cli.pilot_options import DeviceOptions, KeysOptions, LocalOptions, ServerOptions, address
from lwfedssl_jax.config import code_digest, named, override, resolve
from lwfedssl_jax.experiment.progress import ConsoleProgress
from lwfedssl_jax.pilot.keys import DEVICES, make_keys
from lwfedssl_jax.pilot.local import compare, local_config, run_local
from lwfedssl_jax.pilot.processes import check_flower
from lwfedssl_jax.system import devices
from lwfedssl_jax.system.errors import FailedRunsError
from lwfedssl_jax.workdir import WorkDir
from lwfedssl_jax.workdir.directory import PILOT, default_workdir


def run_pilot_local(options: LocalOptions, arguments: list[str]) -> None:
    """Run ``pilot local``."""
    config = local_config(options.config, options.devices)
    set_up(options.compilation_cache)
    name, code, out = named(arguments[0]), code_digest(arguments[0]), Console()
    path = options.workdir or default_workdir(f"pilot-{name}", config, code)
    workdir = WorkDir(path, config, code, command=arguments)
    with ConsoleProgress(Console(stderr=True)) as progress:
        summary = workdir.summary or run_local(config, workdir, options.deadline, progress, tls=options.tls)
    out.print(terminal.summary_tables(dict(summary)))
    out.print(f"metrics, plots, encoder, roster.csv and pilot.jsonl are in {path}, the devices' logs in {path / PILOT}")
    if options.compare:
        twin = path.with_name(f"{path.name}-simulated")
        with ConsoleProgress(Console(stderr=True)) as progress:
            largest = compare(config, path, WorkDir(twin, config, code, command=arguments), progress)
        out.print(f"largest difference between the encoder of these devices and that of the simulator: {largest:g}")
        if largest:
            raise FailedRunsError(f"--compare: the encoders in {path} and {twin} differ by up to {largest:g}")


def run_pilot_server(options: ServerOptions, arguments: list[str]) -> None:
    """Run ``pilot server``."""
    from lwfedssl_jax.pilot.checks import check_pilot
    from lwfedssl_jax.pilot.server import serve
    from lwfedssl_jax.pilot.superlink import FlowerLink

    changes = {"partition.clients": options.devices, "runtime.lanes": 1}
    config = resolve(override(options.config, changes))
    check_pilot(config)
    check_flower()
    set_up(options.compilation_cache)
    name, code, out = named(arguments[0]), code_digest(arguments[0]), Console()
    path = options.workdir or default_workdir(f"pilot-{name}", config, code)
    workdir = WorkDir(path, config, code, command=arguments)
    if not workdir.summary:
        link = FlowerLink(path / PILOT / "server", options.port, options.keys)
        at_start = options.at_start or options.devices
        try:
            link.start()
            with ConsoleProgress(Console(stderr=True)) as progress:
                summary = serve(config, workdir, link, at_start, options.deadline, progress)
        finally:
            link.close()
    else:
        summary = dict(workdir.summary)
    out.print(terminal.summary_tables(summary))
    out.print(f"metrics, plots, encoder, roster.csv and pilot.jsonl are in {path}")


def run_pilot_device(options: DeviceOptions) -> None:
    """Run ``pilot device``."""
    from lwfedssl_jax.pilot.cache import LayerCache
    from lwfedssl_jax.pilot.device import run_device
    from lwfedssl_jax.pilot.images import DeviceImages
    from lwfedssl_jax.pilot.worker import Worker

    host, port = address(options.server)
    check_flower()
    images, folder = DeviceImages(options.data), options.folder or Path.home() / ".lwfedssl-device"
    set_up(options.compilation_cache)
    worker = Worker(options.name or socket.gethostname(), images, LayerCache(folder / "layers"))
    security = ["--insecure"] if options.insecure else []
    if options.ca:
        security += ["--root-certificates", str(options.ca)]
    if options.key:
        security += ["--auth-supernode-private-key", str(options.key)]

    def tell(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    tell(f"{len(images.files)} images in {options.data}; waiting for {options.server}")
    run_device(worker, host, port, folder, tell, security)


def run_pilot_keys(options: KeysOptions) -> None:
    """Run ``pilot keys``."""
    made = make_keys(options.directory, options.devices, options.hosts)
    for path in made:
        print(path)
    print(
        f"{len(made)} files made; {options.directory / DEVICES}/NAME is for the device NAME alone, *.key for the server"
    )


def set_up(compilation_cache: str | None) -> None:
    """Set up JAX as ``train`` does."""
    devices.set_up_cpu()
    devices.set_up_cache(compilation_cache)
    devices.check_platform()
