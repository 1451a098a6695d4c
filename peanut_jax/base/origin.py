"""Which checkpoint a loaded kernel came from, so that an adapter can say what it was trained on.

The loaders note it for the arrays that they make. An array that is made from one of them (cast, merged, trained) has no
note, and an adapter of such kernels names no base.
"""

import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from jaxtyping import Array

# id of an array -> (the array, its source); entries go with their arrays.
_SOURCES: dict[int, tuple[weakref.ref, str]] = {}


def note(leaves: Mapping[str, Any], source: str) -> None:
    """Remembers `source`, a folder or hub name, for every array of a flat tree."""
    for leaf in leaves.values():
        _SOURCES[id(leaf)] = (weakref.ref(leaf, partial(_forget, id(leaf))), source)


def _forget(key: int, _: weakref.ref) -> None:
    _SOURCES.pop(key, None)


def carry(before: Mapping[str, Any], after: Mapping[str, Array]) -> None:
    """Gives arrays that hold the same values elsewhere, as on other devices, the sources of those before, by path."""
    for path, leaf in after.items():
        if (source := source_of([before[path]])) is not None:
            note({path: leaf}, source)


def source_of(kernels: Iterable[Any]) -> str | None:
    """The source that all of these arrays have; None where one has none, or they have several."""
    found = {_SOURCES[id(one)][1] if _is_noted(one) else None for one in kernels}
    return found.pop() if len(found) == 1 else None


def _is_noted(array: Any) -> bool:
    return id(array) in _SOURCES and _SOURCES[id(array)][0]() is array
