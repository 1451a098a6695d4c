"""Tables of text: files of this machine, and data sets of the hub."""

import contextlib
import errno
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from peanut_jax.messages import short

_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"}
# What damaged files were seen to raise in datasets, pandas and pyarrow.
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)
_TOLD = 200  # characters of such an error
_NO_QUOTING = 3  # as in GLUE's .tsv files, where a quotation mark is one of the text


def read_table(source: str, columns: list[str]) -> datasets.Dataset:
    """The named columns of a file or data set, and no others.

    Args:
        source: A .json, .jsonl, .csv or .tsv file, or a hub name as `NAME:SPLIT` or `NAME/CONFIG:SPLIT`.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: a file or a data set that cannot be read; no room for it in the cache of datasets.
        ValueError: a source of neither kind; a file that is damaged or has no rows; a column that is not there.
    """
    path = Path(source)
    table = _read_file(path) if path.suffix in _READERS else _read_hub(source)
    if absent := [name for name in columns if name not in table.column_names]:
        raise ValueError(
            f"{source} has no column {absent[0]!r}, only {short(', '.join(table.column_names), 200)[1:-1]}"
        )
    return table.select_columns(columns)


def _read_file(path: Path) -> datasets.Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"there is no data file {path}")
    options = {"delimiter": "\t", "quoting": _NO_QUOTING} if path.suffix == ".tsv" else {}
    with _named(str(path)):
        return datasets.load_dataset(_READERS[path.suffix], data_files=str(path), split="train", **options)


def _read_hub(source: str) -> datasets.Dataset:
    name, colon, split = source.rpartition(":")
    if not colon:
        raise ValueError(
            f"data must be a {', '.join(_READERS)} file or NAME:SPLIT of the hub, such as nyu-mll/glue/sst2:train, "
            f"got {short(source)}"
        )
    parts = name.split("/")
    with _named(source):
        return datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split)


@contextlib.contextmanager
def _named(source: str) -> Iterator[None]:
    """Tells with the source's name what went wrong with it, as an OSError or a ValueError.

    datasets has errors of its own kind, which hide their cause, and ends an empty file with a StopIteration.
    """
    try:
        yield
    except StopIteration as error:
        raise ValueError(f"{source} has no rows") from error
    except (datasets.exceptions.DatasetsError, OSError, *_DAMAGE) as error:
        causes = list(_causes(error))
        for cause in causes:
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                place = datasets.config.HF_DATASETS_CACHE
                text = f"{cause.strerror}, reading {source} into the cache {place} of datasets (HF_DATASETS_CACHE)"
                raise OSError(cause.errno, text) from error
        inner = causes[-1] if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        kind = next((one for one in (FileNotFoundError, OSError) if isinstance(inner, one)), ValueError)
        text = str(inner).strip().partition("\n")[0][:_TOLD] or type(inner).__name__
        raise kind(f"{source} cannot be read: {text}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


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
