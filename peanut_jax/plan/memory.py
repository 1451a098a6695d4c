"""How much memory a device has for a program."""

from pathlib import Path
from typing import Any

import jax

from peanut_jax.plan.chips import CHIPS, chip_name

# Part of a device's memory that a choice leaves free: for the evaluation, fragmentation, and what else there is.
HEADROOM = 0.1


def device_memory(device: Any) -> float | None:
    """Bytes that programs can have on a device in all; None where nothing says.

    What the device itself tells, or else of its chip in `CHIPS`; of a CPU device its part of the memory that is free.
    """
    if device.platform == "cpu":
        return free_host_memory() / len(jax.local_devices(backend="cpu"))
    if limit := _stats(device).get("bytes_limit"):
        return limit
    try:
        return CHIPS[chip_name(device.device_kind)].memory
    except ValueError:
        return None


def free_memory(device: Any) -> float | None:
    """Bytes that are not in use yet on a device that is there; None where nothing says."""
    limit = device_memory(device)
    return limit if limit is None or device.platform == "cpu" else limit - _stats(device).get("bytes_in_use", 0)


def _stats(device: Any) -> dict[str, int]:
    """What the device says of its memory; nothing where it is only a topology's."""
    try:
        return device.memory_stats() or {}
    except (jax.errors.JaxRuntimeError, NotImplementedError, AttributeError):
        return {}


def free_host_memory() -> int:
    """Bytes that this process can still have: of the machine, or within its control group's limit."""
    found = [int(line.split()[1]) << 10 for line in _lines("/proc/meminfo") if line.startswith("MemAvailable:")]
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit():
        found.append(max(0, int(limit[0]) - int(used[0])))
    if not found:
        raise OSError("neither /proc/meminfo nor a control group says how much memory is free: set remat yourself")
    return min(found)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []
