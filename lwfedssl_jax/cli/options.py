"""The options of each command, and how they are parsed from the command line."""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from lwfedssl_jax.config import Config, ConfigError, load, override
from lwfedssl_jax.config.device_classes import LEAST, MOST, QUANTITIES, DeviceClass, describe, read_csv
from lwfedssl_jax.system.files import can_write
from lwfedssl_jax.system.program import program

HELP = ("-h", "--help")
PICTURES = (".png", ".pdf", ".svg")
EMBEDDINGS = (".npz", ".csv")
NUMBERS = {"INT": "a whole number", "FLOAT": "a number", "[INT [INT ...]]": "whole numbers"}
MOST_JOBS = 1024
SHELLS = ("bash", "zsh")


def shown(value: str) -> Any:
    """Name the value of an option in ``--help`` and in errors."""
    return tyro.conf.arg(metavar=value)


@dataclass(frozen=True)
class TrainOptions:
    """Train, evaluate and write the work directory; continues an unfinished run of the same config."""

    config_name: tyro.conf.Positional[str]
    """CONFIG: a name that `list` shows, or a path to a Python file that defines `config`."""
    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]  # --section.field VALUE, always
    workdir: Annotated[Path | None, shown("DIR")] = None
    """Where the run is stored; by default runs/CONFIG-HASH, one directory per config and set of overrides."""
    compilation_cache: Annotated[str | None, shown("DIR")] = None
    """Folder for compiled programs, or off; by default $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    coordinator: Annotated[str | None, shown("HOST:PORT")] = None
    """Run with several processes: HOST:PORT of process 0, or auto where JAX finds it by itself (SLURM, TPU pods)."""
    processes: Annotated[int | None, shown("INT")] = None
    """Run with several processes: their number."""
    process: Annotated[int | None, shown("INT")] = None
    """Run with several processes: the number of this one, counted from 0."""


@dataclass(frozen=True)
class ResourcesOptions:
    """Report the traffic, operations and memory of one client under each strategy, without training."""

    config_name: tyro.conf.Positional[str]
    """CONFIG: a name that `list` shows, or a path to a Python file that defines `config`."""
    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]  # --section.field VALUE, always
    json: bool = False
    """Print JSON instead of a table."""
    plot: Annotated[Path | None, shown("FILE")] = None
    """Also plot the costs over rounds and over numbers of local epochs, to this .png, .pdf or .svg file."""
    memory: bool = True
    """Compile one client's training step of each stage to measure its peak memory."""
    compilation_cache: Annotated[str | None, shown("DIR")] = None
    """Folder for compiled programs, or off; by default $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""


@dataclass(frozen=True)
class PlanOptions:
    """Report which strategy and how many layers per stage a fleet of devices can afford, without training."""

    config_name: tyro.conf.Positional[str]
    """CONFIG: a name that `list` shows, or a path to a Python file that defines `config`."""
    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]  # --section.field VALUE, always
    memory_gb: Annotated[float | None, shown("FLOAT")] = None
    """A single class of devices: memory that the process which trains can have, in GB (1e9 bytes)."""
    gflops: Annotated[float | None, shown("FLOAT")] = None
    """With --memory-gb: sustained speed in 1e9 floating-point operations per second; a multiply-add counts as two.
    Without it or without a link speed, no time is reported."""
    uplink_mbps: Annotated[float | None, shown("FLOAT")] = None
    """With --memory-gb: upload speed of the device, in 1e6 bit/s."""
    downlink_mbps: Annotated[float | None, shown("FLOAT")] = None
    """With --memory-gb: download speed of the device, in 1e6 bit/s."""
    watts: Annotated[float | None, shown("FLOAT")] = None
    """With --memory-gb: power in watts while the device trains, uploads or downloads; needed for its energy."""
    baseline_gb: Annotated[float | None, shown("FLOAT")] = None
    """With --memory-gb: the part of it that the process needs before any model; by default, all is for the model."""
    devices: Annotated[Path | None, shown("FILE")] = None
    """Several classes of devices instead: a CSV file with the columns name, count, memory_gb and, where known, gflops,
    uplink_mbps, downlink_mbps, watts and baseline_gb. Without --memory-gb and --devices: the config's fleet.devices."""
    examples: Annotated[tuple[str, ...], shown("INT | p10=INT p50=INT ...")] = ()
    """Images per client: a number, or quantiles over clients. By default, the clients of the data set as train deals
    them, if it is on this machine."""
    results: Annotated[Path | None, shown("DIR")] = None
    """A directory with finished runs, such as a sweep's: adds the accuracy that each option reached."""
    protocol: Annotated[str | None, shown("NAME")] = None
    """With --results: the protocol whose accuracy is shown, such as knn; by default the one that evaluated most
    runs."""
    epsilon: Annotated[float | None, shown("FLOAT")] = None
    """Also state the noise that differential privacy of this epsilon takes for whole clients, under each option."""
    delta: Annotated[float | None, shown("FLOAT")] = None
    """With --epsilon: its delta; by default the config's privacy.delta."""
    accuracy_first: bool = False
    """Recommend the most accurate option that any client can take part in throughout, however few can."""
    cheapest: bool = False
    """Of the options that the largest share of the clients can take part in throughout, recommend that with the least
    time, then the least traffic, not the most accurate one."""
    json: bool = False
    """Print JSON instead of a table."""
    out: Annotated[Path | None, shown("DIR")] = None
    """Also write plan.html, a page for whoever decides, and plan.json to this folder."""
    plot: Annotated[Path | None, shown("FILE")] = None
    """Also plot accuracy against time and memory, and what stages require, to this .png, .pdf or .svg file."""
    compilation_cache: Annotated[str | None, shown("DIR")] = None
    """Folder for compiled programs, or off; by default $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""


@dataclass(frozen=True)
class SweepOptions:
    """Run a grid of configs and seeds, or continue it, and write its report."""

    sweep_name: Annotated[tyro.conf.Positional[str], shown("SWEEP")]
    """A name from configs/sweeps, or a path to a Python file that defines `sweep`."""
    workdir: Annotated[Path | None, shown("DIR")] = None
    """Where the sweep is stored; by default runs/sweeps/SWEEP, with --base runs/sweeps/SWEEP-CONFIG."""
    base: Annotated[str, shown("CONFIG")] = ""
    """Name or file of a config to start from, instead of the sweep's own."""
    shard: Annotated[str | None, shown("I/N")] = None
    """Train only the I-th of N shares of the runs, with I from 1. Any number of processes, on any hosts that share the
    directory, may do so at once: a run that one of them has begun is left alone by the others."""
    dry_run: bool = False
    """Only list the runs, their operations and the estimated time on this machine."""
    jobs: int = 1
    """Number of processes that run at the same time, each with a share of the cores, or with a GPU."""
    together: int = 0
    """Number of runs that train side by side in one program, if they differ only in numbers and seeds; 0: chosen by
    device."""
    compilation_cache: Annotated[str | None, shown("DIR")] = None
    """Folder for compiled programs, or off; by default $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""


@dataclass(frozen=True)
class ReportOptions:
    """Write an HTML page, figures and tables about one or several runs."""

    directories: Annotated[tyro.conf.Positional[tuple[Path, ...]], shown("DIR [DIR ...]")]
    """A run's work directory, or one with runs below it, such as a sweep's."""
    out: Annotated[Path | None, shown("DIR")] = None
    """Where to write report.html, plots/ and tables/; by default DIR, or the folder `report` for several."""


@dataclass(frozen=True)
class EmbedOptions:
    """Write the features that a finished run's encoder computes of pictures."""

    run: Annotated[tyro.conf.Positional[Path], shown("RUN")]
    """The work directory of a finished run."""
    images: Annotated[tyro.conf.Positional[Path], shown("IMAGES")]
    """A folder, with the images below it, an image, or an npz file with arrays of uint8 images; all are resized as in
    training."""
    out: Annotated[Path, shown("FILE")]
    """Where to write them: FILE.npz with the arrays names and features, or FILE.csv with a row for each image."""
    config: Annotated[str, shown("FILE.py")] = ""
    """The config file that adds the encoder's model, if the model is your own."""
    compilation_cache: Annotated[str | None, shown("DIR")] = None
    """Folder for compiled programs, or off; by default $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""


@dataclass(frozen=True)
class NewOptions:
    """Make a folder to begin your own work in: a config with an encoder, an objective and data of your own."""

    directory: Annotated[tyro.conf.Positional[Path], shown("DIR")]
    """The folder, which must be new or empty."""


Options = TypeVar("Options", bound="Any")


def with_fleet(options: PlanOptions) -> Config:
    """Return the config with the devices that the options describe, or unchanged if they describe none.

    Raises:
      ConfigError: neither they nor the config describe devices, or they describe two fleets.
    """
    one = {field: value for field in QUANTITIES if (value := getattr(options, field)) is not None}
    if options.devices and one:
        raise ConfigError(
            f"--devices: {options.devices} cannot be combined with --{next(iter(one)).replace('_', '-')}; "
            "accepted: --devices, or --memory-gb with its options"
        )
    if one and options.memory_gb is None:
        raise ConfigError(
            f"--memory-gb: missing, but --{next(iter(one)).replace('_', '-')} needs it; accepted: --memory-gb X, in GB"
        )
    if not (one or options.devices or options.config.fleet.devices):
        raise ConfigError(
            "--memory-gb: missing; accepted: --memory-gb X --gflops X --uplink-mbps X --downlink-mbps X, "
            "--devices FILE.csv, or a config with fleet.devices"
        )
    for field, value in one.items():
        if not LEAST <= value <= MOST:
            accepted = f"accepted: {LEAST:g} to {MOST:g}"
            raise ConfigError(f"--{field.replace('_', '-')}: {value} is out of range; {accepted}")
    try:
        classes = read_csv(options.devices) if options.devices else []
    except ValueError as error:
        raise ConfigError(f"--devices: {error}") from None
    if one:
        classes = [DeviceClass("device", 1, **one)]
    changes = {"fleet.devices": tuple(map(describe, classes))} if classes else {}
    return override(options.config, changes)


def check_plot(path: Path | None) -> None:
    """Refuse a path where no picture can be written.

    Raises:
      ConfigError: the folder is not writable, or the file's ending is not supported.
    """
    if path and not can_draw(path):
        raise ConfigError(
            f"--plot: {path} cannot be drawn; accepted: a file in an existing folder that you can write to, "
            f"that ends in {', '.join(PICTURES)}"
        )


def parse_sweep(arguments: list[str]) -> SweepOptions:
    """Parse the options of ``sweep``.

    Raises:
      ConfigError: no SWEEP, an unknown option, or a value that is empty or does not parse.
      SystemExit: after ``--help``.
    """
    check_words(arguments, "SWEEP")
    if not any(word in arguments for word in HELP) and (not arguments or arguments[0].startswith("-")):
        found = repr(arguments[0]) if arguments else "nothing"
        raise ConfigError(
            f"SWEEP: must be the first argument of sweep, found {found}; "
            "accepted: a name from configs/sweeps, or the path of a .py file"
        )
    with refusals_in_one_line():
        options = tyro.cli(SweepOptions, prog=name_of("sweep"), args=arguments)
    for name, least in (("jobs", 1), ("together", 0)):
        if not least <= (value := getattr(options, name)) <= MOST_JOBS:
            raise ConfigError(f"--{name}: {value} is out of range; accepted: {least} to {MOST_JOBS}")
    return options


def parse_report(arguments: list[str]) -> ReportOptions:
    """Parse the options of ``report``.

    Raises:
      ConfigError: no DIR, an unknown option, or a value that is empty or does not parse.
      SystemExit: after ``--help``.
    """
    check_words(arguments, "DIR")
    with refusals_in_one_line():
        options = tyro.cli(ReportOptions, prog=name_of("report"), args=arguments)
    if not options.directories:
        raise ConfigError("DIR: must be the first argument of report, found nothing; accepted: a directory with runs")
    return options


def parse_embed(arguments: list[str]) -> EmbedOptions:
    """Parse the options of ``embed``.

    Raises:
      ConfigError: RUN, IMAGES or --out is missing, an unknown option, or a value that is empty.
      SystemExit: after ``--help``.
    """
    check_words(arguments, "RUN")
    with refusals_in_one_line():
        return tyro.cli(EmbedOptions, prog=name_of("embed"), args=arguments)


def parse_new(arguments: list[str]) -> NewOptions:
    """Parse the options of ``new``.

    Raises:
      ConfigError: DIR is missing, or an unknown option.
      SystemExit: after ``--help``.
    """
    check_words(arguments, "DIR")
    with refusals_in_one_line():
        return tyro.cli(NewOptions, prog=name_of("new"), args=arguments)


def can_draw(path: Path) -> bool:
    """Return whether a picture can be written to the path."""
    if path.suffix not in PICTURES or os.path.isdir(path) or not os.path.isdir(path.parent):
        return False
    return os.access(path, os.W_OK) if os.path.isfile(path) else can_write(path)


def parse(options: type[Options], arguments: list[str], command: str = "") -> Options:
    """Parse a command that starts with CONFIG; the config's values are the defaults of the options.

    Args:
      options: of the command.
      arguments: all words after it.
      command: its words, if they do not follow from the name of the options.

    Raises:
      ConfigError: no CONFIG, an unknown option or choice, or a value that is empty or does not parse.
      SystemExit: after ``--help``.
    """
    command = command or options.__name__.removesuffix("Options").lower()
    if arguments and arguments[0] in HELP:
        arguments = ["quickstart", "--help"]
    if not arguments or arguments[0].startswith("-"):
        found = repr(arguments[0]) if arguments else "nothing"
        raise ConfigError(
            f"CONFIG: must be the first argument of {command}, found {found}; "
            "accepted: a name that `list` shows, or the path of a .py file"
        )
    check_words(arguments)
    default = options(config_name=arguments[0], config=load(arguments[0]))
    with refusals_in_one_line():
        return tyro.cli(options, prog=name_of(command, "CONFIG"), args=arguments, default=default)


def name_of(command: str, *arguments: str) -> str:
    """Return a command as a usage line shows it, with arguments that the parser itself would leave out."""
    return " ".join([*program(), command, *arguments])


@contextlib.contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """Turn the parser's errors into ConfigErrors."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except SystemExit as stop:
        if stop.code:
            raise ConfigError(one_line(errors.getvalue())) from None
        raise  # --help has been printed


