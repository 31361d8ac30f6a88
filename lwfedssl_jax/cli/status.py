"""What a command is doing while it prints nothing."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text


@contextlib.contextmanager
def shown_status(what: str, console: Console | None = None) -> Iterator[Callable[[str], None]]:
    """Show ``what`` a command is doing, until the next text: in one place on a terminal, otherwise in a line each.

    Args:
      what: the first text.
      console: by default, of standard error.
    """
    console = console or Console(stderr=True)

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if console.is_terminal:
        with console.status(Text(what)) as status:
            yield lambda text: status.update(Text(text))
    else:
        say(what)
        yield say
