"""The options of the command ``pilot``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lwfedssl_jax.cli.options import HELP, check_words, name_of, parse, refusals_in_one_line, shown
from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.pilot.keys import CERTIFICATE, NAME

LOOPBACK = ("127.0.0.1", "localhost", "::1")
LONGEST_DEADLINE = 7 * 86_400.0


@dataclass(frozen=True)
class LocalOptions:
    """Run a whole pilot on this machine, for trying it: a server and devices as processes of their own."""

    config_name: tyro.conf.Positional[str]
    """CONFIG: a name that `list` shows, or a path to a Python file that defines `config`."""
    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]  # --section.field VALUE, always
    devices: int = 3
    """Number of devices, among which the config's partition deals the images; all take part in every round."""
    workdir: Annotated[Path | None, shown("DIR")] = None
    """Where the run is stored; by default runs/pilot-CONFIG-HASH."""
    deadline: float = 600.0
    """Seconds for a round, from its first message to a device on."""
    tls: bool = False
    """Encrypt connections, and let only devices with a key join, as between machines."""
    compare: bool = False
    """Simulate the same run as well, and print the largest difference between the encoders; exit 1 unless it is 0."""
    compilation_cache: Annotated[str | None, shown("DIR")] = None
    """Folder for compiled programs, or off; by default $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""


@dataclass(frozen=True)
class ServerOptions:
    """Serve the rounds of a config to devices, or continue to; it listens on this machine alone, behind a proxy."""

    config_name: tyro.conf.Positional[str]
    """CONFIG: a name that `list` shows, or a path to a Python file that defines `config`."""
    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]  # --section.field VALUE, always
    devices: int = 0
    """Number of devices that can join; of these, federation.clients_per_round take part in a round."""
    at_start: int = 0
    """Number of devices to wait for before the first round; 0: all. A run that continues waits for one."""
    workdir: Annotated[Path | None, shown("DIR")] = None
    """Where the run is stored; by default runs/pilot-CONFIG-HASH."""
    port: int = 8000
    """Port of this machine that the proxy passes /v1/fleet/ on to."""
    keys: Annotated[Path | None, shown("DIR")] = None
    """The folder that `pilot keys` has made: connections are encrypted, and only devices with a key may join."""
    deadline: float = 600.0
    """Seconds for a round, from its first message to a device on."""
    compilation_cache: Annotated[str | None, shown("DIR")] = None
    """Folder for compiled programs, or off; by default $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""


@dataclass(frozen=True)
class KeysOptions:
    """Make certificates and keys for a pilot: an authority of its own, the server's certificate, a key per device."""

    directory: Annotated[tyro.conf.Positional[Path], shown("DIR")]
    """The folder; what is there already stays."""
    devices: Annotated[tuple[str, ...], shown("NAME [NAME ...]")] = ()
    """Names of devices."""
    hosts: Annotated[tuple[str, ...], shown("HOST [HOST ...]")] = ()
    """Names and addresses under which devices reach the server."""


@dataclass(frozen=True)
class CalibrateOptions:
    """Make classes of devices for `plan --devices` from what a pilot has measured, in DIR/devices.csv."""

    directory: Annotated[tyro.conf.Positional[Path], shown("DIR")]
    """The work directory of the pilot."""


