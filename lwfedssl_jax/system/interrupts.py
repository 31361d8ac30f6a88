"""Ctrl-C and SIGTERM as KeyboardInterrupt, raised at once or where it does no harm, and never lost."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Interrupts:
    """A context manager that raises KeyboardInterrupt on Ctrl-C and SIGTERM, at once or, while ``held_back``, later.

    An exception raised in a callback from C code, such as JAX's callback of the garbage collector, is lost there.
    Therefore ``check`` also raises for a signal that came earlier. Outside the main thread, which alone receives
    signals, it does nothing.

    Args:
      notify: called with a line for the user when a signal comes while signals are held back.
    """

    def __init__(self, notify: Callable[[str], None] = lambda text: None) -> None:
        self._notify = notify
        self._held_back = self._asked = False

    def __enter__(self) -> "Interrupts":
        outer = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
        self._asked = isinstance(outer, Interrupts) and outer._asked
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._handle) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, *_: object) -> None:
        first, self._asked = not self._asked, True
        if self._held_back and first:
            self._notify("stopping after this call; once more stops at once")
        else:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Within this context only ``check``, or a second signal, raises."""
        self._held_back = True
        try:
            yield
            self.check()
        finally:
            self._held_back = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self._asked:
            raise KeyboardInterrupt
