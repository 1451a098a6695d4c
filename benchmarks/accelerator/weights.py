"""Random parameters, drawn on the device: 16 GB in a second, where numpy would take minutes and as much host memory."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree

from peanut_jax.base.kernels import COLLECTION, flatten, replace
from peanut_jax.models.decoder import Decoder, kept_dtype, variable_shapes

DEVIATION = 0.02


def random_params(model: Decoder, seed: int = 0) -> PyTree:
    """The model's variables in its dtype: norms are 1, everything else is uniform with a deviation of 0.02."""
    leaves = flatten(variable_shapes(model))

    @jax.jit
    def draw() -> dict[str, Array]:
        return {
            path: jnp.ones(leaf.shape, jnp.float32)
            if path.endswith("scale")
            else uniform(leaf.shape, kept_dtype(path, model.dtype), seed + number)
            for number, (path, leaf) in enumerate(leaves.items())
        }

    return replace({COLLECTION: {}}, jax.block_until_ready(draw()))


def uniform(shape: tuple[int, ...], dtype: Any, seed: int, deviation: float = DEVIATION) -> Array:
    """Uniform numbers around 0, each a hash of its own place: no array beside the result, whatever its size.

    References:
        The finalizer of MurmurHash3 (32 bits).
    """
    index = jnp.full(shape, jnp.uint32(0x9E3779B9 * (seed + 1) & 0xFFFFFFFF))
    for axis in range(len(shape)):
        step = jnp.uint32(math.prod(shape[axis + 1 :]) & 0xFFFFFFFF)
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * step
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        index = (index ^ (index >> shift)) * jnp.uint32(factor)
    index ^= index >> 16
    between = (index >> 8).astype(jnp.float32) * (1.0 / (1 << 24)) - 0.5
    return (between * (deviation * math.sqrt(12))).astype(dtype)


def random_tokens(rows: int, seq: int, vocab: int, seed: int = 1) -> Array:
    """Token ids, drawn on the device."""
    return jax.jit(partial(jax.random.randint, shape=(rows, seq), minval=0, maxval=vocab))(jax.random.key(seed))
