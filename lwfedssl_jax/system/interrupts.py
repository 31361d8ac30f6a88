"""Ctrl-C and SIGTERM: heard at once, or where they do no harm, and never forgotten."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


class Interrupts:
    """Ctrl-C and SIGTERM as KeyboardInterrupt: at once, or while ``held_back`` when ``check`` is called.

    What is raised inside a callback of C code, such as JAX's of the garbage collector, is lost there; so ``check``
    also raises for a signal that has come before. A context manager; outside the main thread, which alone hears
    signals, it does nothing.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self._say = say
        self._held_back = self._asked = False

    def __enter__(self) -> "Interrupts":
        around = getattr(signal.getsignal(signal.SIGINT), "__self__", None)
        self._asked = isinstance(around, Interrupts) and around._asked
        signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self._before = {number: signal.signal(number, self._hear) for number in signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, *_: object) -> None:
        first, self._asked = not self._asked, True
        if self._held_back and first:
            self._say("stopping after this call; once more stops at once")
        else:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Within, only ``check`` raises, or a second signal."""
        self._held_back = True
        try:
            yield
            self.check()
        finally:
            self._held_back = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has come."""
        if self._asked:
            raise KeyboardInterrupt
