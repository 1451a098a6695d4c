"""The cache of keys and values that generation extends token by token."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from peanut_jax.models.decoder_config import DecoderConfig


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens so far.

    Attributes:
        keys, values: One array for a scanned stack of layers; without a scan a tuple with one for each layer.
        positions: Position of each slot's token in its sequence; -1 for an empty or padded slot.
        filled: How many slots are taken, padding included.
    """

    keys: PyTree[Float[Array, "*layers batch slots kv_heads head_dim"]]
    values: PyTree[Float[Array, "*layers batch slots kv_heads head_dim"]]
    positions: Int[Array, "batch slots"]
    filled: Int[Array, ""]


def empty_cache(config: DecoderConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """A cache for `slots` tokens a row."""
    shape = (batch, slots, config.num_key_value_heads, config.head_dim)

    def zeros() -> PyTree:
        if config.scan_layers:
            return jnp.zeros((config.num_hidden_layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers))

    return Cache(
        keys=zeros(),
        values=zeros(),
        positions=jnp.full((batch, slots), -1, jnp.int32),
        filled=jnp.zeros((), jnp.int32),
    )


def change_rows(cache: Cache, change: Callable[[Array, int], Array]) -> Cache:
    """`change(array, its batch axis)` for every array of the cache that has a batch axis."""

    def layers(arrays: PyTree) -> PyTree:
        if isinstance(arrays, tuple):
            return tuple(change(array, 0) for array in arrays)
        return change(arrays, 1)

    return cache.replace(  # type: ignore[attr-defined]
        keys=layers(cache.keys), values=layers(cache.values), positions=change(cache.positions, 0)
    )


def row_axes(config: DecoderConfig) -> Cache:
    """The batch axis of every array of the cache, as `jax.vmap` takes it."""
    layer = 1 if config.scan_layers else 0
    return Cache(keys=layer, values=layer, positions=0, filled=None)  # type: ignore[arg-type]
