"""A train step of our decoder beside one of transformers' FlaxLlama: the same sizes, adapter and batch, alternating.

    python -m benchmarks.decoder_step --remat none --tokens 2048 --rank 32

PEANuT of depth 0 on q, k, v, up and down; AdamW; random weights. Seconds and XLA's temporary bytes.
"""

import argparse
import json

import jax
import numpy as np
import optax

import peanut_jax as pj
from benchmarks.step_cost import MODELS, TARGETS, make_step
from benchmarks.timing import alternate, median_ratio, stepping
from peanut_jax.models.decoder_config import REMAT_POLICIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a step, in sequences of --seq")
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--remat", choices=REMAT_POLICIES, default="none")
    parser.add_argument("--chunk", type=int, default=512, help="tokens of the decoder's loss at a time")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    tokens = jax.random.randint(jax.random.key(1), (args.tokens // args.seq, args.seq), 0, args.vocab)
    config, tx = pj.PeanutConfig(r=args.rank, target_modules=TARGETS), optax.adamw(1e-3)
    steps, temporaries = {}, {}
    for name, build in MODELS.items():
        loss_fn, params = build(args)
        state = pj.TrainState.create(pj.init(jax.random.key(0), params, config), tx, jax.random.key(2))
        step = make_step("peanut", loss_fn, config, tx, 1).lower(state, params, tokens).compile()
        temporaries[name] = step.memory_analysis().temp_size_in_bytes
        steps[name] = stepping(step, state, params, tokens)
    seconds = alternate(steps, args.repeats)
    for name in steps:
        record = {
            "model": name,
            "remat": args.remat if name == "decoder" else None,
            "tokens": args.tokens,
            "dtype": args.dtype,
            "temp_bytes": temporaries[name],
            "temp_bytes_over_flax_llama": temporaries[name] / temporaries["flax-llama"],
            "median_seconds": float(np.median(seconds[name])),
            "seconds_over_flax_llama": median_ratio(seconds[name], seconds["flax-llama"]),
        }
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
