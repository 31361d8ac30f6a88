"""The command line: parses arguments, runs a command, and reports bad input in one line."""

import atexit
import difflib
import gc
import io
import os
import shutil
import sys
from collections.abc import Callable, Sequence

from lwfedssl_jax import __version__
from lwfedssl_jax.cli.options import (
    HELP,
    PlanOptions,
    ResourcesOptions,
    TrainOptions,
    parse,
    parse_embed,
    parse_new,
    parse_report,
    parse_sweep,
)
from lwfedssl_jax.config import ConfigError
from lwfedssl_jax.system.errors import report_error
from lwfedssl_jax.system.files import with_home
from lwfedssl_jax.system.interrupts import Interrupts
from lwfedssl_jax.system.program import program

# Each command parses its options before it imports the code that runs it: bad input and --help do not wait for JAX.


LEAST_WIDTH = 60  # of what is printed


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
      0; 2 for bad input, after one line on standard error; 1 for any other failure; 130 after Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv) or ["train", "quickstart"]
    gc.set_threshold(50_000, 20, 20)  # rarer searches: tracing makes many objects that stay
    atexit.register(gc.freeze)  # and none of all objects when the interpreter ends
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # what the terminal's encoding lacks is shown as a question mark
    if shutil.get_terminal_size().columns < LEAST_WIDTH:
        os.environ["COLUMNS"] = str(LEAST_WIDTH)  # lines are then broken by the terminal, not tables between letters
    try:
        argv = [expand_home(word) for word in argv]
        if argv[0] == "--version":
            print(f"lwfedssl_jax {__version__}")
        elif argv[0] in HELP or (argv[0] == "list" and argv[-1] in HELP):
            print_help()
        elif argv[0] in COMMANDS:
            COMMANDS[argv[0]](argv[1:])
        else:
            close = difflib.get_close_matches(argv[0], COMMANDS) or COMMANDS
            raise ConfigError(f"COMMAND: unknown {argv[0]!r}; accepted: {', '.join(close)}")
    except SystemExit:  # tyro raises this after --help
        return 0
    except BrokenPipeError:  # the reader of the output has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's last flush
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error)
    return 0


def expand_home(word: str) -> str:
    """Expand ``~`` where a shell does not: in ``--option=~/path``, and where it was quoted.

    Raises:
      ConfigError: there is no such home directory.
    """
    option = word.partition("=")[0] + "=" if word.startswith("--") and "=" in word else ""
    path = word.removeprefix(option)
    return f"{option}{with_home(path)}" if path.startswith("~") else word


def list_command(arguments: list[str]) -> None:
    """Run the ``list`` command."""
    from lwfedssl_jax.cli.listing import print_list

    print_list(arguments)


def completion_command(arguments: list[str]) -> None:
    """Run the ``completion`` command."""
    from lwfedssl_jax.cli.completion import print_completion

    print_completion(arguments[0] if len(arguments) == 1 else " ".join(arguments))


def train_command(arguments: list[str]) -> None:
    """Run the ``train`` command."""
    with Interrupts() as interrupts:  # experiment.train has its own
        options = parse(TrainOptions, arguments)
        from lwfedssl_jax.cli.train import run_train

        interrupts.check()
        run_train(options, arguments)


def resources_command(arguments: list[str]) -> None:
    """Run the ``resources`` command."""
    options = parse(ResourcesOptions, arguments)
    from lwfedssl_jax.cli.resources import run_resources

    run_resources(options)


def plan_command(arguments: list[str]) -> None:
    """Run the ``plan`` command."""
    options = parse(PlanOptions, arguments)
    from lwfedssl_jax.cli.plan import run_plan

    run_plan(options, arguments)


def sweep_command(arguments: list[str]) -> None:
    """Run the ``sweep`` command."""
    with Interrupts():
        options = parse_sweep(arguments)
        from lwfedssl_jax.cli.sweep import run_sweep

        run_sweep(options)


def report_command(arguments: list[str]) -> None:
    """Run the ``report`` command."""
    options = parse_report(arguments)
    from lwfedssl_jax.cli.report import run_report

    run_report(options)


def embed_command(arguments: list[str]) -> None:
    """Run the ``embed`` command."""
    options = parse_embed(arguments)
    from lwfedssl_jax.cli.embed import run_embed

    run_embed(options)


