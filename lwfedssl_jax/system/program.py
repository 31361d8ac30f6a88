"""How this program was called, for the commands that it prints."""

import sys
from pathlib import Path

INSTALLED = "lwfedssl"  # the command that an installation has


def program() -> list[str]:
    """Return the words that call this program again: those that it was called by, or ``python run.py``."""
    called = Path(sys.argv[0]).name
    if called == "__main__.py":
        return ["python", "-m", "lwfedssl_jax"]
    return [INSTALLED] if called.removesuffix(".exe") == INSTALLED else ["python", "run.py"]
