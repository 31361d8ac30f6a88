"""The command ``plan``."""

import json

from rich.console import Console

from lwfedssl_jax.analysis.results import load_results
from lwfedssl_jax.cli.options import PlanOptions, check_plot, with_fleet
from lwfedssl_jax.cli.status import shown_status
from lwfedssl_jax.config import Config, ConfigError, choose, device_classes, resolve
from lwfedssl_jax.method.stages import STRATEGIES
from lwfedssl_jax.plan.clients import make_clients
from lwfedssl_jax.plan.make import make_plan
from lwfedssl_jax.plan.measured import NO_RESULTS, Results, measured_accuracies
from lwfedssl_jax.plan.options import each_option
from lwfedssl_jax.plan.page import PAGE, write_page
from lwfedssl_jax.plan.plot import plot_plan
from lwfedssl_jax.plan.privacy import asked_of
from lwfedssl_jax.plan.recommend import Aim
from lwfedssl_jax.plan.show import table, to_plain
from lwfedssl_jax.system import devices
from lwfedssl_jax.system.files import can_write


def run_plan(options: PlanOptions, command: list[str]) -> None:
    """Run the plan and print it on standard output.

    Args:
      options: parsed.
      command: the words that they were parsed from.
    """
    config = resolve(with_fleet(options))
    choose("strategy.name", config.strategy.name, STRATEGIES)  # all are compared, but a misspelt one is a mistake
    check_plot(options.plot)
    if options.out and not can_write(options.out):
        raise ConfigError(f"--out: {options.out} cannot be written; accepted: a folder that you can write to")
    aim, results = aim_of(options), read_results(options, config)
    asked = asked_of(config, options.epsilon, options.delta)
    each_option(config)
    say = Console(stderr=True).print  # only where data must be decoded
    clients = make_clients(
        config, device_classes(config), options.examples, lambda text: say(text, markup=False, highlight=False)
    )
    devices.set_up_cache(options.compilation_cache)
    devices.check_platform()
    with shown_status("tracing") as show:
        plan = make_plan(config, clients, results, aim, asked, lambda what: show(f"compiling {what}"))
    if options.plot:
        plot_plan(plan, options.plot)
    if options.out:
        write_page(plan, options.out, command)
    if options.json:
        print(json.dumps(to_plain(plan), indent=1))
    else:
        out = Console(highlight=False)
        out.print(table(plan, out.width))
        if options.out:
            out.print(str(options.out / PAGE), markup=False, soft_wrap=True)


def aim_of(options: PlanOptions) -> Aim:
    """Return what the recommendation puts first.

    Raises:
      ConfigError: the options ask for two things.
    """
    if options.accuracy_first and options.cheapest:
        raise ConfigError("--cheapest: cannot be combined with --accuracy-first; accepted: one of them, or neither")
    return "accuracy" if options.accuracy_first else "cheapest" if options.cheapest else "devices"


def read_results(options: PlanOptions, config: Config) -> Results:
    """Read the accuracies of ``--results``, if it is given.

    Raises:
      ConfigError: the folder has no runs like the config, or ``--protocol`` is given without it.
    """
    if options.results is None:
        if options.protocol is not None:
            raise ConfigError(f"--protocol: {options.protocol} needs --results; accepted: both options, or neither")
        return NO_RESULTS
    try:
        rows = load_results(options.results).to_dict("records")
    except ConfigError as error:  # the message names DIR, the argument of `report`
        raise ConfigError(f"--results: {str(error).removeprefix('DIR: ')}") from None
    return measured_accuracies(config, rows, options.protocol)
