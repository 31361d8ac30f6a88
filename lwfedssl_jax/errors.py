"""What is said of an error, in one line where it was foreseen."""

from lwfedssl_jax.config import ConfigError

ADVICE = (
    "try a smaller --runtime.lanes or --optimizer.batch-size, --runtime.remat True, --runtime.feed streamed, or of a "
    "sweep --together 1"
)


class FailedRunsError(Exception):
    """Runs of a sweep that ended without a result, the others being done."""


def foreseen(error: BaseException) -> str | None:
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
