"""Shows tables on a terminal."""

from typing import Any

import pandas as pd
import rich.table
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from lwfedssl_jax.analysis.results import all_results
from lwfedssl_jax.analysis.wording import MIB, UNKNOWN, accuracy_words, protocol_words, settings_words, short_number
from lwfedssl_jax.config.protocols import NOISE_ONLY
from lwfedssl_jax.costs import fleet


def summary_tables(summary: dict[str, Any]) -> Group:
    """Show a finished run: a table of its accuracies and those of the untrained encoder, a table of costs by strategy.

    Fine-tuning is compared with training from scratch, which is fine-tuning of the untrained encoder. A line below
    says which device classes of a fleet took part.
    """
    accuracy = Table(title=f"Encoder after {summary['rounds']} rounds of {summary['strategy']}")
    accuracy.add_column("protocol")
    accuracy.add_column("untrained %", justify="right")
    accuracy.add_column("trained %", justify="right")
    accuracy.add_column("settings")
    results, noise = all_results(summary), summary["baselines"].get(NOISE_ONLY, {})
    if noise:
        accuracy.add_column("noise only %", justify="right")
    for protocol, result in results.items():
        baselines = summary["baselines"]
        if protocol in baselines["untrained"]:
            untrained = accuracy_words(baselines["untrained"][protocol])
        else:
            untrained = f"{accuracy_words(baselines['scratch'][protocol])} (scratch)"
        row = [protocol_words(protocol), untrained, accuracy_words(result), settings_words(result)]
        if noise:
            row.append(accuracy_words(noise[protocol]) if protocol in noise else UNKNOWN)
        accuracy.add_row(*row)
    tables: list[Any] = [accuracy] if results else []
    tables.append(resource_table(summary["strategies"], summary["strategy"]))
    if "privacy" in summary:
        audit = summary["privacy"].get("audit")
        tables += [escape(promise["says"]) for promise in (summary["privacy"], audit) if promise]
    if "fleet" in summary:
        tables.append(escape(fleet.fleet_line(summary["fleet"], len(summary["resources"]["per_stage"]))))
    return Group(*tables)


def resource_table(strategies: dict[str, Any], chosen: str = "") -> Table:
    """Show what each strategy costs one client over the whole run, with the ratio to the first one.

    Args:
      strategies: ledgers by strategy; costs that they do not know are left out.
      chosen: the strategy whose name is printed in bold.
    """
    table = Table(title="What one client spends over the whole run (x: relative to the first column)")
    table.add_column("")
    for name in strategies:
        table.add_column(f"[bold]{name}[/]" if name == chosen else name, justify="right")
    for label, key, unit, scale in (
        ("traffic, both directions", "total_bytes", "MiB", MIB),
        ("traffic, worst case", "worst_case_total_bytes", "MiB", MIB),
        ("multiply-adds per sample, paper's rule", "flops_paper_rule", "G", 1e9),
        ("multiply-adds per sample, executed", "flops_executed", "G", 1e9),
        ("in addition: multiply-adds of the server", "server_flops_executed", "G", 1e9),
        ("kept on a client between rounds", "client_state_bytes", "MiB", MIB),
        ("peak memory of a training step", "peak_memory_bytes", "MiB", MIB),
    ):
        values = [ledger.get(key) for ledger in strategies.values()]
        if None not in values and any(values):
            ratios = [f" ({v / values[0]:.2f}x)" if values[0] else "" for v in values]
            table.add_row(label, *[f"{v / scale:,.4g} {unit}{ratio}" for v, ratio in zip(values, ratios, strict=True)])
    return table


def privacy_lines(promises: dict[str, Any]) -> str:
    """Say what strategies promise, all the same without a fleet, and how a round's noise compares with the clip.

    Args:
      promises: by strategy (``costs.privacy.Promise``).
    """
    first = next(iter(promises.values()))
    if not first["noise_multiplier"]:
        return str(first["says"])
    ratios = {name: max(s["noise_over_clip"] for s in promise["per_stage"]) for name, promise in promises.items()}
    clients = {name: short_number(ratio * first["cohort"]) for name, ratio in ratios.items()}
    found = "; ".join(f"{name} {short_number(ratio)} ({clients[name]} clients)" for name, ratio in ratios.items())
    return (
        f"{first['says']} Noise multiplier {first['noise_multiplier']:.3g}. Norm of a round's noise over the clip, in "
        f"the stage with most parameters, and how many clients a round, of a population as much larger, would take for "
        f"it to be 1: {found}."
    )


def rich_table(words: pd.DataFrame) -> rich.table.Table:
    """Show a settings table on a terminal: only the first protocol, and without seeds and training time."""
    accuracies = [name for name in words.columns if name.endswith("(%)")]
    names = [name for name in words.columns if name not in (*accuracies[1:], "seeds", "training (s)")]
    shown = rich.table.Table()
    for name in names:
        shown.add_column(escape(name), justify="left" if name == "setting" else "right", overflow="fold")
    for row in words[names].itertuples(index=False, name=None):
        shown.add_row(*map(escape, row))
    return shown
