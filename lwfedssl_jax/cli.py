"""The command line: parse, dispatch, one line for bad input."""

import contextlib
import difflib
import hashlib
import io
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from rich.console import Console

from lwfedssl_jax import config as configs
from lwfedssl_jax import fleet
from lwfedssl_jax.config import Config, ConfigError
from lwfedssl_jax.errors import FailedRunsError, foreseen
from lwfedssl_jax.interrupts import Interrupts

USAGE = "usage: python run.py [COMMAND ...]; without a command: train quickstart"
HELP = ("-h", "--help")
PICTURES = (".png", ".pdf", ".svg")
MOST_JOBS = 1024
EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_INTERRUPTED = 2, 1, 130


@dataclass(frozen=True)
class Train:
    """Train, evaluate and write the work directory; continues an unfinished run of the same config."""

    config_name: tyro.conf.Positional[str]
    """CONFIG: a name that `list` shows, or a path to a Python file of the same form."""
    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]  # --section.field VALUE, always
    workdir: Path | None = None
    """Where the run lives; by default runs/CONFIG-HASH, one directory for each config and overrides."""
    compilation_cache: str | None = None
    """Folder for compiled programs, or off; by default $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    coordinator: str | None = None
    """Several processes: HOST:PORT of process 0, or auto where JAX finds the others by itself (SLURM, TPU pods)."""
    processes: int | None = None
    """Several processes: how many there are."""
    process: int | None = None
    """Several processes: which one this is, from 0."""


@dataclass(frozen=True)
class Resources:
    """What one client spends under each strategy in traffic, operations and memory; trains nothing."""

    config_name: tyro.conf.Positional[str]
    """CONFIG: a name that `list` shows, or a path to a Python file of the same form."""
    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]  # --section.field VALUE, always
    json: bool = False
    """Print JSON instead of a table."""
    plot: Path | None = None
    """Also draw it, over the rounds and over numbers of local epochs: a file that ends in .png, .pdf or .svg."""
    memory: bool = True
    """Compile one client's training step of each stage to learn its peak memory."""
    compilation_cache: str | None = None
    """Folder for compiled programs, or off; by default $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""


@dataclass(frozen=True)
class Plan:
    """Which strategy and how many layers a stage a fleet of devices can afford; trains nothing."""

    config_name: tyro.conf.Positional[str]
    """CONFIG: a name that `list` shows, or a path to a Python file of the same form."""
    config: Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]  # --section.field VALUE, always
    memory_gb: float | None = None
    """One kind of device: memory that training may take, in GB (1e9 bytes)."""
    gflops: float | None = None
    """With --memory-gb: 1e9 floating-point operations a second, sustained; a multiply-add is two. Without it, or a
    link's speed, no time is told."""
    uplink_mbps: float | None = None
    """With --memory-gb: from the device, in 1e6 bit/s."""
    downlink_mbps: float | None = None
    """With --memory-gb: to the device, in 1e6 bit/s."""
    watts: float | None = None
    """With --memory-gb: drawn while it trains and exchanges; tells energy."""
    devices: Path | None = None
    """Instead, several kinds: a CSV file with the columns name, count, memory_gb, and those of the others above that
    are known. Without --memory-gb and --devices those of the config: fleet.devices."""
    examples: int | None = None
    """Images that a client has, where the data set does not tell without being read."""
    results: Path | None = None
    """Runs, such as a sweep's directory: the accuracy that each option reached."""
    protocol: str | None = None
    """With --results: which protocol's accuracy, such as knn; by default the one that has judged most of
    them."""
    json: bool = False
    """Print JSON instead of a table."""
    plot: Path | None = None
    """Also draw memory and the share of the fleet over the stages: a file that ends in .png, .pdf or .svg."""
    compilation_cache: str | None = None
    """Folder for compiled programs, or off; by default $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""


@dataclass(frozen=True)
class Sweep:
    """Run a grid of configs and seeds, or what is left of it, and report it."""

    sweep_name: tyro.conf.Positional[str]
    """SWEEP: a name of configs/sweeps, or a path to a Python file of the same form."""
    workdir: Path | None = None
    """Where the sweep lives; by default runs/sweeps/SWEEP."""
    dry_run: bool = False
    """Only list the runs, their operations and the time they should take here."""
    jobs: int = 1
    """Processes that do runs at the same time, each with a share of the cores, or with a GPU."""
    together: int = 0
    """Runs that differ in numbers and seeds only, in one program side by side; 0: as many as pay off on the device."""
    compilation_cache: str | None = None
    """Folder for compiled programs, or off; by default $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""


