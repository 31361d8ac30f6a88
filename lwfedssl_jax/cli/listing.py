"""The command ``list``: the configs and sweeps that exist."""

import fnmatch
import itertools
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from lwfedssl_jax.config import ConfigError, available


def matching(patterns: Sequence[str]) -> list[tuple[str, str]]:
    """Return the name and the first line of each config or sweep whose name contains, or matches, a pattern.

    Raises:
      ConfigError: there is none.
    """
    known = available()
    if not all(patterns):
        raise ConfigError("list: '' is empty; accepted: a part of a name, or no pattern at all")
    found = [
        (name, line)
        for name, line in known
        if not patterns or any(pattern in name or fnmatch.fnmatch(name, pattern) for pattern in patterns)
    ]
    if not found:
        groups = dict.fromkeys(name.rpartition("/")[0] or name for name, _ in known)
        raise ConfigError(
            f"list: nothing matches {patterns[0]!r}; accepted: a part of a name, such as {', '.join(groups)}"
        )
    return found


def print_list(patterns: Sequence[str]) -> None:
    """Print a line for each config; on a terminal in groups, and within its width.

    Raises:
      ConfigError: no name matches the patterns.
    """
    found, console = matching(patterns), Console(highlight=False)
    width = max(len(name) for name, _ in found)
    if not console.is_terminal:
        for name, line in found:
            print(f"{name:<{width}}  {line}")
        return
    for group, entries in itertools.groupby(found, lambda entry: entry[0].rpartition("/")[0]):
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, min_width=width)
        table.add_column()
        for name, line in entries:
            table.add_row(name, line)
        console.print(f"\n[bold]{group or 'to begin with'}[/bold]")
        console.print(table, markup=False)
