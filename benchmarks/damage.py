"""Ways to damage a file: bytes, JSON and safetensors headers, drawn from a random generator."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Values that no field expects, and some that one does.
ODD: tuple[Any, ...] = (
        None, True, False, 0, 1, -1, 3, 2**31, 2**63, 10**300, 10**400, 1e30, 1e-320, float("nan"), float("inf"),
        "", "x", "\0", "\u202e\u0661", "\ud800", "../../etc", "x" * 100_000, [], {}, [[]], {"": None}, [None], ["x"],
        {"type": []}, {"rope_type": "linear", "factor": "2"}, "([a-z0-9.]+)+!", "a{99999999999}", "(" * 20_000,
        "(?i)layer|x", "((a{1000}){1000}){1000}", "(?:.*a|.*a|.*e)*!", [0, 2**40], [1e9], -0.5, "float32", "none",
)  # fmt: skip
_DEEP = 3000


def damaged(draw: random.Random, path: Path) -> tuple[bytes | None, str]:
    """The file's bytes after a random damage, None for a file that is gone; and what was done."""
    content = path.read_bytes()
    kinds: list[Callable[[random.Random, bytes], tuple[bytes | None, str]]] = [_raw]
    if path.suffix == ".json":
        kinds = [_json, _json, _json, _raw]
    elif path.suffix == ".safetensors":
        kinds = [_header, _header, _raw]
    return draw.choice(kinds)(draw, content)


def _raw(draw: random.Random, content: bytes) -> tuple[bytes | None, str]:
    at, size = draw.randrange(len(content) + 1), draw.choice((1, 2, 8, 64, 1000))
    noise = draw.randbytes(size)
    other = draw.randrange(len(content) + 1)
    first, second = min(at, other), max(at, other)
    return draw.choice(
        (
            (content[:at], f"cut at {at}"),
            (content[at:], f"the first {at} bytes lost"),
            (content[:at] + noise + content[at + size :], f"{size} random bytes at {at}"),
            (content[:at] + b"\0" * size + content[at + size :], f"{size} zeros at {at}"),
            (content[:at] + noise + content[at:], f"{size} bytes put in at {at}"),
            (content[:first] + content[second:], f"bytes {first} to {second} lost"),
            (content[second:] + content[first:second] + content[:first], f"parts swapped at {first} and {second}"),
            (_flipped(draw, content), "bits flipped"),
            (content + noise, f"{size} bytes at the end"),
            (b"", "empty"),
            (b"[" * 100_000, "deep lists"),
            (b'{"a":' * 100_000, "deep objects"),
            (None, "gone"),
        )
    )


def _flipped(draw: random.Random, content: bytes) -> bytes:
    array = bytearray(content)
    for _ in range(draw.choice((1, 1, 4, 32))):
        if array:
            array[draw.randrange(len(array))] ^= 1 << draw.randrange(8)
    return bytes(array)


def _json(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    value, what = _changed(draw, json.loads(content))
    return json.dumps(value).replace('"DEEP"', "[" * _DEEP + "]" * _DEEP).encode(), what


def _header(draw: random.Random, content: bytes) -> tuple[bytes, str]:
    """Changes in a safetensors header, with the length that it then has or its old one."""
    length = int.from_bytes(content[:8], "little")
    value, what = _changed(draw, json.loads(content[8 : 8 + length]))
    text = json.dumps(value).replace('"DEEP"', "[" * _DEEP + "]" * _DEEP).encode()
    if draw.random() < 0.8:
        length = len(text)
        what += ", header's length kept right"
    return length.to_bytes(8, "little") + text + content[8 + int.from_bytes(content[:8], "little") :], what


def _changed(draw: random.Random, value: Any) -> tuple[Any, str]:
    """The JSON value with one or two of its parts changed."""
    done = []
    for _ in range(draw.choice((1, 1, 2))):
        parent, key = _place(draw, value)
        if parent is None:
            value, what = copy.deepcopy(draw.choice(ODD)), "all of it"
        else:
            what = _change(draw, parent, key)
        done.append(what)
    return value, "; ".join(done)


def _place(draw: random.Random, value: Any) -> tuple[Any, Any]:
    """A random container in the value, and a key of it; (None, None) for the value itself."""
    parent, key = None, None
    while isinstance(value, (dict, list)) and value:
        parent = value
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        value = parent[key]
        if draw.random() < 0.3:
            break
    return (None, None) if draw.random() < 0.02 else (parent, key)


def _change(draw: random.Random, parent: Any, key: Any) -> str:
    how = draw.choice(("replace", "replace", "replace", "lose", "add", "rename", "deep", "swap"))
    if how == "replace":
        parent[key] = copy.deepcopy(draw.choice(ODD))
    elif how == "lose":
        del parent[key]
    elif how == "deep":
        parent[key] = "DEEP"
    elif isinstance(parent, list):
        parent.append(copy.deepcopy(draw.choice(ODD)))
    elif how == "add":
        parent[draw.choice(("x", "", "\u202e", "__metadata__", "rank_pattern", "lora_alpha"))] = copy.deepcopy(
            draw.choice(ODD)
        )
    elif how == "rename":
        parent[f"{key}{draw.choice(('x', '.', '9' * 30, chr(0), '/'))}"] = parent.pop(key)
    else:
        other = draw.choice(list(parent))
        parent[key], parent[other] = parent[other], parent[key]
    return f"{how} {str(key)[:40]}"
