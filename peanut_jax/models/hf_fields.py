"""The fields of a transformers config.json, whose classes take whatever they are given."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peanut_jax.messages import one_line, short

# Bounds beyond every model that there is. A layer costs a millisecond before anything of it is read, transformers makes
# a dictionary of the labels, and some classes a table of their positions.
MAX_LAYERS, MAX_LABELS, MAX_SIZE = 1000, 1_000_000, 1 << 24
# What transformers and flax raise over fields that they cannot compute with.
_THEIRS = (TypeError, KeyError, AttributeError, IndexError, ZeroDivisionError, OverflowError, AssertionError)


def check_fields(raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Refuses fields of another type than their defaults', or beyond every model's size.

    Args:
        raw: The fields of a file.
        defaults: Those of transformers' class of configuration.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """
    for name, value in raw.items():
        default = 2 if name == "num_labels" else defaults.get(name)
        if value is None or default is None:
            continue
        if expected := _expected(value, default):
            raise ValueError(
                f"{short(name, 40)[1:-1]} must be {expected}, such as {short(default)}; got {short(value)}"
            )
        limit = MAX_LAYERS if "layers" in name or name == "depths" else MAX_LABELS if name == "num_labels" else MAX_SIZE
        sizes = value if isinstance(value, list) else [value]
        if len(sizes) > MAX_LAYERS or any(isinstance(one, (int, float)) and abs(one) > limit for one in sizes):
            raise ValueError(f"{name} must be at most {limit}, got {short(value)}")


def _expected(value: Any, default: Any) -> str | None:
    """What a value in the place of `default` must be, where it is not."""
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, (int, float)):
        # Pictures and their patches are a number or a list of sides.
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = is_number and abs(value) < 2.0**128 and math.isfinite(value)
        return None if fits or isinstance(value, list) else "a finite number"
    if isinstance(default, str):
        return None if isinstance(value, str) else "a string"
    if isinstance(default, dict):
        return None if isinstance(value, dict) else "an object"
    return None if isinstance(value, (list, int)) else "a list"


@contextlib.contextmanager
def used_by_transformers(path: Path) -> Iterator[None]:
    """Tells of transformers' own errors over the fields of a file as a ValueError that names it."""
    try:
        yield
    except _THEIRS as error:
        raise ValueError(f"{path}: transformers cannot make a model of its fields ({one_line(error)})") from error
