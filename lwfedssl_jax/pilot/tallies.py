"""What devices have exchanged with the server, by their own count of it."""

from dataclasses import dataclass
from typing import Any

from lwfedssl_jax.pilot.checks import check_counted
from lwfedssl_jax.pilot.journal import Journal
from lwfedssl_jax.pilot.protocol import Hello, Result
from lwfedssl_jax.pilot.relay import Counted


@dataclass
class Tally:
    """What a device has exchanged until it was last asked, and the line that lacks what its last upload took.

    Attributes:
      boot: of the device, as in ``Hello``.
      counted: as it says.
      down: bytes from the server since its last result.
      line: round, client and name of that upload; None if there is none.
    """

    boot: str
    counted: Counted
    down: int = 0
    line: dict[str, Any] | None = None


class Tallies:
    """The tallies of all devices; what an upload took is known, and written, when the device is heard of again.

    Args:
      journal: for that.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._of: dict[str, Tally] = {}

    def is_open(self, name: str) -> bool:
        """Whether what a device's last upload took is not known yet."""
        tally = self._of.get(name)
        return tally is not None and tally.line is not None

    def open(self, name: str, number: int, client: int) -> None:
        """Note that a device has just uploaded its update of a round."""
        if (tally := self._of.get(name)) and any(tally.counted):  # without a relay, nothing will be known
            tally.line = {"round": number, "client": client, "name": name}

    def count(self, name: str, content: Hello | Result) -> int | None:
        """Take note of what a device has exchanged; return the bytes from the server since its last result.

        What its last upload took is known now, and is written. None if the device has started again since.
        """
        try:
            now = check_counted(content)
        except ValueError:
            return None
        tally = self._of.get(name)
        boot = content.boot if isinstance(content, Hello) else tally.boot if tally else ""
        if tally is None or tally.boot != boot or any(a < b for a, b in zip(now[:2], tally.counted[:2], strict=True)):
            self._of[name] = Tally(boot, now)
            return None
        if tally.line:
            polling = max(0, now.polling_bytes - tally.counted.polling_bytes)
            measured = {"wire_up": now.wire_up - tally.counted.wire_up, "polling_bytes": polling}
            self._journal.write(tally.line | {"measured": measured})
        down = tally.down + now.wire_down - tally.counted.wire_down
        self._of[name] = Tally(boot, now, 0 if isinstance(content, Result) else down)
        return down
