"""Attention: which keys a query sees, and the softmax over them."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Mask:
    """Which keys a query sees, and how many positions back each is."""

    allowed: Bool[Array, "batch seq keys"]
    distance: Int[Array, "batch seq keys"]


def make_mask(
    positions: Int[Array, "batch seq"],
    key_positions: Int[Array, "batch keys"],
    segments: Int[Array, "batch seq"] | None,
    key_segments: Int[Array, "batch keys"] | None,
) -> Mask:
    """A query at position p of its segment sees the keys at positions 0 to p of the same segment.

    Args:
        positions: Position of each query in its segment.
        key_positions: Position of each key; -1 for padding.
        segments, key_segments: Number of the segment of each query and key; None for one segment a row.
    """
    distance = positions[:, :, None] - key_positions[:, None, :]
    allowed = (distance >= 0) & (key_positions >= 0)[:, None, :]
    if segments is not None and key_segments is not None:
        allowed &= segments[:, :, None] == key_segments[:, None, :]
    return Mask(allowed, distance)


def attend(
    q: Float[Array, "batch seq heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    mask: Mask | None,
    window: Int[Array, ""] | None,
    attention: str = "auto",
) -> Float[Array, "batch seq heads head_dim"]:
    """Softmax attention; several heads of queries share a head of keys and values.

    Args:
        mask: None is causal: every key up to the query's own.
        window: Keys further back than this many positions, the query's own counted, are not seen.
        attention: As in `DecoderConfig`. `jax.nn.dot_product_attention` itself always takes XLA (jax 0.10).
    """
    nvidia = jax.default_backend() == "gpu" and "NVIDIA" in jax.devices()[0].device_kind
    if attention == "auto":
        attention = "cudnn" if nvidia and fits_cudnn(q.dtype, q.shape[-1], q.shape[1], k.shape[1]) else "xla"
    implementation: Any = attention
    if mask is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
    allowed = mask.allowed if window is None else mask.allowed & (mask.distance < window)
    return jax.nn.dot_product_attention(q, k, v, mask=allowed[:, None], implementation=implementation)


def fits_cudnn(dtype: Any, head_dim: int, queries: int, keys: int) -> bool:
    """Whether cuDNN's fused kernel takes these shapes, forward and backward, on every card that it supports.

    It does not take a single query, as in decoding.

    References:
        jax 0.10, `_src/cudnn/fused_attention_stablehlo.py`, check_is_flash_attention.
    """
    sixteen = jnp.dtype(dtype) in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
    return sixteen and head_dim % 8 == 0 and head_dim <= 128 and queries > 1 and queries % 2 == 0 and keys % 2 == 0


def count_positions(
    real: Bool[Array, "batch seq"], segments: Int[Array, "batch seq"] | None
) -> Int[Array, "batch seq"]:
    """Each token's position in its row or segment, padding left out; 0 for padding before the first token."""
    positions = jnp.cumsum(real, axis=-1) - 1
    if segments is not None:
        positions -= jax.lax.cummax(jnp.where(_starts(segments), positions, 0), axis=1)
    return jnp.maximum(positions, 0)


def renumber(segments: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Runs of one number as segments of their own, so that a number that comes again is another sequence."""
    return jnp.where(segments != 0, jnp.cumsum(_starts(segments), axis=-1), 0)


def _starts(segments: Int[Array, "batch seq"]) -> Bool[Array, "batch seq"]:
    """Where a token's segment is not that of the token before it."""
    first = jnp.ones_like(segments[:, :1], bool)
    return jnp.concatenate([first, segments[:, 1:] != segments[:, :-1]], axis=-1)
