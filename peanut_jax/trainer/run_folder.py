"""One folder a run: locked while the run lives, and described by `run.json`."""

import contextlib
import datetime
import json
import logging
import os
import platform
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from filelock import FileLock, Timeout

import peanut_jax as pj
from peanut_jax.files.atomic import write_text
from peanut_jax.files.untrusted import read_json
from peanut_jax.messages import one_line

logger = logging.getLogger(__name__)

RUN, COPY, LOCK, HOLDER = "run.json", ".run.json.copy", ".lock", ".holder"
# Fields of run.json: where the config came from (`reading.Origin`), what the checkpoints are of, and the resumes.
# The remat policy that was chosen, and on which devices.
SOURCE, IDENTITY, RESUMED, REMAT = "source", "identity", "resumed", "remat"
_KINDS = {"config": dict, SOURCE: dict, IDENTITY: dict, RESUMED: list, REMAT: dict}
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


@contextlib.contextmanager
def open_run(folder: Path, *, resume: bool) -> Iterator[Path]:
    """Holds a run's folder for as long as the block lasts; no other process can then open it.

    The lock is the kernel's and ends with the process, however that ends: a killed run can be resumed at once. Where
    the block ends before a run.json was written, `folder` is left as it was.

    Args:
        folder: The run's; created with its parents where there is none yet.
        resume: Whether an earlier run in `folder` goes on. A folder that holds a `run.json` holds a run.

    Yields:
        `folder`, known to take writes.

    Raises:
        ValueError: if `folder` is a file, is in use by another run, holds a run and `resume` is False, holds none and
            `resume` is True, holds something else, or cannot be written into.
    """
    with contextlib.ExitStack() as stack:
        try:
            _refuse_foreign(folder, resume)
            new = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            stack.callback(_locked(folder).release)
            stack.callback(_leave_free, folder, new)
            if not resume and (folder / RUN).exists():
                raise ValueError(f"{folder} holds a run; pass --resume to go on with it, or choose another folder")
            (folder / HOLDER).write_text(f"process {os.getpid()} on {socket.gethostname()}")
        except OSError as error:
            raise ValueError(f"cannot write into {folder}: {error.strerror or error}") from error
        yield folder


def _refuse_foreign(folder: Path, resume: bool) -> None:
    """Before anything is written: a place that is neither free nor a run's is left as it is."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose a folder that is new or empty")
    if (folder / RUN).exists():
        return
    if resume:
        check_holds_run(folder)
    if folder.is_dir() and not all(_is_ours(path.name) for path in folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no {RUN} of a run; choose a folder that is new or empty")


def check_holds_run(folder: Path) -> None:
    """Refuses to resume in a folder without a run.

    Raises:
        ValueError: as said.
    """
    if not (folder / RUN).exists():
        raise ValueError(f"{folder} holds no run to resume; leave --resume out to start one")


def _is_ours(name: str) -> bool:
    """Whether a run that was killed before it wrote its run.json may have left a file of this name."""
    return name in (LOCK, HOLDER) or name.startswith(f".{RUN}.")


def _leave_free(folder: Path, new: Sequence[Path]) -> None:
    """Removes what only a run needs where none was begun: our files, and the folders that were made, if empty."""
    if (folder / RUN).exists():
        return
    with contextlib.suppress(OSError):  # what is not empty stays, and another run may take it
        for name in (HOLDER, LOCK):
            (folder / name).unlink(missing_ok=True)
        for path in new:
            path.rmdir()


def _locked(folder: Path) -> FileLock:
    lock = FileLock(folder / LOCK, blocking=False)
    try:
        lock.acquire()
    except Timeout:  # an OSError too, but not a failure to write
        holder = folder / HOLDER
        who = holder.read_text() if holder.exists() else "unknown process"
        raise ValueError(f"{folder} is in use by another run ({who}); stop it or choose another folder") from None
    return lock


def describe(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run is made of, as plain JSON.

    Args:
        config: The resolved configuration, of JSON's types alone.

    Returns:
        `config`, and what was found here: `versions` by package, `git` (see `_git`), `device` (its kind), the numbers
        `devices` and `processes` of the whole run, and `started` (UTC, ISO 8601).
    """
    return {
        "config": dict(config),
        "versions": _versions(),
        "git": _git(),
        "device": jax.local_devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "started": _now(),
    }


def write_run(folder: Path, description: Mapping[str, Any]) -> None:
    """Writes `run.json` whole or not at all: by it the folder counts as a run's. A hidden copy is for when it is lost.

    Raises:
        TypeError: a description that is not JSON; then nothing is written.
    """
    text = json.dumps(description, indent=2) + "\n"
    write_text(folder / RUN, text)
    write_text(folder / COPY, text)


def read_run(folder: Path, *, tell: bool = False) -> dict[str, Any]:
    """The description in `run.json`, or where that is damaged in its copy.

    Args:
        tell: Log a warning where it is damaged.

    Raises:
        ValueError: if both are missing or damaged.
    """
    try:
        return _read(folder / RUN)
    except (OSError, ValueError) as error:
        try:
            content = _read(folder / COPY)
        except (OSError, ValueError):
            raise ValueError(f"{folder / RUN} cannot be read, nor is there a whole copy: {one_line(error)}") from error
        if tell:
            logger.warning("%s is damaged, its copy is used: %s", folder / RUN, one_line(error))
        return content


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path)
    for name, kind in _KINDS.items():
        if not isinstance(content.get(name, kind()), kind):
            raise ValueError(f"{path}: {name} must be a JSON {'object' if kind is dict else 'array'}")
    if "config" not in content:
        raise ValueError(f"{path} holds no config")
    return content


def update_run(folder: Path, run: Mapping[str, Any], **fields: Any) -> None:
    """Brings `run.json` up to date with the run that goes on, and keeps what it says of the start and of resumes.

    Args:
        run: The resolved configuration, as for `describe`.
        fields: What to replace besides it.
    """
    try:
        description = read_run(folder, tell=True)
    except ValueError as error:
        logger.warning("%s; it is written anew, as if the run began now", error)
        description = describe(run)
    write_run(folder, description | {"config": dict(run), **fields})


def note_resume(folder: Path, step: int) -> None:
    """Adds to the list `resumed` in `run.json` when, with what, and after which step the run goes on."""
    description = read_run(folder)
    resumed = {"time": _now(), "step": step, "git": _git(), "versions": _versions()}
    write_run(folder, description | {RESUMED: [*description.get(RESUMED, []), resumed]})


def _versions() -> dict[str, str]:
    installed = {name: metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "peanut_jax": pj.__version__} | installed


def _git(module: Path = Path(__file__)) -> dict[str, Any] | None:
    """The `commit` of the checkout that tracks `module`, and whether tracked files are `dirty`; None without one."""

    def git(*args: str) -> str:
        command = ("git", "-C", str(module.parent), *args)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        # A virtual environment may lie within a checkout that knows nothing of the package.
        git("ls-files", "--error-unmatch", module.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
