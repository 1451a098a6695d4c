"""Checks of a config's fields, which name the field, the value and what is allowed."""

import math
import re
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np

from peanut_jax.methods.activations import ACTIVATIONS

_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


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
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    if value > 2**31 - 1:
        raise ValueError(f"{name} must be below 2^31, got {value!r}")
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
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
    if not _SMALLEST <= number <= _LARGEST:
        raise ValueError(
            f"{name} must be between {_SMALLEST:.3g} and {_LARGEST:.3g}, the range of float32, in which it multiplies; "
            f"got {value!r}"
        )
    return number


def rate(name: str, value: Any) -> float:
    """`value` as a Python float in [0, 1).

    Raises:
        ValueError: anything else.
    """
    if not is_real(value) or not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}")
    return float(value)


def names(name: str, value: Any) -> tuple[str, ...] | str | None:
    """A list of names as a tuple, so that a config hashes; a string and None as they are.

    Raises:
        ValueError: an empty list, or something in it that is not a string.
    """
    if value is None or isinstance(value, str):
        return value
    return _items(name, value, lambda item: isinstance(item, str), "str")


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
        raise ValueError(f"{name} must be a list, got {value!r}")
    items = tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)
    if not items or not all(fits(item) for item in items):
        raise ValueError(f"{name} must be a list of one or more {kind}, got {value!r}")
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
            f"{name} must be path -> (inputs, outputs), as peanut_jax.kernel_axes returns it, got {value!r}"
        ) from error


def activation(name: str, value: Any) -> str:
    """`value`, a key of `ACTIVATIONS`.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise ValueError(f"{name} must be one of {sorted(ACTIVATIONS)}, got {value!r}")
    return value


def regex(name: str, pattern: str) -> str:
    """`pattern`, which compiles.

    Raises:
        ValueError: it does not.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{name} is a string, so a regular expression, and {pattern!r} is not one: {error}") from error
    return pattern
