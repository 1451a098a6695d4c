"""The cache of keys and values that generation extends token by token, in place.

A head's keys lie together, slot by slot, as the products of a single query read them.
"""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float, Int, PyTree

from peanut_jax.models.decoder_config import DecoderConfig

Arrays = Float[Array, "*layers rows kv_heads slots head_dim"]
# Keys and values of one layer, or of the whole scanned stack, or a tuple of each layer's.
Slots = tuple[PyTree[Arrays], PyTree[Arrays]]
# Slots whose rows are moved at a time.
_MOVED = 128


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens so far.

    Attributes:
        keys, values: One array for a scanned stack of layers; without a scan a tuple with one for each layer.
        positions: Position of each slot's token in its sequence; -1 for an empty or padded slot.
        filled: How many slots are taken, padding included.
    """

    keys: PyTree[Arrays]
    values: PyTree[Arrays]
    positions: Int[Array, "rows slots"]
    filled: Int[Array, ""]


def empty_cache(config: DecoderConfig, rows: int, slots: int, dtype: Any) -> Cache:
    """A cache for `slots` tokens a row."""
    shape = (rows, config.num_key_value_heads, slots, config.head_dim)

    def zeros() -> PyTree:
        if config.scan_layers:
            return jnp.zeros((config.num_hidden_layers, *shape), dtype)
        return tuple(jnp.zeros(shape, dtype) for _ in range(config.num_hidden_layers))

    return Cache(
        keys=zeros(),
        values=zeros(),
        positions=jnp.full((rows, slots), -1, jnp.int32),
        filled=jnp.zeros((), jnp.int32),
    )


def extend(
    slots: Slots,
    layer: Int[Array, ""] | None,
    k: Float[Array, "prompts seq kv_heads head_dim"],
    v: Float[Array, "prompts seq kv_heads head_dim"],
    start: Int[Array, ""] | int,
) -> Slots:
    """The slots with a layer's keys and values of some tokens from slot `start` on, each prompt's for all of its rows.

    Args:
        layer: Its number in the stack; None for one layer's slots.
    """

    def put(array: Array, new: Array) -> Array:
        new = jnp.repeat(new.swapaxes(1, 2).astype(array.dtype), array.shape[-4] // len(new), axis=0)
        if layer is None:
            longer = lax.dynamic_update_slice(array, new, (0, 0, start, 0))
        else:
            longer = lax.dynamic_update_slice(array, new[None], (layer, 0, 0, start, 0))
        # As it lies in memory outside the loop: XLA on TPU would lay it out by slots and copy all of it to do so.
        return with_layout_constraint(longer, Layout(tuple(range(array.ndim))))

    return put(slots[0], k), put(slots[1], v)


def of_layer(slots: Slots, layer: Int[Array, ""] | None) -> Slots:
    """The keys and values of one layer, [rows, kv_heads, slots, head_dim] each."""
    if layer is None:
        return slots
    return lax.dynamic_index_in_dim(slots[0], layer, keepdims=False), lax.dynamic_index_in_dim(
        slots[1], layer, keepdims=False
    )


def widened(cache: Cache, slots: int) -> Cache:
    """A cache of more slots with the same tokens. The old one's arrays are given up one by one, so that never both
    are held whole.
    """

    def keys(array: Array) -> Array:
        return wider(array, slots, -2)

    return Cache(
        keys=jax.tree.map(keys, cache.keys),
        values=jax.tree.map(keys, cache.values),
        positions=wider(cache.positions, slots, -1, -1),
        filled=cache.filled,
    )


def wider(array: Array, size: int, axis: int, fill: int = 0) -> Array:
    """The array with `size` places along an axis, filled up behind; the old one is deleted."""
    new = _padded(array, size=size, axis=axis, fill=fill)
    array.delete()
    return new


@jax.jit(static_argnames=("size", "axis", "fill"))
def _padded(array: Array, *, size: int, axis: int, fill: int) -> Array:
    behind = [(0, 0)] * array.ndim
    behind[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, behind, constant_values=fill)


def reordered(cache: Cache, rows: Int[Array, " rows"], start: int) -> Cache:
    """The cache with row `rows[i]` in the place of row i, from slot `start` on: before it the rows are alike.

    Some slots at a time, in place, as far as the cache is filled; where every row stays nothing is moved.
    """
    slots = cache.positions.shape[1]
    width = _MOVED if (slots - start) % _MOVED == 0 else (slots - start) & (start - slots)
    stays = (rows == jnp.arange(len(rows))).all()
    parts = jnp.where(stays, 0, (cache.filled - start + width - 1) // width)

    def move(part: Array, arrays: PyTree) -> PyTree:
        def one(array: Array) -> Array:
            first = start + part * width
            moved = jnp.take(lax.dynamic_slice_in_dim(array, first, width, axis=-2), rows, axis=-4)
            return lax.dynamic_update_slice_in_dim(array, moved, first, axis=-2)

        return jax.tree.map(one, arrays)

    keys, values = lax.fori_loop(0, parts, move, (cache.keys, cache.values))
    return cache.replace(keys=keys, values=values, positions=cache.positions[rows])  # type: ignore[attr-defined]
