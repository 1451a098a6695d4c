"""Seconds and peak resident memory of one piece of work, in a process of its own."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

MB = 1e6


def measure(work: Callable[[], object]) -> None:
    """Runs `work` here and prints its figures as a JSON line: seconds, resident memory before it and at its peak."""
    start, began = _status_mb("VmRSS"), time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "start_mb": start, "peak_mb": _status_mb("VmHWM")}))


def in_own_process(module: str, *arguments: str) -> dict:
    """The figures of `python -m module arguments`, which calls `measure`."""
    return in_own_processes(module, [arguments])[0]


def in_own_processes(module: str, arguments: Sequence[Sequence[str]]) -> list[dict]:
    """The figures of several such processes that run at the same time."""
    commands = [[sys.executable, "-m", module, *own] for own in arguments]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit(f"{module} failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def _status_mb(field: str) -> float:
    """VmHWM (the peak) or VmRSS (now) of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024 / MB
