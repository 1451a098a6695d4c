"""A digest of a kernel: a sum of integers, the same whatever order, sharding or machine adds it up."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt32

SEEDS = (0x9E3779B9, 0x7F4A7C15)


@jax.jit
def digest(kernel: Float[Array, "*layers d_in d_out"]) -> UInt32[Array, "*layers 2"]:
    """Two sums modulo 2^32 of the kernel's bfloat16 bits, each with odd weights of its own for rows and columns."""
    bits = lax.bitcast_convert_type(kernel.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    terms = [bits * position_weights(kernel.shape[-1], seed) for seed in SEEDS]
    # One reduction for both: XLA on CPU would otherwise keep `bits`, and each product, as an array of its own.
    zero = jnp.uint32(0)
    sums = lax.reduce(terms, [zero, zero], lambda x, y: [x[0] + y[0], x[1] + y[1]], (kernel.ndim - 1,))
    rows = [position_weights(kernel.shape[-2], ~seed) for seed in SEEDS]
    # Without a dtype jax_enable_x64 would add them up as 64-bit integers, to another digest.
    sums = [(one * weights).sum(-1, dtype=jnp.uint32) for one, weights in zip(sums, rows, strict=True)]
    return jnp.stack(sums, axis=-1)


def hexadecimal(sums: UInt32[Array, "2"] | UInt32[np.ndarray, "2"]) -> str:
    """The two sums of a digest as 16 digits."""
    return "".join(f"{int(part):08x}" for part in sums)


def position_weights(size: int, seed: int, xp: Any = jnp) -> Any:
    """Odd pseudo-random weights, as a uint32 array of `xp`, which is jax.numpy or numpy."""
    return mixed(xp.arange(size, dtype=xp.uint32) + xp.uint32(seed & 0xFFFFFFFF)) | xp.uint32(1)


def mixed(h: Any) -> Any:
    """The finaliser of MurmurHash3 (Austin Appleby, public domain): another uint32 for each, made of all its bits."""
    h = (h ^ (h >> 16)) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * np.uint32(0xC2B2AE35)
    return h ^ (h >> 16)
