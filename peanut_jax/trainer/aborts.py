"""How a process of several ends when JAX's runtime ends it: with one line, its traces in a file.

JAX's distributed client watches the other processes from C++. When one has died, is frozen or cannot be reached it
prints a trace and calls abort(); the callback that it offers instead cannot be a Python function (jaxlib 0.10 has no
Python type for its argument). So abort's signal, SIGABRT, gets a handler, and what C++ prints a file.
"""

import contextlib
import ctypes
import logging
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TAIL_BYTES = 1 << 16
_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_SHOW_CURSOR = b"\x1b[?25h\n"  # which a progress bar hides


@contextlib.contextmanager
def told(process: int, heartbeat_s: int) -> Iterator[None]:
    """Ends the process with one line on stderr and status 1 where the runtime aborts it within the block.

    What the runtime prints, as opposed to Python, goes to a file for as long as the block lasts. It is removed where
    the block ends well, and else named.

    Args:
        process: Which this is.
        heartbeat_s: After how many seconds without an answer the runtime takes a process for dead.
    """
    handle, name = tempfile.mkstemp(prefix=f"peanut-jax-process-{process}-", suffix=".log")
    with os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace") as user:

        def aborted(_: int) -> None:
            try:
                if user.isatty():
                    os.write(user.fileno(), _SHOW_CURSOR)
                os.write(user.fileno(), f"{reason(_tail(name), process, heartbeat_s)} (its trace: {name})\n".encode())
            finally:
                os._exit(1)

        with _streams(handle, user), _on_abort(aborted):
            yield
    Path(name).unlink(missing_ok=True)


def reason(trace: str, process: int, heartbeat_s: int) -> str:
    """What a trace of JAX's distributed client says, in words, and how to go on.

    Examples:
        >>> from peanut_jax.trainer.aborts import reason
        >>> reason("F1121 client.h:80] Failed to send RPC to coordination service", 2, 30)[:60]
        'train: process 2 stops: process 0, which holds the others to'
    """
    silent = re.search(r"stopped sending heartbeats\):((?:\s+(?:/\S*:)?\d+)+)", trace)
    if silent:
        names = ", ".join(re.findall(r"(\d+)(?=\s|$)", silent[1]))
        what = f"process {names} has not answered for {heartbeat_s} s: it has died, is frozen or cannot be reached"
    elif "CoordinationService/Heartbeat" in trace:
        what = f"process 0 has not answered for {heartbeat_s} s: it has died, is frozen or cannot be reached"
    elif "Failed to send RPC to coordination service" in trace or "Socket closed" in trace:
        what = "process 0, which holds the others together, has ended or cannot be reached: see its output"
    else:
        what = "JAX's runtime has aborted it"
    return f"train: process {process} stops: {what}. Go on with --resume"


def _tail(name: str) -> str:
    with open(name, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        return file.read().decode(errors="replace")


@contextlib.contextmanager
def _streams(handle: int, user: Any) -> Iterator[None]:
    """Gives descriptor 2 to the file, and Python, its loggers too, the stderr that the user sees."""
    python, shown = sys.stderr, os.dup(2)
    python.flush()
    os.dup2(handle, 2)
    os.close(handle)
    sys.stderr = user
    moved = _loggers_write(python, user)
    try:
        yield
    finally:
        user.flush()
        for handler in moved:
            handler.setStream(python)
        sys.stderr = python
        os.dup2(shown, 2)
        os.close(shown)


def _loggers_write(old: Any, new: Any) -> list[logging.StreamHandler]:
    known = [one for one in logging.root.manager.loggerDict.values() if isinstance(one, logging.Logger)]
    handlers = {handler for logger in (logging.root, *known) for handler in logger.handlers}
    moved = [one for one in handlers if isinstance(one, logging.StreamHandler) and one.stream is old]
    for handler in moved:
        handler.setStream(new)
    return moved


@contextlib.contextmanager
def _on_abort(call: Any) -> Iterator[None]:
    """Calls a function where the process aborts, in the thread that does; Python's own handlers would come too late."""
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    handler = _HANDLER(call)
    before = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, before)
        del handler  # it had to live until here
