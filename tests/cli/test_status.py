"""The status line, on a terminal and where there is none."""

import io

from rich.console import Console

from lwfedssl_jax.cli.status import shown_status


def shown(*, terminal: bool) -> str:
    out = io.StringIO()
    with shown_status("tracing", Console(file=out, force_terminal=terminal, width=80)) as show:
        show("compiling [red]2[/] lanes")
    return out.getvalue()


def test_without_a_terminal_each_text_is_a_line() -> None:
    assert shown(terminal=False) == "tracing\ncompiling [red]2[/] lanes\n"


def test_on_a_terminal_the_texts_take_one_line_that_goes_away() -> None:
    text = shown(terminal=True)
    assert "compiling [red]2[/] lanes\n" in text
    assert text.endswith("\x1b[2K")
    assert text.count("\n") == 1
