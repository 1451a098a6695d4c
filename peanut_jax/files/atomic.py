"""Files and folders that appear whole or not at all."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """A new text file, which appears under its name once it is whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an OSError of the block that names no file, as a write to a full disk does, the name of this one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def close_after(
    close: Callable[[], None], kind: type[BaseException] | None, tell: Callable[[str, object], None]
) -> None:
    """Closes what a `with` block had; an OSError of it is logged by `tell` where the block ended by an error of `kind`,
    which is the one to be seen."""
    try:
        close()
    except OSError as error:
        if kind is None:
            raise
        tell("%s", error)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its name at the end, or is removed after an error."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        with naming(path):
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            _sync(temporary)
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_entries(folder: Path) -> Iterator[Path]:
    """A new empty folder; when the block ends well, its entries replace those of the same name in `folder`.

    Everything else in `folder` stays, and after an error all of it does.
    """
    with _parents(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        yield Path(scratch)
        folder.mkdir(exist_ok=True)
        for item in Path(scratch).iterdir():
            earlier = folder / item.name
            if earlier.is_dir():
                shutil.rmtree(earlier)
            item.replace(earlier)


def refuse_foreign(folder: Path, marker: str) -> None:
    """Refuses a folder for results that is not ours to write into.

    Args:
        folder: Where the results go.
        marker: The file by which the folder of an earlier run is known.

    Raises:
        FileExistsError: `folder` is a file, or has content and no `marker`.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; choose a folder that is new, empty or of an earlier run")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise FileExistsError(f"{folder} is not empty and holds no {marker} of an earlier run; choose another folder")


def refuse_filled(path: Path, overwrite: bool, marker: str) -> None:
    """Refuses an output folder that holds something; with `overwrite`, something else than what `marker` tells.

    Raises:
        FileExistsError: the path is a file; the folder is not empty, and `overwrite` is false or it lacks the marker.
        OSError: it could not be made, or not be written into.
    """
    there = next(one for one in (path, *path.absolute().parents) if one.exists())
    if there != path and not there.is_dir():
        raise NotADirectoryError(f"{there} is a file, so that no folder can be made in it; give another folder")
    if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{there} cannot be written into: permission denied; give another folder")
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file, not a folder; give another folder")
    filled = path.is_dir() and any(path.iterdir())
    if filled and not overwrite:
        raise FileExistsError(f"{path} exists; give another folder, or overwrite=True (--overwrite) to replace it")
    if filled and not (path / marker).is_file():
        raise FileExistsError(
            f"{path} holds no {marker}, so it was not written here, and is not replaced; remove it first"
        )


@contextlib.contextmanager
def new_folder(path: Path, overwrite: bool, marker: str) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name at the end, or is removed after an error.

    Args:
        overwrite: Replace a folder of that name, which stays until the new one is whole.
        marker: A file that a folder must hold to be replaced, so that a slip of the hand loses nothing else.

    Raises:
        FileExistsError: the folder exists and is not empty, and `overwrite` is false or it lacks the marker.
    """
    path = resolved(path)
    refuse_filled(path, overwrite, marker)
    with _parents(path), _appearing(path) as temporary:
        yield temporary


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        old = temporary.with_name(f"{temporary.name}.old")
        if path.exists():
            path.replace(old)
        try:
            temporary.replace(path)
        except BaseException:
            if old.exists():
                old.replace(path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(error.errno, f"{error.strerror}, writing {path}; nothing of it was left behind") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """The folders that `path` is to lie in; those that were made for it go again after an error."""
    made = [one for one in path.parents if not one.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for one in made:
            with contextlib.suppress(OSError):  # not empty: something else was put there meanwhile
                one.rmdir()
        raise


def check_apart(folder: Path, *sources: Path) -> None:
    """Refuses an output folder that is, holds or lies in one of the folders that are read."""
    folder = resolved(folder)
    for source in map(resolved, sources):
        if source == folder or source in folder.parents or folder in source.parents:
            raise ValueError(f"the output folder {folder} and {source}, which is read, must lie apart")


def resolved(path: Path) -> Path:
    """The path without links.

    Raises:
        OSError: links that lead in a circle.
    """
    try:
        return Path(path).resolve()
    except RuntimeError as error:  # an OSError from Python 3.13 on
        raise OSError(errno.ELOOP, "links that lead in a circle", str(path)) from error


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
