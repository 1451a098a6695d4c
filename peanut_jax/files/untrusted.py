"""JSON that somebody else wrote: the one place where it is read, and where its fields get their types.

A file's content is not trusted: its size, the depth of its nesting, its numbers and its strings are checked before
anything is made of it. What does not fit is a ValueError that names the file and the field.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peanut_jax.messages import one_line, reading, short

# The index of DeepSeek-V3, of 671 billion parameters, has 8.9 MB; safetensors itself allows a header 100 MB.
MAX_BYTES = 1 << 26
# transformers' configs nest three or four deep.
MAX_DEPTH = 64
_TOO_DEEP = f"nested deeper than {MAX_DEPTH}"
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_json(path: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is larger than `max_bytes`, or as `parse_json`.
    """
    with reading(path):
        if (size := path.stat().st_size) > max_bytes:
            raise ValueError(f"a file of {size:,} bytes is not what was expected here: JSON of at most {max_bytes:,}")
        return parse_json(path.read_bytes(), str(path))


def parse_json(text: bytes | str, what: str) -> dict[str, Any]:
    """The JSON object of a text, which errors call `what`.

    Raises:
        ValueError: text that is not UTF-8 or not one JSON object; a name that is there twice; nesting deeper than
            `MAX_DEPTH`; an integer of more than 4,300 digits; a string that is not Unicode.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        content = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise _invalid(what, _TOO_DEEP) from error
    except ValueError as error:
        raise _invalid(what, one_line(error)) from error
    if not isinstance(content, dict):
        raise ValueError(f"{what} must hold a JSON object, got {type(content).__name__}")
    if why := _unusable(content):
        raise _invalid(what, why)
    return content


def _invalid(what: str, why: str) -> ValueError:
    return ValueError(f"{what} is not valid JSON ({why}); fetch it again")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a field may hold: its name in errors, and the test."""

    name: str
    fits: Callable[[Any], bool]


TEXT = Kind("a string", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("an integer of at least 0", lambda value: _is_int(value) and value >= 0)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
TEXTS = Kind("a list of strings", lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value))
TEXT_TO_TEXT = Kind(
    "an object of strings",
    lambda value: isinstance(value, dict) and all(isinstance(one, str) for one in value.values()),
)


def typed(content: Mapping[str, Any], name: str, kind: Kind, default: Any = None) -> Any:
    """`content[name]`, which is of `kind`; `default` where it is absent or null.

    Raises:
        ValueError: another kind of value.
    """
    value = content.get(name)
    if value is None:
        return default
    if not kind.fits(value):
        raise ValueError(f"{name} must be {kind.name}, got {short(value)}")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"{short(twice)} is there twice")
    return content


def _unusable(content: Any) -> str | None:
    """What is wrong with nesting too deep for whatever walks the content later, or strings that cannot be written."""
    level = [content]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.keys()
                inner += value.values()
            elif isinstance(value, list):
                inner += value
            elif isinstance(value, str) and not value.isascii() and _SURROGATE.search(value):
                return f"{short(value)} holds half of a surrogate pair"
        if not inner:
            return None
        level = inner
    return _TOO_DEEP
