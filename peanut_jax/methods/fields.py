"""Checks of a config's fields, which name the field, the value and what is allowed."""

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np

from peanut_jax.messages import short
from peanut_jax.methods.activations import ACTIVATIONS

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

# Beyond every model: modules that a list names, and characters of a name.
_MAX_NAMES, _MAX_NAME = 20_000, 1000


def is_int(value: object) -> bool:
    """Whether it is an integer, numpy's scalars included, and not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Whether it is a real number, numpy's scalars included, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def integer(name: str, value: Any, minimum: int) -> int:
    """`value` as a Python int.

    Raises:
        ValueError: not an integer (numpy's scalars are), too small, or above 2^31 - 1.
    """
    if not is_int(value) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {short(value)}")
    if value > 2**31 - 1:
        raise ValueError(f"{name} must be below 2^31, got {short(value)}")
    return int(value)


def scale(name: str, value: Any) -> float:
    """`value` as a Python float that float32 holds as a normal number above 0.

    Raises:
        ValueError: anything else.
    """
    try:
        number = float(value) if is_real(value) else math.nan
    except OverflowError:  # a Python integer may be as large as it likes
        number = math.inf
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be a finite number above 0, got {short(value)}")
    if not _SMALLEST <= number <= _LARGEST:
        raise ValueError(
            f"{name} must be between {_SMALLEST:.3g} and {_LARGEST:.3g}, the range of float32, in which it multiplies; "
            f"got {short(value)}"
        )
    return number


def rate(name: str, value: Any) -> float:
    """`value` as a Python float in [0, 1).

    Raises:
        ValueError: anything else.
    """
    if not is_real(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {short(value)}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """`value`, True or False.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, got {short(value)}")
    return bool(value)


def text(name: str, value: Any) -> str | None:
    """`value`, a string or None.

    Raises:
        ValueError: anything else.
    """
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name} must be a string or None, got {short(value)}")
    return value


def names(name: str, value: Any) -> tuple[str, ...] | str | None:
    """A list of names as a tuple, so that a config hashes; a string and None as they are.

    Raises:
        ValueError: an empty list, or something in it that is not a string.
    """
    if value is None or isinstance(value, str):
        return value
    found = _items(name, value, lambda item: isinstance(item, str), "str")
    if len(found) > _MAX_NAMES or max(map(len, found)) > _MAX_NAME:
        raise ValueError(
            f"{name} must be at most {_MAX_NAMES} names of at most {_MAX_NAME} characters, got {len(found)}, "
            f"{short(max(found, key=len))} the longest"
        )
    return found


def layers(name: str, value: Any) -> tuple[int, ...] | int | None:
    """Layer numbers as Python ints: one, or a tuple of several.

    Raises:
        ValueError: an empty list, a number that is not an integer or below 0.
    """
    if value is None:
        return None
    if is_int(value) or isinstance(value, bool):
        return integer(name, value, minimum=0)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    return tuple(integer(name, item, minimum=0) for item in _items(name, value, is_int, "int"))


def _items(name: str, value: Any, fits: Any, kind: str) -> tuple:
    if not isinstance(value, (list, tuple, set, frozenset, range)):
        raise ValueError(f"{name} must be a list, got {short(value)}")
    items = tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)
    if not items or not all(fits(item) for item in items):
        raise ValueError(f"{name} must be a list of one or more {kind}, got {short(value)}")
    return items


def kernel_axes(name: str, value: Any) -> tuple[tuple[str, tuple[int, int]], ...] | None:
    """Kernel path -> (input axes, output axes), as a tuple that hashes; None where there are none.

    Raises:
        ValueError: anything but a mapping (or the pairs of one) to two counts of at least 1.
    """
    if not value:
        return None
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    try:
        return tuple(sorted((str(path), (int(n_in), int(n_out))) for path, (n_in, n_out) in pairs))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must be path -> (inputs, outputs), as peanut_jax.kernel_axes returns it, got {short(value)}"
        ) from error


def activation(name: str, value: Any) -> str:
    """`value`, a key of `ACTIVATIONS`.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(f"{name} must be one of {sorted(ACTIVATIONS)}, got {short(value)}")
    return value