@dataclass(frozen=True)
class Report:
    """One HTML page, figures and tables about one or several runs."""

    directories: tyro.conf.Positional[tuple[Path, ...]]
    """DIR: a run's work directory, or one with runs below it, such as a sweep's."""
    out: Path | None = None
    """Where report.html, plots/ and tables/ go; by default DIR, and for several the folder `report`."""


Options = TypeVar("Options", Train, Resources, Plan)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
      0; 2 for bad input, after one line on standard error; 1 for any other failure; 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv) or ["train", "quickstart"]
    try:
        if argv[0] in HELP or (argv[0] == "list" and argv[-1] in HELP):
            print_help()
        elif argv[0] in COMMANDS:
            COMMANDS[argv[0]](argv[1:])
        else:
            close = difflib.get_close_matches(argv[0], COMMANDS) or COMMANDS
            raise ConfigError(f"COMMAND: unknown {argv[0]!r}; accepted: {', '.join(close)}")
    except SystemExit:  # tyro's way out of --help
        return 0
    except BrokenPipeError:  # whoever read the output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's last flush
    except (Exception, KeyboardInterrupt) as error:
        return explain(error)
    return 0


def explain(error: BaseException) -> int:
    """Print what went wrong, in one line if it was foreseen, and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    if line := foreseen(error):
        print(f"error: {line}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return EXIT_BAD_INPUT if isinstance(error, ConfigError) else EXIT_FAILURE


def train(arguments: list[str]) -> None:
    """The ``train`` command."""
    with Interrupts() as interrupts:  # experiment.train has its own
        options = parse(Train, arguments)
        from lwfedssl_jax import experiment  # noqa: F401  (takes seconds)

        interrupts.check()
        train_as_told(options, arguments)


def train_as_told(options: Train, arguments: list[str]) -> None:
    """``train`` in this process, which may be one of several."""
    from lwfedssl_jax import devices, experiment

    config = configs.resolve(options.config)
    devices.set_up_cpu()
    devices.set_up_cache(options.compilation_cache)
    devices.connect(options.coordinator, options.processes, options.process)
    try:
        if devices.is_first_process():
            train_and_print(config, arguments, options.workdir)
        else:
            experiment.train(config, workdir=None)
    except (Exception, KeyboardInterrupt) as error:
        if devices.is_one_of_several():
            devices.leave(explain(error))
        raise


def train_and_print(config: Config, arguments: Sequence[str], path: Path | None) -> None:
    """What the words after ``train`` ask for, with progress on standard error and the summary on standard output."""
    from lwfedssl_jax import experiment, report
    from lwfedssl_jax.progress import ConsoleProgress
    from lwfedssl_jax.workdir import WorkDir

    name = arguments[0]
    # A file of the user's own may hold more than values, such as an objective.
    code = hashlib.sha256(Path(name).read_bytes()).hexdigest() if name.endswith(".py") else ""
    path = path or default_workdir(name, config, code)
    workdir, out = WorkDir(path, config, code, command=arguments), Console()
    if workdir.summary is not None:
        experiment.train(config, workdir)
        out.print(f"{path} holds this run, finished; this is its summary (--workdir DIR starts another)")
        out.print(report.summary_tables(workdir.summary))
        return
    began = time.monotonic()
    with ConsoleProgress(Console(stderr=True)) as listener:
        summary = experiment.train(config, workdir, listener)
    out.print(report.summary_tables(summary))
    out.print(
        f"{summary['seconds']:.0f} s of training, {time.monotonic() - began:.0f} s since this command began; "
        f"metrics, plots and encoder are in {path}"
    )


def resources(arguments: list[str]) -> None:
    """The ``resources`` command."""
    options = parse(Resources, arguments)
    from lwfedssl_jax import devices, report
    from lwfedssl_jax import resources as ledgers
    from lwfedssl_jax.checks import check

    config = configs.resolve(options.config)
    check_plot(options.plot)
    devices.set_up_cache(options.compilation_cache)
    check(config)
    _, refused = ledgers.each_strategy(config)
    progress = Console(stderr=True)
    with progress.status("tracing") as status:
        strategies = ledgers.all_strategies(
            config, memory=options.memory, notify=lambda what: status.update(f"compiling {what}")
        )
    if options.plot:
        report.plot_resources(strategies, config.federation.local_epochs, options.plot)
    if options.json:
        plain = {
            "config": configs.to_dict(config),
            "bytes_per_parameter": ledgers.BYTES_PER_PARAMETER,
            "strategies": strategies,
            "refused": refused,
        }
        print(json.dumps(plain, indent=1))
    else:
        out = Console()
        out.print(report.resource_table(strategies))
        for name, why in refused.items():
            out.print(f"{name} cannot run with this config: {why}", markup=False)


def plan(arguments: list[str]) -> None:
    """The ``plan`` command."""
    options = parse(Plan, arguments)
    config = configs.resolve(with_fleet(options))
    from lwfedssl_jax import devices, report
    from lwfedssl_jax import plan as plans

    check_plot(options.plot)
    if options.protocol is not None and options.results is None:
        raise ConfigError("--protocol: it belongs to --results; accepted: both, or none")
    examples = plans.examples_of_a_client(config, options.examples)
    measured = plans.NO_RESULTS
    if options.results:
        from lwfedssl_jax.results import load_results

        try:
            rows = load_results(options.results).to_dict("records")
        except ConfigError as error:  # it names DIR, as `report` has it
            raise ConfigError(f"--results: {str(error).removeprefix('DIR: ')}") from None
        measured = plans.measured_accuracies(config, rows, options.protocol)
    plans.each_option(config)
    devices.set_up_cache(options.compilation_cache)
    with Console(stderr=True).status("tracing") as status:
        notify = lambda what: status.update(f"compiling {what}")  # noqa: E731
        made = plans.make_plan(config, examples, measured, notify)
    if options.plot:
        report.plot_plan(made.devices, made.options, measured.protocol, options.plot)
    if options.json:
        print(json.dumps(plans.to_plain(made), indent=1))
    else:
        out = Console(highlight=False)
        out.print(plans.table(made, out.width))


def with_fleet(options: Plan) -> Config:
    """The config with the devices that the options describe, else with its own.

    Raises:
      ConfigError: they describe none, or two fleets.
    """
    one = {field: value for field in fleet.QUANTITIES if (value := getattr(options, field)) is not None}
    if options.devices and one:
        raise ConfigError(f"--devices: {options.devices} besides --memory-gb or its like; accepted: one of the two")
    if one and options.memory_gb is None:
        raise ConfigError(f"--memory-gb: nothing besides --{next(iter(one)).replace('_', '-')}; accepted: GB")
    if not (one or options.devices or options.config.fleet.devices):
        raise ConfigError(
            "--memory-gb: nothing; accepted: --memory-gb X --gflops X --uplink-mbps X --downlink-mbps X, "
            "--devices FILE.csv, or a config with fleet.devices"
        )
    for field, value in one.items():
        if not fleet.LEAST <= value <= fleet.MOST:
            accepted = f"accepted: {fleet.LEAST:g} to {fleet.MOST:g}"
            raise ConfigError(f"--{field.replace('_', '-')}: {value} is out of range; {accepted}")
    try:
        classes = fleet.read_csv(options.devices) if options.devices else []
    except ValueError as error:
        raise ConfigError(f"--devices: {error}") from None
    if one:
        classes = [fleet.DeviceClass("device", 1, **one)]
    changes = {"fleet.devices": tuple(map(fleet.describe, classes))} if classes else {}
    return configs.override(options.config, changes)


def check_plot(path: Path | None) -> None:
    """Refuse a picture that cannot be drawn.

    Raises:
      ConfigError: it cannot.
    """
    if path and not can_draw(path):
        raise ConfigError(
            f"--plot: {path} cannot be drawn; accepted: a file in an existing folder that you can write to, "
            f"that ends in {', '.join(PICTURES)}"
        )


def sweep(arguments: list[str]) -> None:
    """The ``sweep`` command."""
    with Interrupts():
        sweep_as_told(parse_sweep(arguments))


def parse_sweep(arguments: list[str]) -> Sweep:
    """The options of ``sweep``.

    Raises:
      ConfigError: no SWEEP, an unknown option, or a value that is empty or does not parse.
      SystemExit: after ``--help``.
    """
    check_not_empty(arguments, "SWEEP")
    if not any(word in arguments for word in HELP) and (not arguments or arguments[0].startswith("-")):
        found = repr(arguments[0]) if arguments else "nothing"
        raise ConfigError(
            f"SWEEP: sweep needs one first, found {found}; accepted: a name of configs/sweeps, or a .py file"
        )
    with refusals_in_one_line():
        options = tyro.cli(Sweep, prog="run.py sweep", args=arguments)
    for name, least in (("jobs", 1), ("together", 0)):
        if not least <= (value := getattr(options, name)) <= MOST_JOBS:
            raise ConfigError(f"--{name}: {value} is out of range; accepted: {least} to {MOST_JOBS}")
    return options


def sweep_as_told(options: Sweep) -> None:
    """Have a sweep's runs done by workers, with progress on standard error, and report them."""
    import jax

    from lwfedssl_jax import devices
    from lwfedssl_jax import sweep as sweeps
    from lwfedssl_jax.client import program_config
    from lwfedssl_jax.progress import SweepProgress, estimates_table
    from lwfedssl_jax.simulate import Shared
    from lwfedssl_jax.workers import Pool

    devices.set_up_cpu()
    if not options.dry_run:
        jax.config.update("jax_platforms", "cpu")  # accelerators are the workers'
    asked = sweeps.load_sweep(options.sweep_name)
    path, runs = options.workdir or Path("runs") / "sweeps" / asked.name, asked.runs
    directory = sweeps.SweepDirectory(path, asked)
    devices.set_up_cache(options.compilation_cache)
    finished = {run.directory for run in runs if directory.is_finished(run)}
    shared, progress = Shared(), Console(stderr=True)
    if options.dry_run:
        with progress.status("tracing, and timing a step of each kind of run"):
            estimates = sweeps.estimate(runs, shared)
        Console().print(estimates_table(runs, estimates, finished))
        return
    directory.take()
    failed: dict[str, str] = {}
    try:
        with progress.status("tracing"):
            costs = {run.directory: sweeps.round_costs(run.config, shared) for run in runs}
        with SweepProgress(progress, runs, costs, finished) as table:

            def hear(run: sweeps.SweepRun, event: dict[str, Any]) -> None:
                table.hear(run, event)
                if event["event"] == "failed":
                    failed[f"{run.label}, seed {run.seed}"] = event["why"]
                    directory.fail(run.directory, event["why"])

            request = {
                "path": str(path), "sweep": options.sweep_name, "cache": options.compilation_cache,
                "together": options.together,
            }  # fmt: skip
            groups = {run.directory: program_config(run.config) for run in runs}
            Pool(request, groups, options.jobs, hear).run([run for run in runs if run.directory not in finished])
        write_and_print_report([path], path)
    finally:
        directory.close()
    if failed:
        reasons: dict[str, list[str]] = {}
        for run, why in failed.items():
            reasons.setdefault(why, []).append(run)
        text = "; ".join(f"{why} ({' | '.join(of_why)})" for why, of_why in reasons.items())
        raise FailedRunsError(f"{len(failed)} of {len(runs)} runs failed, which the same command tries again: {text}")


