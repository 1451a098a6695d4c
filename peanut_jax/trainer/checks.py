"""Checks of a config's fields, each with the field, its value and what is allowed in the error."""

import math
from collections.abc import Sequence
from typing import Any

from peanut_jax.messages import short

# The largest integer that a field takes: a step is an int32.
_LARGEST = 2**31 - 1


def check_int(name: str, value: Any, minimum: int) -> None:
    """Refuses what is not an integer of at least `minimum`.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {short(value)}")
    if value > _LARGEST:
        raise ValueError(f"{name} must be below 2^31, got {short(value)}")


def check_positive(name: str, value: Any) -> None:
    """Refuses what is not a finite number above 0.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    if not _is_number(value) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {short(value)}")


def check_range(name: str, value: Any, below: float) -> None:
    """Refuses what is not a number of at least 0 and below `below`.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    if not _is_number(value) or not 0 <= value < below:
        raise ValueError(f"{name} must be a number of at least 0 and below {below}, got {short(value)}")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuses what is not one of `choices`.

    Raises:
        ValueError: naming the field, the value and what is allowed.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {short(value)}")


def _is_number(value: Any) -> bool:
    # An integer may be too large for a float; what float32 does not hold is no number of a run's.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not 2.0**128 <= abs(value) < math.inf
