"""Peak memory and rate of loading a large sharded checkpoint into the decoder.

    python -m benchmarks.load_decoder --layers 20 --shards 4

Writes a random bfloat16 Llama of the given layers (20 of them: 2.3 GB), reads the files plainly, then loads them in a
process of its own; both find them in the page cache. `peak` is the largest resident memory of that process (VmHWM),
interpreter and JAX included; `limit` is the parameters, the largest stacked tensor and 300 MB.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

import jax

from benchmarks.checkpoints import config_of, llama_shapes, write_llama
from benchmarks.memory import MB, in_own_process, measure
from peanut_jax.models.loading import load_decoder


def read_seconds(folder: Path) -> float:
    """A plain read of the files, in blocks of 16 MB."""
    began, block = time.perf_counter(), bytearray(1 << 24)
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, metavar="DIR", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return measure(lambda: jax.block_until_ready(load_decoder(args.work)[1]))

    config = config_of(args.layers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "base"
        total = write_llama(folder, config, args.shards)
        sizes = {name: 2 * math.prod(shape) for name, shape in llama_shapes(config)}
        stacked = args.layers * sizes["model.layers.0.mlp.up_proj.weight"]
        limit = (total + max(stacked, sizes["lm_head.weight"])) / MB + 300
        for _ in range(args.repeats):
            plain = read_seconds(folder)
            figures = in_own_process("benchmarks.load_decoder", "--work", str(folder))
            figures |= {
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
