"""Peak memory and rate of merging an adapter into a large sharded checkpoint, and of exporting it as LoRA.

    python -m benchmarks.export_merged --layers 20 --shards 4 --rank 32

Writes a random bfloat16 Llama of the given layers (20 of them: 2.3 GB) and an adapter for q, k, v, up and down, then
runs each road in a process of its own. `peak` is the largest resident memory of that process (VmHWM), interpreter and
JAX included; `start` is what it was before the work.
"""

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.checkpoints import config_of, llama_shapes, write_llama
from benchmarks.memory import MB, in_own_process, measure
from peanut_jax import PeanutConfig
from peanut_jax.interop.lora import to_lora_folder
from peanut_jax.interop.merged import merge_folders
from peanut_jax.interop.peft_folder import ModuleAdapters, write

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


def write_adapter(folder: Path, config: dict, rank: int, depth: int) -> None:
    """A random adapter as its files hold it; it has no fingerprint, so that the same base need not be read twice."""
    rng, thetas = np.random.default_rng(1), {}
    for name, shape in llama_shapes(config):
        module = name.removesuffix(".weight")
        if module.endswith(TARGETS):
            d_out = shape[0]
            theta = {"a": rng.standard_normal((d_out, rank)), "b": rng.standard_normal((rank, d_out))}
            if depth:
                theta |= {pair: rng.standard_normal((depth, rank, rank)) for pair in ("encoders", "decoders")}
            thetas[module] = {leaf: (0.02 * array).astype(np.float32) for leaf, array in theta.items()}
    write(folder, ModuleAdapters(PeanutConfig(r=rank, depth=depth, target_modules=TARGETS), thetas, {}))


def work(road: str, folder: Path) -> None:
    """One road, measured in this process."""
    jax.block_until_ready(jax.numpy.zeros(1))
    base, adapter = folder / "base", folder / "adapter"
    if road == "merge":
        measure(lambda: merge_folders(base, [adapter], folder / "merged"))
    else:
        measure(lambda: to_lora_folder(adapter, base, folder / "lora"))


def copy_seconds(folder: Path) -> float:
    """A plain copy of the same files, for the rate of the disk."""
    began = time.perf_counter()
    subprocess.run(["cp", "-r", str(folder / "base"), str(folder / "copy")], check=True)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--depth", type=int, default=0)
    parser.add_argument("--work", nargs=2, metavar=("ROAD", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return work(args.work[0], Path(args.work[1]))

    config = config_of(args.layers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        total = write_llama(folder / "base", config, args.shards)
        write_adapter(folder / "adapter", config, args.rank, args.depth)
        shard = max(file.stat().st_size for file in (folder / "base").glob("*.safetensors")) / MB
        kernel = max(2 * np.prod(shape) for name, shape in llama_shapes(config) if "proj" in name) / MB
        copied = copy_seconds(folder)
        for road in ("merge", "lora"):
            figures = in_own_process("benchmarks.export_merged", "--work", road, temporary)
            limit = shard + kernel
            print(
                json.dumps(
                    {
                        "road": road,
                        **figures,
                        "checkpoint_gb": total / 1e9,
                        "largest_shard_mb": shard,
                        "largest_kernel_mb": kernel,
                        "limit_mb": limit,
                        "peak_over_limit": figures["peak_mb"] / limit,
                        "gb_per_second": total / 1e9 / figures["seconds"],
                        "plain_copy_gb_per_second": total / 1e9 / copied,
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
