"""Tables of text: files of this machine, and data sets of the hub."""

from pathlib import Path

import datasets

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
