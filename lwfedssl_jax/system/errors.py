"""Errors that a user can act on, the line that reports each, and the exit code it ends a command with."""

import sys
import traceback
from collections.abc import Sequence

EXIT_FAILURE, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 130

MAX_NAMED = 3  # things that are wrong, which a message names; it counts the others
ADVICE = (
    "try a smaller --runtime.lanes or --optimizer.batch-size, --runtime.remat True, --runtime.feed streamed, or for a "
    "sweep --together 1"
)


class ConfigError(ValueError):
    """Bad input: one line that names the field, the value and what is accepted."""


class FailedRunsError(Exception):
    """Some runs of a sweep failed; the others are finished."""


def first_of(names: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - MAX_NAMED:,} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def exit_code(error: BaseException) -> int:
    """Return the exit code of a command that ended with this error."""
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    return EXIT_BAD_INPUT if isinstance(error, ConfigError) else EXIT_FAILURE


def report_error(error: BaseException) -> int:
    """Print an error, in one line if it is one that a user can act on, and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print(str(error) or "interrupted", file=sys.stderr)
    elif line := user_message(error):
        print(f"error: {line}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return exit_code(error)


def user_message(error: BaseException) -> str | None:
    """Return one line for the user, or None for an error that nobody foresaw, which needs a traceback."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    elif isinstance(error, ConfigError | FloatingPointError | OSError | FailedRunsError):
        text = str(error)
    elif is_out_of_memory(error):
        text = f"out of memory ({str(error).split(chr(10))[0]}); {ADVICE}"
    else:
        return None
    return " ".join(text.split())  # values that it quotes may contain line breaks


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the host or a device ran out of memory."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
