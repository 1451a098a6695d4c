"""What an error says of values that may be of any size: files and arguments are not ours."""

import contextlib
import reprlib
from collections.abc import Iterator
from typing import Any

# Characters of a value, of another error within a message, and of a whole message.
VALUE, LINE, MESSAGE = 80, 160, 500
_GAP = " ... "
_FOR_PEOPLE = (ValueError, OSError, NotImplementedError, ImportError, RuntimeError)
_ITEMS, _DEPTH = 8, 3


def short(value: Any, limit: int = VALUE) -> str:
    """The `repr` of a value in at most `limit` characters, in time that does not grow with the value.

    Examples:
        >>> from peanut_jax.messages import short
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


def one_line(what: object, limit: int = LINE) -> str:
    """An error's message, or any text, in one line of at most `limit` characters.

    The middle of a longer one is left out: libraries put the cause at the end. An error of the system is told as its
    file and the cause, and one that was not meant for people with its type.

    Examples:
        >>> from peanut_jax.messages import one_line
        >>> one_line(FileNotFoundError(2, "No such file or directory", "a.json"))
        'a.json: No such file or directory'
        >>> one_line(KeyError("hidden_size"))
        "KeyError: 'hidden_size'"
    """
    text = str(what)
    if isinstance(what, OSError) and what.filename is not None and what.strerror and what.errno is not None:
        text = f"{what.filename}: {what.strerror}"
    elif isinstance(what, BaseException) and not (text.strip() and isinstance(what, _FOR_PEOPLE)):
        text = f"{type(what).__name__}: {text}".removesuffix(": ")
    return _cut(" ".join(text.split()), limit)


def _cut(text: str, limit: int) -> str:
    """The text, without its middle where it is longer than `limit`."""
    if len(text) <= limit:
        return text
    tail = (limit - len(_GAP)) // 2
    return f"{text[: limit - len(_GAP) - tail]}{_GAP}{text[len(text) - tail :]}"
