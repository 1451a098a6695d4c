"""Attention in XLA that never holds more scores than those of a block of queries and a block of keys.

Memory is linear in the row's length, forward and backward, on every backend. Blocks of keys that no query of a block
sees are skipped: the later ones, those that the window has left behind, and those before the first sequence that the
block holds a part of. So packed rows cost what their sequences cost.

References:
    arXiv:2112.05682 (attention by blocks); arXiv:2307.08691, section 3.1 (its backward pass, from the output and the
    logsumexp). tokamax 0.0.12, `xla_chunked`, takes its mask as an array of [seq, seq] and skips nothing.
"""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from peanut_jax.models.attention_sight import RESIDUALS, Sight, Window, between

# Queries, and keys, of a block.
BLOCK = 512
# A score whose exp() is 0, and which is finite: a block may hold nothing that a query sees.
_UNSEEN = -1e30


@flax.struct.dataclass
class _Rows:
    """What the blocks need to know of the tokens; `first` is the first block of keys for each block of queries."""

    sight: Sight
    limit: Any
    first: Int[Array, " blocks"]
    block: int = flax.struct.field(pytree_node=False)

    def tokens(self, i: Any) -> tuple:
        """Places, positions and segments of a block."""
        positions, segments = (
            None if x is None else self.cut(x, i, 1) for x in (self.sight.positions, self.sight.segments)
        )
        return i * self.block + jnp.arange(self.block), positions, segments

    def cut(self, array: Array, i: Any, axis: int) -> Array:
        """Block i along the axis."""
        return lax.dynamic_slice_in_dim(array, i * self.block, self.block, axis)


def chunked(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch seq kv_heads head_dim"],
    v: Float[Array, "batch seq kv_heads head_dim"],
    sight: Sight,
    window: Window,
    block: int = BLOCK,
) -> Float[Array, "batch seq heads head_dim"]:
    """Softmax attention over the keys that each query sees."""
    batch, seq, _, head_dim = q.shape
    block = min(block, seq)
    grouped = q.reshape(batch, seq, k.shape[2], -1, head_dim)
    parts = [jnp.moveaxis(_fill(array, block), 1, -2) for array in (grouped, k, v)]
    segments = None if sight.segments is None else _fill(sight.segments, block)
    sight = Sight(_fill(sight.positions, block), segments, sight.counted)
    limit = window.limit()
    rows = _Rows(sight, limit, _first_blocks(sight, limit, block), block)
    out = _attend(*parts, rows)
    return jnp.moveaxis(out, -2, 1)[:, :seq].reshape(q.shape)


def _fill(array: Array, block: int) -> Array:
    """Filled up with zeros to whole blocks, which are padding."""
    return jnp.pad(array, [(0, 0), (0, -array.shape[1] % block)] + [(0, 0)] * (array.ndim - 2))


def _first_blocks(sight: Sight, limit: Any, block: int) -> Int[Array, " blocks"]:
    """For each block of queries the first block that holds a key that one of them sees; the last is their own."""
    places = jnp.arange(sight.positions.shape[1])
    first = jnp.zeros_like(places)
    if sight.segments is not None:
        begins = jax.vmap(lambda row: jax.ops.segment_min(places, row, len(places) + 1)[row])(sight.segments)
        # Nobody reads what padding sees.
        first = jnp.where(sight.segments == 0, places, begins).min(0)
    if limit is not None and sight.counted:
        first = jnp.maximum(first, places - limit + 1)
    return first.reshape(-1, block).min(1) // block


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, rows: _Rows) -> Array:
    return _forward(q, k, v, rows)[0]


def _forward(q: Array, k: Array, v: Array, rows: _Rows) -> tuple[Array, Array]:
    """The output [batch, kv_heads, group, seq, head_dim], and the logsumexp of each query's scores."""

    def one(i: Any) -> tuple[Array, Array]:
        own = rows.cut(q, i, 3)

        def add(j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            summed, top, total = carry
            scores = _scores(own, rows.cut(k, j, 2), i, j, rows)
            higher = jnp.maximum(top, scores.max(-1))
            weights, fade = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
            part = _product("bkgqt,bktd->bkgqd", weights.astype(v.dtype), rows.cut(v, j, 2))
            return summed * fade[..., None] + part, higher, total * fade + weights.sum(-1)

        shape = own.shape[:-1]
        start = jnp.zeros(own.shape, jnp.float32), jnp.full(shape, _UNSEEN), jnp.zeros(shape, jnp.float32)
        # What an unseen block leaves behind fades to 0: a query's own block comes last, and it sees itself.
        summed, top, total = lax.fori_loop(rows.first[i], i + 1, add, start)
        return (summed / total[..., None]).astype(q.dtype), top + jnp.log(total)

    out, lse = lax.map(one, jnp.arange(len(rows.first)))
    return _joined(out), _joined(lse[..., None])[..., 0]


def _residuals(q: Array, k: Array, v: Array, rows: _Rows) -> tuple[Array, tuple]:
    out, lse = (checkpoint_name(array, RESIDUALS) for array in _forward(q, k, v, rows))
    return out, (q, k, v, rows, out, lse)


def _backward(residuals: tuple, dout: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, rows, out, lse = residuals
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    scale = 1 / math.sqrt(q.shape[-1])

    def one(sums: tuple[Array, Array], i: Any) -> tuple[tuple[Array, Array], Array]:
        own, own_dout, own_lse, own_delta = (rows.cut(array, i, 3) for array in (q, dout, lse, delta))

        def add(j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            key, value = rows.cut(k, j, 2), rows.cut(v, j, 2)
            weights = jnp.exp(_scores(own, key, i, j, rows) - own_lse[..., None])
            slope = _product("bkgqd,bktd->bkgqt", own_dout, value) - own_delta[..., None]
            slope = (weights * slope * scale).astype(q.dtype)
            dq += _product("bkgqt,bktd->bkgqd", slope, key)
            dk = _add(dk, _product("bkgqt,bkgqd->bktd", slope, own), j, rows)
            dv = _add(dv, _product("bkgqt,bkgqd->bktd", weights.astype(q.dtype), own_dout), j, rows)
            return dq, dk, dv

        start = jnp.zeros(own.shape, jnp.float32), *sums
        dq, dk, dv = lax.fori_loop(rows.first[i], i + 1, add, start)
        return (dk, dv), dq.astype(q.dtype)

    zeros = jnp.zeros(k.shape, jnp.float32)
    (dk, dv), dq = lax.scan(one, (zeros, zeros), jnp.arange(len(rows.first)))
    return _joined(dq), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_residuals, _backward)

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(own: Array, key: Array, i: Any, j: Any, rows: _Rows) -> Array:
    """Of block i's queries and block j's keys, in float32."""
    scores = _product("bkgqd,bktd->bkgqt", own, key) / math.sqrt(own.shape[-1])
    allowed = between(rows.tokens(i), rows.tokens(j), rows.limit, rows.sight.counted)
    return jnp.where(allowed[:, None, None], scores, _UNSEEN)


def _add(sums: Array, part: Array, j: Any, rows: _Rows) -> Array:
    return lax.dynamic_update_slice_in_dim(sums, rows.cut(sums, j, 2) + part, j * rows.block, 2)


def _joined(blocks: Array) -> Array:
    """[blocks, batch, kv_heads, group, block, width] as [batch, kv_heads, group, seq, width]."""
    joined = jnp.moveaxis(blocks, 0, 3)
    return joined.reshape(*joined.shape[:3], -1, joined.shape[-1])
