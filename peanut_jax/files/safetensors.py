"""Safetensors on disk, tensor by tensor, and folders that appear whole or not at all."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from peanut_jax.files.atomic import replacing
from peanut_jax.files.untrusted import TEXT_TO_TEXT, parse_json, typed
from peanut_jax.messages import one_line, reading, short

# Tensors of other dtypes (quantised ones) are copied but not read.
_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_METADATA = "__metadata__"
# Bounds that no model comes near: characters of a tensor's name, and elements along an axis.
_MAX_NAME, _MAX_SIDE = 1000, 2**40


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: where its bytes are, counted from the start of the file's data."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class Header:
    """The head of a safetensors file. `data` is the offset of the data in the file."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data: int


@contextlib.contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """The library's reader, for numpy; a damaged file is a ValueError."""
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt ({one_line(error)}); fetch it again") from error


def read_header(path: Path) -> Header:
    """Reads and checks a header: the library refuses lengths, offsets, shapes and dtypes that do not fit the file.

    Raises:
        ValueError: a file that is truncated, corrupt or no safetensors.
    """
    with open_safetensors(path):
        pass
    with reading(path):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            content = parse_json(file.read(length), f"the header of {path}")
        metadata = typed(content, _METADATA, TEXT_TO_TEXT, {})
        content.pop(_METADATA, None)
        return Header({name: _entry(path, name, part) for name, part in content.items()}, metadata, 8 + length)


def _entry(path: Path, name: str, part: Any) -> Entry:
    """One tensor's part of a header, whose offsets and types the library has compared with the file."""
    if len(name) > _MAX_NAME or max(part["shape"], default=0) > _MAX_SIDE:
        raise ValueError(f"tensor {short(name)} of shape {short(part['shape'])} is not one of a model")
    return Entry(path, part["dtype"], tuple(part["shape"]), *part["data_offsets"])


def read_entry(entry: Entry, name: str, data: int) -> np.ndarray:
    """The tensor alone, into memory of its own: nothing of the rest of the file is held or mapped.

    Raises:
        ValueError: a dtype that is not floating point.
    """
    dtype = dtype_of(entry.dtype, name)
    with entry.file.open("rb") as file:
        file.seek(data + entry.start)
        return np.fromfile(file, dtype, (entry.stop - entry.start) // dtype.itemsize).reshape(entry.shape)


def dtype_of(code: str, name: str) -> np.dtype:
    """numpy's dtype for safetensors' code, of the tensor `name`.

    Raises:
        ValueError: a dtype that is not floating point.
    """
    if code not in _DTYPES:
        raise ValueError(f"{short(name)} has dtype {code}: quantised weights cannot be read; dequantise them first")
    return _DTYPES[code]


def read_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor of a file, and its metadata.

    Raises:
        ValueError: as `read_header` and `read_entry`.
    """
    header = read_header(path)
    return {name: read_entry(entry, name, header.data) for name, entry in header.entries.items()}, header.metadata


def copy_file(
    source: Path, target: Path, header: Header, rename: Mapping[str, str], extra: Mapping[str, np.ndarray]
) -> int:
    """Copies a safetensors file, and returns the offset of the copy's data.

    Args:
        header: The source's.
        rename: Old name -> new name. Empty for a copy whose header has the same bytes.
        extra: Tensors to append.
    """
    end = source.stat().st_size - header.data
    with source.open("rb") as old, target.open("wb") as new:
        head = old.read(header.data)
        if rename or extra:
            content: dict = {"__metadata__": header.metadata} if header.metadata else {}
            for name, entry in header.entries.items():
                content[rename.get(name, name)] = _field(entry.dtype, entry.shape, entry.start, entry.stop)
            for name, array in extra.items():
                content[name] = _field(_NAMES[array.dtype], array.shape, end, end + array.nbytes)
                end += array.nbytes
            text = json.dumps(content, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            head = len(text).to_bytes(8, "little") + text
        new.write(head)
        shutil.copyfileobj(old, new, 1 << 22)
        for array in extra.values():
            new.write(array.tobytes())
    return len(head)


def write_entry(file: Path, offset: int, array: np.ndarray) -> None:
    """Puts the array's bytes over those at `offset`."""
    with file.open("r+b") as opened:
        opened.seek(offset)
        opened.write(np.ascontiguousarray(array).view(np.uint8).data)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """A new safetensors file, which appears under its name once it is whole."""
    with replacing(path) as temporary:
        contiguous = {name: np.require(array, requirements="C") for name, array in tensors.items()}
        save_file(contiguous, temporary, metadata={"format": "pt", **metadata})


def finite(array: np.ndarray) -> bool:
    """No NaN and no infinity: by the exponent's bits, since numpy has no fast test for bfloat16."""
    kind = jnp.finfo(array.dtype)
    bits = np.require(array, requirements="C").view(f"u{array.dtype.itemsize}")
    exponent = bits.dtype.type(((1 << kind.nexp) - 1) << kind.nmant)
    return not ((bits & exponent) == exponent).any()


def _field(dtype: str, shape: tuple[int, ...], start: int, stop: int) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
