"""What an error says of values that may be of any size: files and arguments are not ours."""

import contextlib
import reprlib
from collections.abc import Iterator
from typing import Any

# Characters of a value, and of a whole message.
VALUE, MESSAGE = 80, 500
_ITEMS, _DEPTH = 6, 3


def short(value: Any, limit: int = VALUE) -> str:
    """The `repr` of a value in at most `limit` characters, in time that does not grow with the value.

    Examples:
        >>> short("q_proj")
        "'q_proj'"
        >>> len(short("x" * 10**6))
        80
    """
    shown = reprlib.Repr()
    shown.maxlevel, shown.maxstring, shown.maxother, shown.maxlong = _DEPTH, limit, limit, limit
    shown.maxdict = shown.maxlist = shown.maxtuple = shown.maxset = shown.maxfrozenset = _ITEMS
    try:
        return _cut(shown.repr(value), limit)
    except ValueError:  # an integer of more digits than Python writes out
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"


@contextlib.contextmanager
def reading(what: object) -> Iterator[None]:
    """Puts what is read before a ValueError's message, and keeps the whole to `MESSAGE` characters."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        named = text if str(what) in text else f"{what}: {text}"
        raise ValueError(_cut(named, MESSAGE)) from error


def _cut(text: str, limit: int) -> str:
    """The text, without its middle where it is longer than `limit`."""
    if len(text) <= limit:
        return text
    tail = (limit - 3) // 3
    return f"{text[: limit - 3 - tail]}...{text[len(text) - tail :]}"