def new_command(arguments: list[str]) -> None:
    """Run the ``new`` command."""
    options = parse_new(arguments)
    from lwfedssl_jax.cli.new import run_new

    run_new(options)


def pilot_command(arguments: list[str]) -> None:
    """Run the ``pilot`` command."""
    from lwfedssl_jax.cli import pilot_options

    what, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if what in HELP:
        print("usage:", *PILOT, sep="\n  ")
        return
    with Interrupts():
        if what == "local":
            local = pilot_options.parse_local(rest)
            from lwfedssl_jax.cli.pilot import run_pilot_local

            run_pilot_local(local, rest)
        elif what == "server":
            server = pilot_options.parse_server(rest)
            from lwfedssl_jax.cli.pilot import run_pilot_server

            run_pilot_server(server, rest)
        elif what == "device":
            device = pilot_options.parse_device(rest)
            from lwfedssl_jax.cli.pilot_device import run_pilot_device

            run_pilot_device(device)
        elif what == "keys":
            keys = pilot_options.parse_keys(rest)
            from lwfedssl_jax.cli.pilot import run_pilot_keys

            run_pilot_keys(keys)
        elif what == "calibrate":
            directory = pilot_options.parse_calibrate(rest)
            from lwfedssl_jax.cli.pilot import run_pilot_calibrate

            run_pilot_calibrate(directory)
        else:
            raise ConfigError(f"pilot: unknown {what!r}; accepted: local, server, device, keys, calibrate")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train_command,
    "resources": resources_command,
    "plan": plan_command,
    "sweep": sweep_command,
    "report": report_command,
    "embed": embed_command,
    "new": new_command,
    "pilot": pilot_command,
    "list": list_command,
    "completion": completion_command,
}


PILOT = (
    "pilot local CONFIG [--devices N] [--workdir DIR] [--compare] [--tls]",
    "pilot server CONFIG --devices N [--workdir DIR] [--keys DIR] [--port N]",
    "pilot device HOST:PORT --data FOLDER [--name NAME] [--ca FILE --key FILE]",
    "pilot keys DIR --devices NAME [NAME ...] [--hosts HOST ...]",
    "pilot calibrate DIR",
)


def print_help() -> None:
    """Print what the program does and which commands it has."""
    print("Federated self-supervised learning, layer by layer: LW-FedSSL, Prog-FedSSL and end to end.\n")
    name = " ".join(program())
    print(f"usage: {name} [COMMAND ...]; without a command: train quickstart\n")
    print("  train CONFIG [--section.field VALUE ...] [--workdir DIR]")
    print("      train, evaluate, write the work directory; continues an unfinished run")
    print("  resources CONFIG [--section.field VALUE ...] [--json] [--no-memory] [--plot FILE.png]")
    print("      traffic, operations and memory of one client under each strategy, without training")
    print("  plan CONFIG [--section.field VALUE ...]")
    print("       --memory-gb X [--gflops X] [--uplink-mbps X] [--downlink-mbps X] [--watts X] | --devices FILE.csv")
    print("       [--examples N | p10=N p50=N ...] [--results DIR] [--protocol NAME] [--accuracy-first | --cheapest]")
    print("       [--epsilon X [--delta X]] [--json] [--out DIR] [--plot FILE.png]")
    print("      which strategy and how many layers per stage a fleet can afford, without training")
    print("  sweep SWEEP [--workdir DIR] [--dry-run] [--jobs N] [--together N] [--shard I/N] [--base CONFIG]")
    print("      a grid of configs and seeds, and its report; continues an unfinished sweep")
    print("  report DIR [DIR ...] [--out OUT]")
    print("      one page, figures and tables about all runs in these directories")
    print("  embed RUN IMAGES --out FILE.npz|FILE.csv [--config FILE.py]")
    print("      the features of your own images, from the encoder of a finished run")
    print("  new DIR")
    print("      a folder to begin your own work in: a config with an encoder, an objective and data of your own")
    for line in PILOT:
        print(f"  {line}")
    print("      the same rounds on real devices, or on processes of this machine")
    print("  list [PATTERN ...]")
    print("      the configs and sweeps that exist, or those whose names contain or match a pattern")
    print("  completion bash|zsh")
    print("      what a shell runs to complete commands and options\n")
    print(f"`{name} COMMAND --help` lists every option; `{name} --version` prints the version.")
