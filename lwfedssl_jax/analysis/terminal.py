"""Tables for a terminal."""

from typing import TYPE_CHECKING, Any

import rich.table
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from lwfedssl_jax.analysis.wording import MIB, percent_text, protocol_words, settings_words
from lwfedssl_jax.costs import fleet

if TYPE_CHECKING:
    import pandas as pd


def summary_tables(summary: dict[str, Any]) -> Group:
    """A finished run as two tables: accuracies against the untrained encoder, costs against the other strategies.

    Below them who of a fleet took part. Fine-tuning stands against training from scratch, which is fine-tuning the
    untrained encoder.
    """
    accuracy = Table(title=f"Encoder after {summary['rounds']} rounds of {summary['strategy']}")
    accuracy.add_column("protocol")
    accuracy.add_column("untrained %", justify="right")
    accuracy.add_column("trained %", justify="right")
    accuracy.add_column("settings")
    for protocol, result in summary["evaluation"].items():
        baselines = summary["baselines"]
        if protocol in baselines["untrained"]:
            untrained = percent_text(baselines["untrained"][protocol])
        else:
            untrained = f"{percent_text(baselines['scratch'][protocol])} (scratch)"
        accuracy.add_row(protocol_words(protocol), untrained, percent_text(result), settings_words(result))
    tables = [accuracy] if summary["evaluation"] else []
    tables.append(resource_table(summary["strategies"], summary["strategy"]))
    if "fleet" not in summary:
        return Group(*tables)
    return Group(*tables, escape(fleet.fleet_line(summary["fleet"], len(summary["resources"]["per_stage"]))))


def resource_table(strategies: dict[str, Any], chosen: str = "") -> Table:
    """What each strategy costs one client over the whole run, and beside it the ratio to end_to_end."""
    table = Table(title="What one client spends over the whole run (x: against the first column)")
    table.add_column("")
    for name in strategies:
        table.add_column(f"[bold]{name}[/]" if name == chosen else name, justify="right")
    for label, key, unit, scale in (
        ("traffic, both directions", "total_bytes", "MiB", MIB),
        ("traffic, worst case", "worst_case_total_bytes", "MiB", MIB),
        ("multiply-adds a sample, paper's rule", "flops_paper_rule", "G", 1e9),
        ("multiply-adds a sample, executed", "flops_executed", "G", 1e9),
        ("besides: multiply-adds of the server", "server_flops_executed", "G", 1e9),
        ("kept on a client between rounds", "client_state_bytes", "MiB", MIB),
        ("peak memory of a training step", "peak_memory_bytes", "MiB", MIB),
    ):
        values = [ledger[key] for ledger in strategies.values()]
        if None not in values and any(values):
            table.add_row(label, *[f"{v / scale:,.4g} {unit} ({v / values[0]:.2f}x)" for v in values])
    return table


def rich_table(words: "pd.DataFrame") -> rich.table.Table:
    """A settings table for a terminal: of the protocols the first, and what fits beside it."""
    accuracies = [name for name in words.columns if name.endswith("(%)")]
    names = [name for name in words.columns if name not in (*accuracies[1:], "seeds", "training (s)")]
    shown = rich.table.Table()
    for name in names:
        shown.add_column(escape(name), justify="left" if name == "setting" else "right", overflow="fold")
    for row in words[names].itertuples(index=False, name=None):
        shown.add_row(*map(escape, row))
    return shown
