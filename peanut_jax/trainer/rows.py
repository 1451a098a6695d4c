"""Rows of data: what a task offers and the loop reads, and how changed data are told."""

import hashlib
import logging
import time
import zlib
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

logger = logging.getLogger(__name__)

Row = Mapping[str, np.ndarray]
# The leaf that every row has: how much each of its labels counts, a scalar or one number for each token.
WEIGHTS = "weights"
# Hexadecimal digits of a digest: 128 bits, which are told in errors too.
_DIGITS = 32
# A note says what takes so long, and how to make it short.
_PATIENCE_S = 10.0


class Rows(Protocol):
    """Rows by index, made when they are asked for. Every row has the same names, shapes and dtypes.

    A resume compares all rows with those of the start: by a method `digest` where the rows have one (see `Digested`),
    else by reading each of them once.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Row: ...


@runtime_checkable
class Digested(Protocol):
    """Rows that tell what they hold without being read one by one."""

    def digest(self) -> str:
        """Another text wherever a row, or the order of the rows, is another; the same wherever the data were moved."""
        ...


def identity(rows: Rows) -> dict[str, int | str]:
    """What tells other data: the number of rows, and a digest over all of them.

    Raises:
        ValueError: a `digest` that gives no text.
    """
    digest = rows.digest() if isinstance(rows, Digested) else _every_row(rows)
    if not isinstance(digest, str) or not digest:
        raise ValueError(f"digest() of {type(rows).__name__} must return a text that tells its rows, got {digest!r}")
    return {"rows": len(rows), "digest": hashlib.sha256(digest.encode()).hexdigest()[:_DIGITS]}


def earlier_identity(rows: Rows) -> dict[str, int]:
    """What runs of earlier versions kept: a checksum of the first, the middle and the last row."""
    total = 0
    for i in (0, len(rows) // 2, len(rows) - 1):
        for name, value in sorted(rows[i].items()):
            total = zlib.crc32(name.encode() + np.ascontiguousarray(value).tobytes(), total)
    return {"rows": len(rows), "checksum": total}


def digest_arrays(arrays: Mapping[str, Any]) -> str:
    """A digest of named arrays on the host: names, dtypes, shapes and every element. For a `digest` of your own."""
    found = hashlib.sha256()
    _add(found, arrays)
    return found.hexdigest()


def _every_row(rows: Rows) -> str:
    found, since, noted = hashlib.sha256(), time.monotonic(), False
    for i in range(len(rows)):
        _add(found, rows[i])
        if not noted and time.monotonic() - since > _PATIENCE_S:
            noted = True
            logger.warning(
                "%s are read once, to tell changed data from a digest: %d of %d rows in %.0f s. A method digest() that "
                "returns such a text makes this unnecessary", type(rows).__name__, i + 1, len(rows), _PATIENCE_S,
            )  # fmt: skip
    return found.hexdigest()


def _add(found: Any, arrays: Mapping[str, Any]) -> None:
    for name, value in sorted(arrays.items()):
        array = np.asarray(value)
        if array.dtype.hasobject:
            raise ValueError(f"{name!r} of a row must be an array of numbers, got {type(value).__name__}")
        found.update(f"{name}:{array.dtype.name}:{array.shape};".encode())
        if array.size:
            found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
