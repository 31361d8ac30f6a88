"""The command ``resources``."""

import json

from rich.console import Console

from lwfedssl_jax.analysis import run_plots, terminal
from lwfedssl_jax.cli.options import ResourcesOptions, check_plot
from lwfedssl_jax.cli.status import shown_status
from lwfedssl_jax.config import Config, override, resolve, to_dict
from lwfedssl_jax.costs import ledger, privacy, traffic
from lwfedssl_jax.costs.operations import stage_parts
from lwfedssl_jax.experiment.checks import check
from lwfedssl_jax.method.stages import ADAPTIVE_COSTS, STRATEGIES, alike, even_rounds, rounds_fit
from lwfedssl_jax.system import devices


def privacy_of(strategies: dict[str, ledger.Ledger], configs: dict[str, Config]) -> dict[str, privacy.Promise]:
    """Return what each strategy promises, if updates are clipped and all clients can take part; else nothing."""
    if not all(config.privacy.clip and not config.fleet.devices for config in configs.values()):
        return {}
    return {
        name: privacy.promise(configs[name], [part.stage for part in stage_parts(configs[name])], cost["per_stage"])
        for name, cost in strategies.items()
    }


def run_resources(options: ResourcesOptions) -> None:
    """Print what one client spends under each strategy on standard output."""
    config = resolve(options.config)
    check_plot(options.plot)
    devices.set_up_cache(options.compilation_cache)
    devices.check_platform()
    check(config)
    configs, refused = ledger.each_strategy(config)
    by_name = {name: override(config, {"strategy.name": name}) for name in STRATEGIES if name not in refused}
    evenly = [name for name, strategy_config in by_name.items() if not rounds_fit(strategy_config)]
    with shown_status("tracing") as show:
        strategies = ledger.all_strategies(config, memory=options.memory, notify=lambda what: show(f"compiling {what}"))
    private = privacy_of(strategies, configs)
    if options.plot:
        run_plots.plot_resources(strategies, config.federation.local_epochs, options.plot)
    if options.json:
        plain = {
            "config": to_dict(config),
            "bytes_per_parameter": traffic.BYTES_PER_PARAMETER,
            "strategies": strategies,
            "refused": refused,
            **({"privacy": private} if private else {}),
        }
        print(json.dumps(plain, indent=1))
    else:
        out = Console()
        out.print(terminal.resource_table(strategies))
        if private:
            out.print(terminal.privacy_lines(private), markup=False)
        if config.strategy.pacing == "adaptive":
            out.print(ADAPTIVE_COSTS, markup=False)
        if config.privacy.clip and config.fleet.devices:
            out.print("What is promised to clients depends on which devices can take part: `plan` says it for a fleet.")
        if same := alike(config):
            out.print(same, markup=False)
        if evenly:
            out.print(even_rounds(config, evenly), markup=False)
        for name, why in refused.items():
            out.print(f"{name} cannot run with this config: {why}", markup=False)
