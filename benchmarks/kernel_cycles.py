"""Cycles of attention's Pallas kernels on a TPU, forward and backward, of which XLA's cost estimate knows nothing.

    python -m benchmarks.kernel_cycles --slice v5p-8 --rows 1 --seq 4096 --heads 32 --kv-heads 32

JSON lines, one a kernel. They are read from the schedules that libtpu dumps (`LIBTPU_INIT_ARGS=--xla_jf_dump_to=DIR`,
into a folder that is removed) of attention alone, packed rows in bfloat16. A kernel is one loop over the blocks of all
rows and heads that a TensorCore has, in which parts are skipped: the largest of them, the block itself, where causality
leaves it empty. So its cycles are

    rounds of the loop * (bundles outside of the largest part + share of blocks that are not empty * bundles inside)

at one bundle a cycle: waiting for memory is not in them, the parts that start and end a row of blocks are, every time.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from peanut_jax.models.attention.roads import attend_rows
from peanut_jax.models.attention.sight import Window, make_sight
from peanut_jax.sharding import batch_sharding, make_mesh, tracing_for
from peanut_jax.topologies import parse_slice, slice_devices

# Generation -> (TensorCores that share a program, cycles a second): the peak over what the matrix units do in a cycle.
CHIPS = {"v4": (2, 1.05e9), "v5e": (1, 1.50e9), "v5p": (2, 1.75e9), "v6e": (1, 1.75e9)}
_DUMP = "--xla_jf_dump_to="
_GATE = re.compile(r"sbr\.rel \(")
_BUNDLE = re.compile(r"\s*0x[0-9a-f]+\s")


def attention_kernels(slice_name: str, rows: int, seq: int, heads: int, kv_heads: int, head_dim: int) -> list[dict]:
    """Name, cycles and milliseconds of each kernel, from a process of its own: libtpu reads its flags once."""
    values = {"slice": slice_name, "rows": rows, "seq": seq, "heads": heads, "kv-heads": kv_heads, "head-dim": head_dim}
    flags = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "LIBTPU_INIT_ARGS": _DUMP + folder}
        command = [sys.executable, "-m", "benchmarks.kernel_cycles", *flags, "--dump", folder]
        printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


def compile_attention(args: argparse.Namespace) -> None:
    """Attention to packed rows and its gradients, for one chip."""
    mesh = make_mesh("data=1", slice_devices(args.slice)[:1])

    def run(q: Any, k: Any, v: Any, segments: Any, slope: Any) -> Any:
        sight, every = make_sight(segments.shape, segments != 0, segments), Window(None, (None,))
        out, pullback = jax.vjp(lambda q, k, v: attend_rows(q, k, v, sight, every), q, k, v)
        return out, pullback(slope)

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((args.rows, args.seq, *sizes), dtype, sharding=batch_sharding(mesh))

    q, k = shape(args.heads, args.head_dim), shape(args.kv_heads, args.head_dim)
    with tracing_for(mesh):
        jax.jit(run).lower(q, k, k, shape(dtype=jnp.int32), q).compile()


def kernels_in(folder: Path, rows_and_heads: int, generation: str) -> Iterator[dict]:
    """What the dump of a program with attention's kernels says of each."""
    cores, frequency = CHIPS[generation]
    for schedule in sorted(folder.glob("*-splash_*-final_bundles.txt")):
        if "schedule-analysis" in schedule.name:
            continue
        cycles = cycles_of(schedule.read_text(), rows_and_heads / cores)
        yield {"kernel": schedule.name.split("-")[1], "cycles": cycles, "milliseconds": 1e3 * cycles / frequency}


def cycles_of(schedule: str, on_core: float) -> float:
    """The cycles of one kernel.

    Args:
        schedule: Its final bundles.
        on_core: Rows times heads of one TensorCore.
    """
    bound = max(int(found) for found in re.findall(r"totalorder %\S+, (\d+) /\* loop exit test", schedule))
    total, largest = _parts(schedule)
    rounds = bound - 2  # the first and the last move memory alone
    side = math.isqrt(round(rounds / on_core))
    if side * side * on_core != rounds:
        raise SystemExit(f"{rounds} rounds are not a square of blocks for each of {on_core} rows and heads")
    return rounds * (total - largest + (side + 1) / (2 * side) * largest)


def _parts(schedule: str) -> tuple[int, int]:
    """Bundles of the schedule, and those of the largest part that a branch can skip and that holds no such part."""
    total, largest, opened, nested = 0, 0, list[int](), False
    for line in schedule.splitlines():
        if not _BUNDLE.match(line):
            continue
        if re.match(r"\s*0x[0-9a-f]+\s+PF", line) and opened:
            start = opened.pop()
            largest = largest if nested else max(largest, total - start)
            nested = True
        if _GATE.search(line):
            opened.append(total + 1)
            nested = False
        total += 1
    return total, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slice", default="v5p-8", help="whose chip to compile for")
    for name, default in {"rows": 1, "seq": 4096, "heads": 32, "kv-heads": 32, "head-dim": 128}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dump", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    found: Iterable[dict]
    if args.dump is None:
        found = attention_kernels(args.slice, args.rows, args.seq, args.heads, args.kv_heads, args.head_dim)
    else:
        compile_attention(args)
        found = kernels_in(args.dump, args.rows * args.heads, parse_slice(args.slice)[0])
    for one in found:
        print(json.dumps(one), flush=True)


if __name__ == "__main__":
    main()
