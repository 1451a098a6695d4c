"""What one layer costs a train step on a TPU, as libtpu's compiler sees it: LoRA, and PEANuT over it. Nothing is run.

    python -m benchmarks.tpu_step --rows 16 1 4 --seq 256 4096 4096 --depth 0 2

The step that `peanut-jax plan` compiles, with AdamW, bfloat16, packed rows, rank 32 on q, k, v,
up and down, is compiled for one chip of the slice, with 2 and with 4 layers, unrolled since a loop's body counts once.
Half of the difference is a layer's: XLA's FLOPs and bytes, libtpu's `optimal_seconds`, and temporary bytes. A compile
takes one to three minutes of one core. JSON lines.

The estimate counts the bytes of a Pallas kernel and none of its time. That of attention's kernels is read from their
schedules (see `benchmarks.kernel_cycles`) and added: `milliseconds` is the sum, `kernel_milliseconds` what was added.
`_over_lora` are ratios to LoRA's row of the same batch and remat policy.
"""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

import peanut_jax as pj
from benchmarks.kernel_cycles import attention_kernels
from benchmarks.shapes import FIVE_TARGETS, NAMES, decoder_config
from peanut_jax.methods.base import Method
from peanut_jax.models.decoder_config import ATTENTIONS, REMAT_POLICIES
from peanut_jax.plan.step import Setting
from peanut_jax.sharding import make_mesh
from peanut_jax.topologies import slice_devices

LAYERS = (2, 4)
LONGEST = 32768  # tokens of a row that may be asked for
RATIOS = ("milliseconds", "bytes", "temporary_bytes", "flops")


def compiled_step(args: argparse.Namespace, method: Method, layers: int, batch: tuple[int, int], mesh: Mesh) -> Any:
    """The step for a batch of (rows, seq), compiled."""
    changes = {"num_hidden_layers": layers, "max_position_embeddings": LONGEST}
    config = decoder_config(args.model, changes=changes, remat=args.remat, attention=args.attention, unroll=layers)
    return Setting(config=config, adapter=method, batch_size=batch[0], seq_len=batch[1]).compile(mesh)


def costs(compiled: Any) -> dict[str, float]:
    """What the compiler says of the whole program."""
    counted = compiled.cost_analysis()
    return {
        "milliseconds": 1e3 * counted["optimal_seconds"],
        "flops": counted["flops"],
        "bytes": counted["bytes accessed"],
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
    }


def layer_costs(args: argparse.Namespace, method: Method, batch: tuple[int, int], mesh: Mesh) -> dict[str, float]:
    """Those of one layer."""
    few, many = (costs(compiled_step(args, method, layers, batch, mesh)) for layers in LAYERS)
    return {name: (many[name] - few[name]) / (LAYERS[1] - LAYERS[0]) for name in few}


def methods(args: argparse.Namespace) -> dict[tuple[str, int | None], Method]:
    """(Name, depth) -> its config; LoRA is always there, to be compared with."""
    shared = {"r": args.rank, "target_modules": FIVE_TARGETS}
    found: dict[tuple[str, int | None], Method] = {("lora", None): pj.LoraConfig(**shared)}
    for depth in args.depth if "peanut" in args.method else ():
        found["peanut", depth] = pj.PeanutConfig(**shared, depth=depth, orientation=args.orientation)
    return found


def kernel_milliseconds(args: argparse.Namespace, batch: tuple[int, int]) -> float:
    """Of the Pallas kernels of one layer, forward and backward."""
    config = decoder_config(args.model)
    heads = config.num_attention_heads, config.num_key_value_heads
    found = attention_kernels(args.slice, *batch, *heads, config.head_dim)
    return sum(one["milliseconds"] for one in found)


def measure(args: argparse.Namespace, batch: tuple[int, int], mesh: Mesh) -> Iterator[dict[str, Any]]:
    """A row for each method."""
    kernels = kernel_milliseconds(args, batch) if args.attention in ("auto", "splash") else 0.0
    lora: dict[str, float] = {}
    for (name, depth), method in methods(args).items():
        own = layer_costs(args, method, batch, mesh)
        own["milliseconds"] += kernels
        lora = lora or own
        setting = {"slice": args.slice, "model": args.model, "rows": batch[0], "seq": batch[1], "remat": args.remat}
        ratios = {f"{one}_over_lora": own[one] / lora[one] for one in RATIOS}
        yield {**setting, "method": name, "depth": depth, **own, "kernel_milliseconds": kernels, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slice", default="v5p-8", help="whose chip to compile for")
    parser.add_argument("--model", choices=NAMES, default="llama-2-7b")
    parser.add_argument("--rows", type=int, nargs="+", default=[16])
    parser.add_argument("--seq", type=int, nargs="+", default=[256], help="tokens a row, one for each of --rows")
    parser.add_argument("--method", choices=("lora", "peanut"), nargs="+", default=["lora", "peanut"])
    parser.add_argument("--depth", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--orientation", choices=("output", "input"), default="output")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--remat", choices=REMAT_POLICIES, default="dots")
    parser.add_argument("--attention", choices=ATTENTIONS, default="auto")
    args = parser.parse_args()
    if len(args.rows) != len(args.seq):
        parser.error(f"--rows and --seq go in pairs, got {len(args.rows)} and {len(args.seq)}")
    mesh = make_mesh("data=1", slice_devices(args.slice)[:1])
    for batch in zip(args.rows, args.seq, strict=True):
        for row in measure(args, batch, mesh):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