def check_words(arguments: list[str], first: str = "CONFIG") -> None:
    """Refuse empty values, which the parser would accept, and line breaks.

    Args:
      arguments: all words after the command.
      first: the name of the argument before all options.

    Raises:
      ConfigError: naming the option.
    """
    option = first
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            option = name
        if argument and argument.splitlines() != [argument]:  # the parser's own message would be cut there
            raise ConfigError(f"{option}: {argument!r} contains a line break; accepted: text in one line")
        if not argument or (name.startswith("--") and equals and not value):
            raise ConfigError(f"{option}: '' is empty; accepted: a value")


def one_line(box: str) -> str:
    """Turn tyro's framed message (title, message, help) into one line: option, value, what is accepted."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]
    ruled = [bool(line) and not line.strip("─-") for line in lines]
    start = 1 if ruled[0] else 0
    end = ruled.index(True, start) if True in ruled[start:] else len(lines)
    paragraph = lines[start : lines.index("", start, end) if "" in lines[start:end] else end]
    message, rest = " ".join(paragraph).rstrip("."), "\n".join(lines[end:])
    if message.startswith("Missing from"):
        missing = re.findall(r"(?::|\(required\)) (--[\w-]+|[A-Z]+)", message)
        return f"{missing[0]}: missing; accepted: {'all of ' * (len(missing) > 1)}{', '.join(missing)}"
    if found := re.match("Unrecognized options: (.*)", message):
        suggested = dict.fromkeys(re.findall(r"^--[a-z][\w.-]*", rest, re.MULTILINE))
        unknown = [word for word in found[1].split(", ") if word.startswith("-")] or [found[1]]
        return f"{', '.join(unknown)}: unknown option; accepted: {', '.join(suggested) or 'what --help shows'}"
    if found := re.match(r"Error parsing (--[\w.-]+): .*?(['\"\[].*)", message):
        form = re.search(rf"^{found[1]} (.+)", rest, re.MULTILINE)
        accepted = NUMBERS.get(form[1], form[1]) if form else "what --help shows"
        return f"{found[1]}: {found[2].strip('[]')} is not valid; accepted: {accepted}"
    if found := re.match("Missing value for argument '(--.*?)'", message):
        return f"{found[1]}: missing value; accepted: {found[1]} VALUE"
    if found := re.match(r"invalid choice (.*) for argument '(.*?)'\. Expected (?:one of )?\(?(.*?)\)?$", message):
        return f"{found[2]}: unknown {found[1]}; accepted: {found[3]}"
    return message