def report_runs(arguments: list[str]) -> None:
    """The ``report`` command."""
    check_not_empty(arguments, "DIR")
    with refusals_in_one_line():
        options = tyro.cli(Report, prog="run.py report", args=arguments)
    if not options.directories:
        raise ConfigError("DIR: report needs one first, found nothing; accepted: a directory with runs")
    out = options.out or (options.directories[0] if len(options.directories) == 1 else Path("report"))
    try:
        write_and_print_report(options.directories, out)
    except OSError as error:
        raise ConfigError(
            f"--out: {out} cannot be written ({error.strerror or error}); accepted: a directory you can write to"
        ) from error


def write_and_print_report(directories: Sequence[Path], out: Path) -> None:
    """The page, and on standard output its table of settings, what it leaves out, and where it is."""
    from lwfedssl_jax import comparison, page, results, tables

    found, written = results.load_results(*directories), page.write_report(directories, out)
    console = Console()
    runs, settings = comparison.settle(found)
    if settings:
        console.print(tables.rich_table(tables.settings_table(runs, settings).words))
    for name, why in zip(found["name"], found["fault"], strict=True):
        if why:
            console.print(f"left out: {name}: {why}", markup=False, highlight=False, soft_wrap=True)
    console.print(written, markup=False, highlight=False, soft_wrap=True)


