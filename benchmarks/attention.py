"""What attention costs by row length: temporary bytes of what a TPU would run, and seconds of the roads on this device.

    python -m benchmarks.attention                              # seconds here, forward and backward, of each road
    python -m benchmarks.attention --slice v5p-8 --kind kernel  # attention alone, compiled for one chip of the slice
    python -m benchmarks.attention --slice v5p-8 --kind step    # the train step of Llama-3-8B's shapes, the same

JSON lines. Bytes are libtpu's `memory_analysis()`, what the chip needs, from shapes alone; `pip install libtpu`.
`ratio` is the temporaries over those of the length before: 4 for four times the length is linear, 16 quadratic.
"""

import argparse
import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import peanut_jax as pj
from benchmarks.shapes import FIVE_TARGETS, decoder_config
from benchmarks.timing import alternate
from peanut_jax.models.attention.roads import attend_rows
from peanut_jax.models.attention.sight import Window, make_sight
from peanut_jax.plan.step import Setting
from peanut_jax.sharding import batch_sharding, make_mesh, tracing_for
from peanut_jax.topologies import slice_devices

ADAPTER = pj.PeanutConfig(r=32, target_modules=FIVE_TARGETS)
LENGTHS = {"time": (256, 512, 1024, 2048, 4096), "kernel": (8192, 32768), "step": (8192, 32768)}


def gradients(road: str, packed: bool) -> Callable:
    """q, k, v, segments, slope of the output -> the output and the gradients."""

    def run(q: Any, k: Any, v: Any, segments: Any, slope: Any) -> Any:
        sight = make_sight(segments.shape, segments != 0, segments) if packed else make_sight(segments.shape)
        every = Window(None, (None,))
        out, pull = jax.vjp(lambda q, k, v: attend_rows(q, k, v, sight, every, road), q, k, v)
        return out, pull(slope)

    return run


def shapes(args: argparse.Namespace, seq: int, sharding: Any = None) -> list[jax.ShapeDtypeStruct]:
    def one(heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((args.batch, seq, heads, args.head_dim), jnp.dtype(args.dtype), sharding=sharding)

    segments = jax.ShapeDtypeStruct((args.batch, seq), jnp.int32, sharding=sharding)
    return [one(args.heads), one(args.kv_heads), one(args.kv_heads), segments, one(args.heads)]


def time_here(args: argparse.Namespace, seq: int) -> Iterator[dict]:
    """Seconds of each road on this device, in turn."""
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=one.shape), one.dtype) for one in shapes(args, seq)]
    arrays[3] = jnp.asarray(np.sort(rng.integers(1, 5, (args.batch, seq))), jnp.int32)
    runs = {}
    for packed in (False, True):
        for road in args.roads:
            step = jax.jit(gradients(road, packed))
            runs[f"{road}{' packed' if packed else ''}"] = functools.partial(_blocked, step, arrays)
    seconds = alternate(runs, args.repeats)
    for name, taken in seconds.items():
        yield {"seq": seq, "road": name, "ms": 1e3 * float(np.median(taken))}


def _blocked(step: Callable, arrays: list) -> None:
    jax.block_until_ready(step(*arrays))


def compile_kernel(args: argparse.Namespace, seq: int, mesh: Mesh) -> Any:
    """Attention alone, forward and backward, of packed rows."""
    with tracing_for(mesh):
        return jax.jit(gradients(args.road, True)).lower(*shapes(args, seq, batch_sharding(mesh))).compile()


def compile_step(args: argparse.Namespace, seq: int, mesh: Mesh) -> Any:
    """A train step of Llama-3-8B's shapes, scanned, with PEANuT of rank 32."""
    changes = {"num_hidden_layers": args.layers, "max_position_embeddings": seq}
    config = decoder_config("llama-3-8b", changes=changes, remat=args.remat, attention=args.road)
    return Setting(config=config, adapter=ADAPTER, batch_size=args.batch, seq_len=seq).compile(mesh)


def memory(args: argparse.Namespace) -> Iterator[dict]:
    """Temporary bytes of each length, and their ratio to those of the length before."""
    compile_one = {"kernel": compile_kernel, "step": compile_step}[args.kind]
    mesh, before = make_mesh("data=1", slice_devices(args.slice)[:1]), None
    for seq in args.seqs:
        compiled = compile_one(args, seq, mesh)
        used = compiled.memory_analysis().temp_size_in_bytes
        found = {"kind": args.kind, "road": args.road, "seq": seq, "temporary_gb": used / 1e9}
        found |= (
            {"remat": args.remat, "arguments_gb": compiled.memory_analysis().argument_size_in_bytes / 1e9}
            if args.kind == "step"
            else {}
        )
        yield found | ({} if before is None else {"ratio": used / before})
        before = used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=tuple(LENGTHS), default="time")
    parser.add_argument("--slice", default="v5p-8", help="whose chip to compile for")
    parser.add_argument("--seqs", type=int, nargs="+", help="tokens of a row")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--remat", default="full")
    parser.add_argument("--road", default="auto")
    parser.add_argument("--roads", nargs="+", default=["xla", "chunked"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    args.seqs = args.seqs or LENGTHS[args.kind]
    found = (
        memory(args) if args.kind in ("kernel", "step") else (one for seq in args.seqs for one in time_here(args, seq))
    )
    for one in found:
        print(json.dumps(one), flush=True)


if __name__ == "__main__":
    main()
