"""A section in a process of its own: its lines as they come, a time limit, and why it ended."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
Line = dict[str, Any]
# No downloads, and where Python was when a library crashed.
_ALWAYS = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
# How much of a GPU's memory jax takes at its start.
MEMORY_FLAGS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_PREALLOCATE")


def environment(section: str) -> dict[str, str]:
    """The child's environment: the checkout's modules, no downloads, and nearly all of a GPU's memory for jax.

    What the caller has set stays. jax takes three quarters of a GPU's memory unless it is told otherwise.
    """
    known = {**_ALWAYS, **os.environ}
    if section != "torch" and not any(name in known for name in MEMORY_FLAGS):
        known["XLA_CLIENT_MEM_FRACTION"] = "0.92"
    known["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), known.get("PYTHONPATH"))))
    return known


def run(
    arguments: Sequence[str], environment: Mapping[str, str], log: IO[str], seconds: float, take: Callable[[Line], None]
) -> str | None:
    """Runs `python arguments` and gives each of its JSON lines to `take` as it comes.

    Args:
        log: Gets what the process and its libraries print.
        seconds: After these it is killed, and whatever it started with it.

    Returns:
        Why it ended before its work was done; None where it ended well.
    """
    process = subprocess.Popen(
        [sys.executable, *arguments], env=dict(environment), cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True,
        start_new_session=True,
    )  # fmt: skip
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    deadline = time.monotonic() + seconds
    try:
        while (text := lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
            take(json.loads(text))
        code = process.wait(timeout=max(1.0, deadline - time.monotonic()))
    except (queue.Empty, subprocess.TimeoutExpired):
        return f"ended after {seconds:.0f} s, its time limit"
    finally:
        _kill(process)
    return _reason(code)


def _read(pipe: IO[str], lines: "queue.Queue[str | None]") -> None:
    with pipe:
        for text in pipe:
            lines.put(text)
    lines.put(None)


def _kill(process: subprocess.Popen) -> None:
    """Ends a process that still runs and its whole session, so that nothing it started holds the device."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(code: int) -> str | None:
    if code >= 0:
        return None if code == 0 else f"exit status {code}: log.txt has its last words"
    name = signal.Signals(-code).name
    hint = (
        ", as the system does where the host's memory is short" if name == "SIGKILL" else ": log.txt has its last words"
    )
    return f"ended by {name}{hint}"
