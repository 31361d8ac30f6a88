"""The command ``plan``."""

import json

from rich.console import Console

from lwfedssl_jax.analysis.results import load_results
from lwfedssl_jax.cli.options import PlanOptions, check_plot, with_fleet
from lwfedssl_jax.cli.status import shown_status
from lwfedssl_jax.config import ConfigError, resolve
from lwfedssl_jax.plan.make import make_plan
from lwfedssl_jax.plan.measured import NO_RESULTS, measured_accuracies
from lwfedssl_jax.plan.options import each_option, examples_of_a_client
from lwfedssl_jax.plan.plot import plot_plan
from lwfedssl_jax.plan.show import table, to_plain
from lwfedssl_jax.system import devices


def run_plan(options: PlanOptions) -> None:
    """Run the plan and print it on standard output."""
    config = resolve(with_fleet(options))
    check_plot(options.plot)
    if options.protocol is not None and options.results is None:
        raise ConfigError(f"--protocol: {options.protocol} needs --results; accepted: both options, or neither")
    examples = examples_of_a_client(config, options.examples)
    results = NO_RESULTS
    if options.results:
        try:
            rows = load_results(options.results).to_dict("records")
        except ConfigError as error:  # the message names DIR, the argument of `report`
            raise ConfigError(f"--results: {str(error).removeprefix('DIR: ')}") from None
        results = measured_accuracies(config, rows, options.protocol)
    each_option(config)
    devices.set_up_cache(options.compilation_cache)
    with shown_status("tracing") as show:
        plan = make_plan(config, examples, results, lambda what: show(f"compiling {what}"))
    if options.plot:
        plot_plan(plan.devices, plan.options, results.protocol, options.plot)
    if options.json:
        print(json.dumps(to_plain(plan), indent=1))
    else:
        out = Console(highlight=False)
        out.print(table(plan, out.width))
