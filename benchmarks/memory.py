"""Seconds and peak resident memory of one piece of work, in a process of its own."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
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
    command = [sys.executable, "-m", module, *arguments]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def _status_mb(field: str) -> float:
    """VmHWM (the peak) or VmRSS (now) of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024 / MB
