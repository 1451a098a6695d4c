"""Folders of results: written whole or not at all, and never over somebody else's files."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def check(out: Path, marker: str) -> None:
    """Refuses a folder that is not ours to write into.

    Args:
        out: Where the results shall go.
        marker: The file by which an earlier run's folder is known.

    Raises:
        FileExistsError: if `out` is a file, or has content and no `marker`.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose a folder that is new, empty or of an earlier run")
    if out.is_dir() and any(out.iterdir()) and not (out / marker).is_file():
        raise FileExistsError(f"{out} is not empty and holds no {marker} of an earlier run; choose another folder")


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A new empty folder; when the block ends well, its entries replace those of the same name in `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        yield Path(scratch)
        out.mkdir(exist_ok=True)
        for item in Path(scratch).iterdir():
            earlier = out / item.name
            if earlier.is_dir():
                shutil.rmtree(earlier)
            item.replace(earlier)