def can_draw(path: Path) -> bool:
    """Whether a picture can be written there."""
    from lwfedssl_jax.devices import can_hold

    if path.suffix not in PICTURES or os.path.isdir(path) or not os.path.isdir(path.parent):
        return False
    return os.access(path, os.W_OK) if os.path.isfile(path) else can_hold(path)


def list_configs(arguments: list[str]) -> None:
    """The ``list`` command."""
    if arguments:
        raise ConfigError(f"list: unexpected {arguments[0]!r}; accepted: nothing after `list`")
    known = configs.available()
    width = max((len(name) for name, _ in known), default=0)
    for name, line in known:
        print(f"{name:<{width}}  {line}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train,
    "resources": resources,
    "plan": plan,
    "sweep": sweep,
    "report": report_runs,
    "list": list_configs,
}


def print_help() -> None:
    """What the program is and the commands it has."""
    print("Federated self-supervised learning, layer by layer: LW-FedSSL, Prog-FedSSL and end to end.\n")
    print(USAGE + "\n")
    print("  train CONFIG [--section.field VALUE ...] [--workdir DIR]")
    print("      train, evaluate, write the work directory; continues an unfinished run")
    print("  resources CONFIG [--section.field VALUE ...] [--json] [--no-memory] [--plot FILE.png]")
    print("      what one client spends under each strategy; trains nothing")
    print("  plan CONFIG [--section.field VALUE ...] --memory-gb X --gflops X --uplink-mbps X --downlink-mbps X")
    print("       [--watts X] | --devices FLEET.csv [--results DIR] [--json] [--plot FILE.png]")
    print("      which strategy and how many layers a stage a fleet can afford; trains nothing")
    print("  sweep SWEEP [--workdir DIR] [--dry-run] [--jobs N] [--together N]")
    print("      a grid of configs and seeds, and its report; continues an unfinished sweep")
    print("  report DIR [DIR ...] [--out OUT]")
    print("      one page, figures and tables about all runs in these directories")
    print("  list")
    print("      the configs that exist\n")
    print("`python run.py COMMAND --help` lists every option.")


