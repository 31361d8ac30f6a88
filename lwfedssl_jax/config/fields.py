"""Types of config fields, and the values that each accepts."""

import math
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from lwfedssl_jax.system.errors import ConfigError


class Range(NamedTuple):
    """Closed interval a number must lie in; ``above`` and ``below`` exclude its ends."""

    low: float
    high: float = float("inf")
    above: bool = False
    below: bool = False

    def __contains__(self, value: object) -> bool:
        assert isinstance(value, int | float)
        at_open_end = (self.above and value == self.low) or (self.below and value == self.high)
        return self.low <= value <= self.high and not at_open_end

    def __str__(self) -> str:
        low = f"above {self.low}" if self.above else f"at least {self.low}"
        high = f"below {self.high}" if self.below else f"at most {self.high}"
        return low if self.high == float("inf") else f"{low} and {high}"


LARGEST, LARGEST_FLOAT = 2**31 - 1, 3.4e38  # programs have int32 and float32
AtLeast1 = Annotated[int, Range(1, LARGEST)]
AtLeast0 = Annotated[int, Range(0, LARGEST)]
Size = Annotated[int, Range(1, 2**20)]  # products of larger ones crash the compiler
SizeOr0 = Annotated[int, Range(0, 2**20)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
OwnSeed = Annotated[int, Range(-1, 2**32 - 1)]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]


def plain_value(value: Any, hint: Any) -> Any:
    """Return a field's value with Python's numbers for NumPy's, tuples for lists, and floats where they are meant."""
    if get_origin(hint) is Annotated:
        return plain_value(value, get_args(hint)[0])
    value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's or JAX's
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(plain_value(item, get_args(hint)[0]) for item in value)
    return float(value) if hint is float and type(value) is int and abs(value) <= LARGEST_FLOAT else value


def check_value(name: str, value: Any, hint: Any) -> None:
    """Refuse a value that does not have the type, range or choices of its field.

    Raises:
      ConfigError: naming the field, the value and what is accepted.
    """
    if get_origin(hint) is Annotated:
        kind, interval = get_args(hint)
        check_value(name, value, kind)
        if value not in interval:
            raise ConfigError(f"{name}: {value!r} is out of range; accepted: {interval}")
    elif get_origin(hint) is Literal:
        if not isinstance(value, str) or value not in get_args(hint):
            raise ConfigError(f"{name}: unknown {value!r}; accepted: {', '.join(get_args(hint))}")
    elif get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            kind = (get_args(get_args(hint)[0]) or get_args(hint))[0]
            example = value if type(value) is kind else {int: 1, str: "NAME"}.get(kind, kind())
            raise ConfigError(
                f"{name}: {value!r} is not a tuple; accepted: a tuple of {kind.__name__}, such as ({example!r},)"
            )
        for item in value:
            check_value(name, item, get_args(hint)[0])
    else:
        accepted = (int, float) if hint is float else (hint,)
        infinite = isinstance(value, float) and not math.isfinite(value)
        if infinite or not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
            raise ConfigError(f"{name}: {value!r} is not valid; accepted: {hint.__name__}")
        if hint is float and abs(value) > LARGEST_FLOAT:
            raise ConfigError(f"{name}: {value!r} is out of range; accepted: at most {LARGEST_FLOAT} either way")
