"""Attention of one token a row over the slots of the cache."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Seen:
    """What the token that a row is at sees of the cache.

    Attributes:
        taken: Slots that hold a token, its own included.
        distance: How many positions back each is.
        slot: Where its own keys go.
    """

    taken: Bool[Array, "rows slots"]
    distance: Int[Array, "rows slots"]
    slot: Int[Array, ""]


def attend_cached(
    q: Float[Array, "rows 1 heads head_dim"],
    k: Float[Array, "rows kv_heads slots head_dim"],
    v: Float[Array, "rows kv_heads slots head_dim"],
    seen: Seen,
    window: Int[Array, ""] | int | None,
) -> Float[Array, "rows 1 heads head_dim"]:
    """Softmax attention of one query a row, in float32; several heads of queries share a head of keys and values.

    Args:
        window: Keys further back than this many positions, the query's own counted, are not seen.
    """
    rows, _, heads, head_dim = q.shape
    shared = q.reshape(rows, k.shape[1], heads // k.shape[1], head_dim)
    scores = jnp.einsum("rkgd,rksd->rkgs", shared, k.astype(q.dtype), preferred_element_type=jnp.float32)
    allowed = seen.taken if window is None else seen.taken & (seen.distance < window)
    scores = jnp.where(allowed[:, None, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("rkgs,rksd->rkgd", weights, v.astype(q.dtype)).reshape(q.shape)
