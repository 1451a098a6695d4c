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
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from peanut_jax.models.attention.sight import RESIDUALS, Sight, Window, between

# Queries, and keys, of a block.
BLOCK = 512
# A score whose exp() is 0, and which is finite: a block may hold nothing that a query sees.
_UNSEEN = -1e30


@flax.struct.dataclass
class _Rows:
    """What the blocks need to know of the tokens.

    Attributes:
        first: For each block of queries the first block of keys that one of them sees.
        pairs: Every block of queries with every block of keys that it may see, a block's own last.
    """

    sight: Sight
    limit: Any
    first: Int[Array, " blocks"]
    pairs: tuple[Int[Array, " pairs"], Int[Array, " pairs"]]
    block: int = flax.struct.field(pytree_node=False)

    def tokens(self, i: Any) -> tuple:
        """Places, positions and segments of a block."""
        found = (self.sight.positions, self.sight.segments)
        positions, segments = (None if array is None else self.cut(array, i, 1) for array in found)
        return i * self.block + jnp.arange(self.block), positions, segments

    def cut(self, array: Array, i: Any, axis: int) -> Array:
        """Block i along the axis."""
        return lax.dynamic_slice_in_dim(array, i * self.block, self.block, axis)

    def put(self, array: Array, part: Array, i: Any, axis: int) -> Array:
        """The array with another block i."""
        return lax.dynamic_update_slice_in_dim(array, part.astype(array.dtype), i * self.block, axis)

    def add(self, array: Array, part: Array, i: Any) -> Array:
        """The array with `part` added to block i of its last axis but one."""
        return self.put(array, self.cut(array, i, array.ndim - 2) + part, i, array.ndim - 2)


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
    far = window.choices[0] if window.index is None and sight.counted else None
    rows = _Rows(
        sight, limit, _first_blocks(sight, limit, block), _pairs(parts[1].shape[2] // block, block, far), block
    )
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


def _pairs(blocks: int, block: int, window: int | None) -> tuple[Array, Array]:
    """(block of queries, block of keys), as one loop of a known length: XLA and those who count its FLOPs know it."""
    found = [
        (i, j)
        for i in range(blocks)
        for j in range(0 if window is None else max(0, i * block - window + 1) // block, i + 1)
    ]
    queries, keys = np.array(found, np.int32).T
    return jnp.asarray(queries), jnp.asarray(keys)


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, rows: _Rows) -> Array:
    return _forward(q, k, v, rows)[0]


def _forward(q: Array, k: Array, v: Array, rows: _Rows) -> tuple[Array, Array]:
    """The output [batch, kv_heads, group, seq, head_dim], and the logsumexp of each query's scores."""

    def add(i: Any, j: Any, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        summed, top, total = carry
        scores = _scores(rows.cut(q, i, 3), rows.cut(k, j, 2), i, j, rows)
        higher = jnp.maximum(top, scores.max(-1))
        weights, fade = jnp.exp(scores - higher[..., None]), jnp.exp(top - higher)
        part = _product("bkgqt,bktd->bkgqd", weights.astype(v.dtype), rows.cut(v, j, 2))
        return summed * fade[..., None] + part, higher, total * fade + weights.sum(-1)

    def step(carry: tuple, pair: tuple[Any, Any]) -> tuple[tuple, None]:
        out, lse, last, *sums = carry
        i, j = pair
        # What an unseen key leaves behind fades to 0: a query's own block comes last, and it sees itself.
        sums = [jnp.where(i == last, old, new) for old, new in zip(sums, start, strict=True)]
        summed, top, total = lax.cond(j >= rows.first[i], add, lambda i, j, carry: carry, i, j, tuple(sums))
        sure = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
        out, lse = rows.put(out, summed / sure[..., None], i, 3), rows.put(lse, top + jnp.log(sure), i, 3)
        return (out, lse, i, summed, top, total), None

    shape = (*q.shape[:3], rows.block)
    start = jnp.zeros((*shape, q.shape[-1]), jnp.float32), jnp.full(shape, _UNSEEN), jnp.zeros(shape, jnp.float32)
    whole = jnp.zeros_like(q), jnp.zeros(q.shape[:-1], jnp.float32)
    (out, lse, *_), _ = lax.scan(step, (*whole, jnp.int32(-1), *start), rows.pairs)
    return out, lse


def _residuals(q: Array, k: Array, v: Array, rows: _Rows) -> tuple[Array, tuple]:
    out, lse = (checkpoint_name(array, RESIDUALS) for array in _forward(q, k, v, rows))
    return out, (q, k, v, rows, out, lse)


def _backward(residuals: tuple, dout: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, rows, out, lse = residuals
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    scale = 1 / math.sqrt(q.shape[-1])

    def parts(i: Any, j: Any) -> tuple[Array, Array, Array]:
        """What a pair of blocks adds to dq, dk and dv."""
        own, own_dout, own_lse, own_delta = (rows.cut(array, i, 3) for array in (q, dout, lse, delta))
        key, value = rows.cut(k, j, 2), rows.cut(v, j, 2)
        weights = jnp.exp(_scores(own, key, i, j, rows) - own_lse[..., None])
        slope = _product("bkgqd,bktd->bkgqt", own_dout, value) - own_delta[..., None]
        slope = (weights * slope * scale).astype(q.dtype)
        return (
            _product("bkgqt,bktd->bkgqd", slope, key),
            _product("bkgqt,bkgqd->bktd", slope, own),
            _product("bkgqt,bkgqd->bktd", weights.astype(q.dtype), own_dout),
        )

    def nothing(i: Any, j: Any) -> tuple[Array, Array, Array]:
        query, key = (jnp.zeros(rows.cut(x, 0, x.ndim - 2).shape, jnp.float32) for x in (q, k))
        return query, key, key

    def step(sums: tuple, pair: tuple[Any, Any]) -> tuple[tuple, None]:
        i, j = pair
        # The sums stay outside the branches, which would copy them.
        found = lax.cond(j >= rows.first[i], parts, nothing, i, j)
        return tuple(rows.add(x, part, n) for x, part, n in zip(sums, found, (i, j, j), strict=True)), None

    zeros = tuple(jnp.zeros(array.shape, jnp.float32) for array in (q, k, v))
    (dq, dk, dv), _ = lax.scan(step, zeros, rows.pairs)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_residuals, _backward)

_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _scores(own: Array, key: Array, i: Any, j: Any, rows: _Rows) -> Array:
    """Of block i's queries and block j's keys, in float32."""
    scores = _product("bkgqd,bktd->bkgqt", own, key) / math.sqrt(own.shape[-1])
    allowed = between(rows.tokens(i), rows.tokens(j), rows.limit, rows.sight.counted)
    return jnp.where(allowed[:, None, None], scores, _UNSEEN)