def parse(options: type[Options], arguments: list[str]) -> Options:
    """Parse a command that starts with CONFIG: its values are the defaults that options override.

    Raises:
      ConfigError: no CONFIG, an unknown option or choice, or a value that is empty or does not parse.
      SystemExit: after ``--help``.
    """
    command = options.__name__.lower()
    if arguments and arguments[0] in HELP:
        arguments = ["quickstart", "--help"]
    if not arguments or arguments[0].startswith("-"):
        found = repr(arguments[0]) if arguments else "nothing"
        raise ConfigError(
            f"CONFIG: {command} needs one first, found {found}; accepted: a name that `list` shows, or a .py file"
        )
    check_not_empty(arguments)
    default = options(config_name=arguments[0], config=configs.load(arguments[0]))
    with refusals_in_one_line():
        return tyro.cli(options, prog=f"run.py {command}", args=arguments, default=default)


@contextlib.contextmanager
def refusals_in_one_line() -> Iterator[None]:
    """Turns the parser's refusals into ConfigErrors."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            yield
    except SystemExit as stop:
        if stop.code:
            raise ConfigError(one_line(errors.getvalue())) from None
        raise  # --help has been printed


def check_not_empty(arguments: list[str], first: str = "CONFIG") -> None:
    """Refuse empty values, which the parser would take; ``first`` is what stands before all options."""
    option = first
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            option = name
        if not argument or (name.startswith("--") and equals and not value):
            raise ConfigError(f"{option}: '' is empty; accepted: a value")


def one_line(box: str) -> str:
    """Tyro's framed message (title, message, help, between rules) as one line, with what it accepts."""
    lines = [line.strip("│╭╮╰╯ ") for line in box.splitlines()[1:]]
    ruled = [bool(line) and not line.strip("─-") for line in lines]
    start = 1 if ruled[0] else 0
    end = ruled.index(True, start) if True in ruled[start:] else len(lines)
    paragraph = lines[start : lines.index("", start, end) if "" in lines[start:end] else end]
    message = " ".join(paragraph).rstrip(".")
    if message.startswith("Unrecognized"):
        suggested = dict.fromkeys(re.findall(r"^--[a-z][\w.-]*", "\n".join(lines[end:]), re.MULTILINE))
        return f"{message}; accepted: {', '.join(suggested) or 'the options --help lists'}"
    if message.startswith("Error parsing"):
        usage = next((line for line in lines[end:] if re.match("--[a-z]", line)), "what --help says")
        return f"{message}; accepted: {usage}"
    return re.sub(r"\. Expected (one of )?", "; accepted: ", message)


def default_workdir(name: str, config: Config, code: str = "") -> Path:
    """``runs/CONFIG-HASH``: another seed or override is another directory, the same command the same one."""
    stem = Path(name).with_suffix("").name if name.endswith(".py") else name
    return Path("runs") / f"{stem}-{configs.digest(config, code)}"
