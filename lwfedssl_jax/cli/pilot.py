"""The command ``pilot``: rounds on real devices."""

import pandas as pd
from rich.console import Console

from lwfedssl_jax.analysis import terminal
from lwfedssl_jax.analysis.wording import bytes_words
from lwfedssl_jax.cli.pilot_options import CalibrateOptions, KeysOptions, LocalOptions, ServerOptions
from lwfedssl_jax.config import code_digest, named, override, resolve
from lwfedssl_jax.config.device_classes import describe
from lwfedssl_jax.experiment.progress import ConsoleProgress
from lwfedssl_jax.pilot.calibrate import CLASSES, Calibration, calibrate, write_classes
from lwfedssl_jax.pilot.checks import check_pilot
from lwfedssl_jax.pilot.keys import DEVICES, make_keys
from lwfedssl_jax.pilot.local import compare, local_config, run_local
from lwfedssl_jax.pilot.processes import check_flower
from lwfedssl_jax.pilot.server import serve
from lwfedssl_jax.pilot.superlink import FlowerLink
from lwfedssl_jax.system import devices
from lwfedssl_jax.system.errors import FailedRunsError
from lwfedssl_jax.workdir import WorkDir
from lwfedssl_jax.workdir.directory import PILOT, default_workdir


def run_pilot_local(options: LocalOptions, arguments: list[str]) -> None:
    """Run ``pilot local``."""
    config = local_config(options.config, options.devices)
    devices.set_up(options.compilation_cache)
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
    changes = {"partition.clients": options.devices, "runtime.lanes": 1}
    config = resolve(override(options.config, changes))
    check_pilot(config)
    check_flower()
    devices.set_up(options.compilation_cache)
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


def run_pilot_keys(options: KeysOptions) -> None:
    """Run ``pilot keys``."""
    made = make_keys(options.directory, options.devices, options.hosts)
    for path in made:
        print(path)
    print(
        f"{len(made)} files made; {options.directory / DEVICES}/NAME is for the device NAME alone, *.key for the server"
    )


def run_pilot_calibrate(options: CalibrateOptions) -> None:
    """Run ``pilot calibrate``."""
    found, path, out = calibrate(options.directory), options.directory / CLASSES, Console()
    write_classes(found.classes, path)
    out.print(terminal.rich_table(calibration_words(found)))
    for device, members in zip(found.classes, found.members, strict=True):
        out.print(f"{describe(device)}: {', '.join(members)}", markup=False, highlight=False, soft_wrap=True)
    out.print(
        f"written to {path}; for lwfedssl plan CONFIG --devices {path}", markup=False, highlight=False, soft_wrap=True
    )


def calibration_words(found: Calibration) -> pd.DataFrame:
    """Return the speed of each device in each stage, and the memory of its process, as a table."""
    stages = sorted({stage for of_one in found.speeds.values() for stage in of_one})
    rows = []
    for name, of_one in sorted(found.speeds.items()):
        speeds = {f"stage {n} (GFLOP/s)": f"{of_one[n] / 1e9:.3g}" if n in of_one else "" for n in stages}
        before, beyond = (bytes_words(size) for size in found.memory[name])
        rows.append({"device": name} | speeds | {"process at its start": before, "at most, without programs": beyond})
    return pd.DataFrame(rows)
