"""Tables on the terminal."""

from rich.console import Console

from lwfedssl_jax.analysis.terminal import resource_table


def test_costs_that_a_ledger_does_not_know_are_left_out_and_zero_has_no_ratio() -> None:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(resource_table({"end_to_end": {"client_state_bytes": 0}, "own": {"client_state_bytes": 2**20}}))
    (row,) = [line for line in capture.get().splitlines() if "MiB" in line]
    assert "kept on a client" in row
    assert "0 MiB" in row
    assert "1 MiB" in row
    assert "x)" not in row
