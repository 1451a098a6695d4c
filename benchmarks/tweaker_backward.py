"""Does the tweaker's written backward pass pay? Its seconds and temporary bytes beside those of plain autodiff.

    python -m benchmarks.tweaker_backward --d-in 4096 --d-out 4096 --rank 32

One kernel, depth 0: factors and their pullback from fixed cotangents, as a train step runs them. `plain` is the same
function without `tweaker._read`'s rule, so with the products that JAX derives.
"""

import argparse
import json
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import peanut_jax as pj
from benchmarks.timing import alternate, median_ratio
from peanut_jax.matrices import Plain


def plain(kernel: jax.Array, theta: dict, orientation: str) -> tuple[jax.Array, jax.Array]:
    """`tweaker.factors` at depth 0 with relu, left to autodiff."""
    w = kernel if orientation == "output" else kernel.T
    z = jax.nn.relu(jnp.matmul(w, theta["a"].astype(w.dtype), preferred_element_type=jnp.float32))
    return (z, theta["b"]) if orientation == "output" else (theta["b"].T, z.T)


def written(kernel: jax.Array, theta: dict, orientation: str) -> tuple[jax.Array, jax.Array]:
    config = pj.PeanutConfig(r=theta["a"].shape[-1], orientation=orientation)
    left, right = config.update(theta, Plain(kernel))
    return left, right


def _run(step: Any, *args: Any) -> None:
    jax.block_until_ready(step(*args))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=4096)
    parser.add_argument("--d-out", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()

    kernel = jax.random.normal(jax.random.key(0), (args.d_in, args.d_out), jnp.dtype(args.dtype))
    for orientation in ("output", "input"):
        config = pj.PeanutConfig(r=args.rank, orientation=orientation, init_weights=False)
        theta = config.start(jax.random.key(1), Plain(kernel))
        cotangents = (jnp.ones((args.d_in, args.rank)), jnp.ones((args.rank, args.d_out)))
        compiled: dict[str, Any] = {}
        for name, fn in (("plain", plain), ("written", written)):

            def pullback(kernel, theta, cotangents, fn=fn, orientation=orientation):
                pair, pull = jax.vjp(lambda theta: fn(kernel, theta, orientation), theta)
                return pair, pull(cotangents)

            compiled[name] = jax.jit(pullback).lower(kernel, theta, cotangents).compile()
        runs = {name: partial(_run, step, kernel, theta, cotangents) for name, step in compiled.items()}
        seconds = alternate(runs, args.repeats)
        for name, step in compiled.items():
            record = {
                "backward": name,
                "orientation": orientation,
                "d_in": args.d_in,
                "d_out": args.d_out,
                "rank": args.rank,
                "dtype": args.dtype,
                "temp_bytes": step.memory_analysis().temp_size_in_bytes,
                "median_seconds": float(np.median(seconds[name])),
                "seconds_over_plain": median_ratio(seconds[name], seconds["plain"]),
            }
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
