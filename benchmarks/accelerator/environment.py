"""What is at hand: device, versions, memory, and what its matrix products and copies reach."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from benchmarks.accelerator.context import Context
from benchmarks.accelerator.record import Record
from benchmarks.accelerator.sizes import FULL, TOY, Sizes
from benchmarks.accelerator.weights import uniform
from benchmarks.timing import repeated
from peanut_jax.messages import one_line

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "peft", "transformers", "jax-cuda13-plugin", "libtpu")
# Products or copies in one program, so that starting it does not count.
IN_A_ROW = 10


def run(record: Record, context: Context) -> None:
    """The device; the sizes that suit it, where none were asked for; and its peaks."""
    sizes = context.chosen or (TOY if jax.default_backend() == "cpu" else FULL)
    record.run("device", lambda: describe(sizes, context.chosen is not None))
    seconds = sizes.repeat_seconds / 2
    for side in sizes.matmuls:
        record.run(f"matmul {side}", partial(matmul, side, seconds))
    record.run("copy", partial(copy, sizes.copy_bytes, seconds))


def describe(sizes: Sizes, asked: bool) -> dict[str, Any]:
    """The device as jax and its driver name it."""
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    return {
        "sizes": sizes.name,
        "sizes_chosen_by": "--sizes" if asked else "the device",
        "backend": jax.default_backend(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "memory_bytes": stats.get("bytes_limit"),
        "platform_version": one_line(getattr(getattr(device, "client", None), "platform_version", "")),
        "driver": nvidia_smi() if jax.default_backend() == "gpu" else None,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in PACKAGES},
        "flags": flags(),
    }


def flags() -> Mapping[str, str]:
    """What the environment says to XLA and jax."""
    return {
        name: value for name, value in os.environ.items() if name.startswith(("XLA_", "JAX_", "LIBTPU_", "NVIDIA_TF"))
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_smi() -> str | None:
    """The cards as the driver names them: name, driver, memory, clocks, power limit."""
    fields = "name,driver_version,memory.total,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def matmul(side: int, seconds: float) -> dict[str, Any]:
    """bfloat16 products of random square matrices, one after the other."""

    @jax.jit
    def products(a: Array, c: Array) -> Array:
        return lax.fori_loop(0, IN_A_ROW, lambda _, c: a @ c, c)

    # A deviation of 1 / sqrt(side) keeps the products' size, however many there are.
    a, c = (jax.jit(lambda seed=seed: uniform((side, side), jnp.bfloat16, seed, side**-0.5))() for seed in range(2))
    median = float(np.median(repeated(lambda: jax.block_until_ready(products(a, c)), seconds=seconds))) / IN_A_ROW
    return {"median_seconds": median, "tflops": 2 * side**3 / median / 1e12}


def copy(size: int, seconds: float) -> dict[str, Any]:
    """One array read and another written; bytes of both count."""

    @jax.jit
    def copies(x: Array) -> Array:
        return lax.fori_loop(0, IN_A_ROW, lambda _, x: x + jnp.uint32(1), x)

    x = jnp.zeros(size // 4, jnp.uint32)
    median = float(np.median(repeated(lambda: jax.block_until_ready(copies(x)), seconds=seconds))) / IN_A_ROW
    return {"median_seconds": median, "gb_per_second": 2 * size / median / 1e9}
