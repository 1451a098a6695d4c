"""Tables of text: files of this machine, and data sets of the hub."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}
_NO_QUOTING = 3  # as in GLUE's .tsv files, where a quotation mark is one of the text


def read_table(source: str, columns: list[str]) -> datasets.Dataset:
    """The named columns of a file or data set, and no others.

    Args:
        source: A .json, .jsonl, .csv or .tsv file, or a hub name as `NAME:SPLIT` or `NAME/CONFIG:SPLIT`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a source of neither kind; a column that is not there.
    """
    path = Path(source)
    table = _read_file(path) if path.suffix in _READERS else _read_hub(source)
    if absent := [name for name in columns if name not in table.column_names]:
        raise ValueError(f"{source} has no column {absent[0]!r}, only {', '.join(table.column_names)}")
    return table.select_columns(columns)


def _read_file(path: Path) -> datasets.Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"there is no data file {path}")
    options = {"delimiter": "\t", "quoting": _NO_QUOTING} if path.suffix == ".tsv" else {}
    return datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train", **options)


def _read_hub(source: str) -> datasets.Dataset:
    name, colon, split = source.rpartition(":")
    if not colon:
        raise ValueError(
            f"data must be a {', '.join(_READERS)} file or NAME:SPLIT of the hub, such as nyu-mll/glue/sst2:train, "
            f"got {source!r}"
        )
    parts = name.split("/")
    return datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split)


def check_text(table: datasets.Dataset, source: str, columns: list[str]) -> None:
    """Refuses columns that do not hold text in every row.

    Raises:
        ValueError: naming the column, and its type or how many rows are empty.
    """
    for name in columns:
        if table.features[name].dtype not in ("string", "large_string"):
            raise ValueError(f"column {name!r} of {source} must hold text, found {table.features[name].dtype}")
        if empty := table.data.column(name).null_count:
            raise ValueError(f"column {name!r} of {source} is empty in {empty} of {len(table)} rows")


def digest_table(table: datasets.Dataset, columns: Sequence[str]) -> str:
    """A digest of every value of these columns, in order, wherever the table came from and however it is stored."""
    found = hashlib.sha256()
    for name in columns:
        column = table.data.column(name)
        # Lengths and contents in streams of their own: where one chunk of the column ends must not count.
        streams = [hashlib.sha256(), hashlib.sha256()]
        for chunk in column.chunks:
            _add_chunk(streams, chunk)
        found.update(f"{name}:{len(column)};".encode() + b"".join(one.digest() for one in streams))
    return found.hexdigest()


def _add_chunk(streams: Sequence[Any], chunk: pa.Array) -> None:
    """Adds an array of texts, integers or lists of integers: (lengths or presence, contents)."""
    lengths, contents = streams
    kind = chunk.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        texts = chunk.cast(pa.large_string())
        lengths.update(_numbers(pc.binary_length(texts), pa.int64(), -1))
        ends = np.frombuffer(texts.buffers()[1], np.int64)[texts.offset : texts.offset + len(texts) + 1]
        if len(texts) and ends[0] < ends[-1]:
            contents.update(memoryview(texts.buffers()[2])[ends[0] : ends[-1]])
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths.update(_numbers(pc.list_value_length(chunk), pa.int64(), -1))
        contents.update(_numbers(chunk.flatten(), pa.int64(), 0))
    else:
        lengths.update(_numbers(chunk.is_valid(), pa.int8(), 0))
        contents.update(_numbers(chunk, pa.int64(), 0))


def _numbers(array: pa.Array, kind: pa.DataType, empty: int) -> memoryview:
    return np.ascontiguousarray(array.cast(kind).fill_null(empty).to_numpy(zero_copy_only=False)).data
