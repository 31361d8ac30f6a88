"""Errors a user can act on, as one line, and the exit code each ends a command with."""

import sys
import traceback


class ConfigError(ValueError):
    """Bad input: one line that names the field, the value and what is accepted."""


ADVICE = (
    "try a smaller --runtime.lanes or --optimizer.batch-size, --runtime.remat True, --runtime.feed streamed, or of a "
    "sweep --together 1"
)


class FailedRunsError(Exception):
    """Runs of a sweep that ended without a result, the others being done."""


def user_message(error: BaseException) -> str | None:
    """One line for the user; None for what nobody has foreseen, which wants a traceback."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    elif isinstance(error, ConfigError | FloatingPointError | OSError | FailedRunsError):
        text = str(error)
    elif is_out_of_memory(error):
        text = f"out of memory ({str(error).split(chr(10))[0]}); {ADVICE}"
    else:
        return None
    return " ".join(text.split())  # what it quotes may have line breaks


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device have no more."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


EXIT_BAD_INPUT, EXIT_FAILURE, EXIT_INTERRUPTED = 2, 1, 130


def report_error(error: BaseException) -> int:
    """Print what went wrong, in one line if it was foreseen, and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    if line := user_message(error):
        print(f"error: {line}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return EXIT_BAD_INPUT if isinstance(error, ConfigError) else EXIT_FAILURE
