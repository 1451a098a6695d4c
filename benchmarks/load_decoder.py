"""Peak memory and rate of loading a large sharded checkpoint into the decoder.

    python -m benchmarks.load_decoder --layers 20 --shards 4

Writes a random bfloat16 Llama of the given layers (20 of them: 2.3 GB), reads the files plainly, then loads them in a
process of its own; both find them in the page cache. `peak` is the largest resident memory of that process (VmHWM),
interpreter and JAX included; `limit` is the parameters, the largest stacked tensor and 300 MB. With `--processes 2` two
processes load it together onto `fsdp=2`, and the largest peak and the slower one's seconds count.
"""

import argparse
import json
import math
import socket
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.checkpoints import config_of, llama_shapes, write_llama
from benchmarks.memory import MB, in_own_processes, measure
from peanut_jax.models.loading import load_decoder
from peanut_jax.sharding import make_mesh


def read_seconds(folder: Path) -> float:
    """A plain read of the files, in blocks of 16 MB."""
    began, block = time.perf_counter(), bytearray(1 << 24)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return time.perf_counter() - began


def work(args: argparse.Namespace) -> None:
    """Loads the checkpoint, on this process's share of the mesh."""
    if args.processes > 1:
        jax.distributed.initialize(f"localhost:{args.port}", args.processes, args.process_id)
    mesh = make_mesh("fsdp=-1") if args.processes > 1 else None
    measure(lambda: jax.block_until_ready(load_decoder(args.work, mesh=mesh)[1]))


def load_apart(folder: Path, processes: int) -> dict:
    """The figures of that many processes, the largest of each."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        port = server.getsockname()[1]
    shared = ("--work", str(folder), "--processes", str(processes), "--port", str(port))
    found = in_own_processes("benchmarks.load_decoder", [(*shared, "--process-id", str(i)) for i in range(processes)])
    return {name: max(figures[name] for figures in found) for name in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--work", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    parser.add_argument("--process-id", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args)

    config = config_of(args.layers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "base"
        total = write_llama(folder, config, args.shards)
        sizes = {name: 2 * math.prod(shape) for name, shape in llama_shapes(config)}
        stacked = args.layers * sizes["model.layers.0.mlp.up_proj.weight"]
        limit = (total + max(stacked, sizes["lm_head.weight"])) / MB + 300
        for _ in range(args.repeats):
            plain = read_seconds(folder)
            figures = load_apart(folder, args.processes)
            figures |= {
                "processes": args.processes,
                "parameters_mb": total / MB,
                "largest_stacked_mb": stacked / MB,
                "limit_mb": limit,
                "peak_over_limit": figures["peak_mb"] / limit,
                "gb_per_second": total / 1e9 / figures["seconds"],
                "plain_read_gb_per_second": total / 1e9 / plain,
            }
            print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