@dataclass(frozen=True)
class DeviceOptions:
    """Take part in a pilot with the images of this device, which do not leave it."""

    server: Annotated[tyro.conf.Positional[str], shown("HOST:PORT")]
    """The server's proxy."""
    data: Annotated[Path, shown("FOLDER")]
    """The folder with this device's images, and folders in it."""
    name: Annotated[str, shown("NAME")] = ""
    """The same whenever this device returns; by default the machine's host name."""
    folder: Annotated[Path | None, shown("FOLDER")] = None
    """For the layers that it has received, settings and logs; by default .lwfedssl-device in the home directory."""
    ca: Annotated[Path | None, shown("FILE")] = None
    """The certificate of the authority that has signed the server's, such as `pilot keys` makes."""
    key: Annotated[Path | None, shown("FILE")] = None
    """This device's private key, if the server asks for one."""
    insecure: bool = False
    """Without encryption: only to a server on this machine."""
    compilation_cache: Annotated[str | None, shown("DIR")] = None
    """Folder for compiled programs, or off; by default $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""


PARSERS = {
    "local": LocalOptions,
    "server": ServerOptions,
    "device": DeviceOptions,
    "keys": KeysOptions,
    "calibrate": CalibrateOptions,
}


def parse_local(arguments: list[str]) -> LocalOptions:
    """Parse the options of ``pilot local``.

    Raises:
      ConfigError: as ``parse``; a number is out of range.
      SystemExit: after ``--help``.
    """
    options = parse(LocalOptions, arguments, "pilot local")
    check_range("deadline", options.deadline, 1, LONGEST_DEADLINE)
    return options


def parse_server(arguments: list[str]) -> ServerOptions:
    """Parse the options of ``pilot server``.

    Raises:
      ConfigError: as ``parse``; a number is out of range.
      SystemExit: after ``--help``.
    """
    options = parse(ServerOptions, arguments, "pilot server")
    check_range("deadline", options.deadline, 1, LONGEST_DEADLINE)
    check_range("devices", options.devices, 1, 100_000)
    check_range("at-start", options.at_start, 0, options.devices)
    check_range("port", options.port, 1, 65_535)
    if options.keys and not (options.keys / CERTIFICATE).is_file():
        raise ConfigError(f"--keys: {options.keys} has no {CERTIFICATE}; accepted: a folder that `pilot keys` has made")
    return options


def parse_keys(arguments: list[str]) -> KeysOptions:
    """Parse the options of ``pilot keys``.

    Raises:
      ConfigError: DIR is missing, or an option is unknown or not valid.
      SystemExit: after ``--help``.
    """
    check_words(arguments, "DIR")
    with refusals_in_one_line():
        return tyro.cli(KeysOptions, prog=name_of("pilot keys"), args=arguments)


def parse_calibrate(arguments: list[str]) -> CalibrateOptions:
    """Parse the options of ``pilot calibrate``.

    Raises:
      ConfigError: DIR is missing or none, or an option is unknown.
      SystemExit: after ``--help``.
    """
    check_words(arguments, "DIR")
    with refusals_in_one_line():
        options = tyro.cli(CalibrateOptions, prog=name_of("pilot calibrate"), args=arguments)
    if not options.directory.is_dir():
        raise ConfigError(f"DIR: {options.directory} is not a directory; accepted: the work directory of a pilot")
    return options


def parse_device(arguments: list[str]) -> DeviceOptions:
    """Parse the options of ``pilot device``.

    Raises:
      ConfigError: an option is missing, unknown or not valid; no encryption to another machine.
      SystemExit: after ``--help``.
    """
    check_words(arguments, "HOST:PORT")
    if not any(word in arguments for word in HELP) and (not arguments or arguments[0].startswith("-")):
        raise ConfigError("HOST:PORT: must be the first argument of pilot device; accepted: the server's address")
    with refusals_in_one_line():
        options = tyro.cli(DeviceOptions, prog=name_of("pilot device"), args=arguments)
    host, _ = address(options.server)
    if options.insecure and host not in LOOPBACK:
        raise ConfigError(f"--insecure: {host} is another machine; accepted: {', '.join(LOOPBACK)}")
    if options.insecure and (options.ca or options.key):
        raise ConfigError("--insecure: cannot be combined with --ca and --key; accepted: one of them")
    if not (options.insecure or options.ca):
        raise ConfigError("--ca: missing; accepted: --ca FILE, or --insecure to a server on this machine")
    if options.name and not NAME.fullmatch(options.name):
        raise ConfigError(f"--name: {options.name!r} is not a name; accepted: letters, digits, '.', '_' and '-'")
    for name, path in (("ca", options.ca), ("key", options.key)):
        if path and not path.is_file():
            raise ConfigError(f"--{name}: {path} is not a file; accepted: one that `pilot keys` has made")
    return options


def address(text: str) -> tuple[str, int]:
    """Return host and port of an address.

    Raises:
      ConfigError: it has none.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65_535:
        raise ConfigError(f"HOST:PORT: {text!r} is not an address; accepted: such as pilot.example.org:443")
    return host.strip("[]"), int(port)


def check_range(name: str, value: Any, least: float, most: float) -> None:
    """Refuse a number that is out of range.

    Raises:
      ConfigError: it is.
    """
    if not least <= value <= most:
        raise ConfigError(f"--{name}: {value} is out of range; accepted: {least:g} to {most:g}")
