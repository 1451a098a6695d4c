"""The cross-entropy of a decoder's head, whose logits exist for one chunk of tokens at a time.

What the loss's gradient needs of the logits is formed where they are, in the forward pass: two products with the head's
kernel for each chunk, a third where the kernel is trained, and none of them again in the backward pass. Operands have
the dtype of the activations; sums are float32.

References:
    The fused linear cross-entropy of Liger Kernel, arXiv:2410.10989v3, section 3.2.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int, Shaped

# What the head reads, labels and weights of one chunk.
Chunk = tuple[Float[Array, "tokens width"], Int[Array, " tokens"], Float[Array, " tokens"]]


def chunked(array: Shaped[Array, "batch seq *width"], columns: int) -> Shaped[Array, "chunks tokens *width"]:
    """The array in chunks of `columns` tokens of each row: a batch that is spread over devices stays so.

    The sequence is filled up with zeros.
    """
    batch, seq, *width = array.shape
    padded = jnp.pad(array, [(0, 0), (0, -seq % columns)] + [(0, 0)] * len(width))
    parts = jnp.moveaxis(padded.reshape(batch, -1, columns, *width), 1, 0)
    return parts.reshape(parts.shape[0], -1, *width)


def cross_entropy(
    logits: Float[Array, "tokens vocab"], labels: Int[Array, " tokens"], weights: Float[Array, " tokens"]
) -> Float[Array, ""]:
    """The weighted sum over the tokens; NaN for a label outside the vocabulary that counts."""
    # A sum over a mask, for a gather's gradient would be another array of the logits' size.
    its_own = jnp.arange(logits.shape[-1]) == labels[:, None]
    picked = jnp.where(its_own, logits, 0.0).sum(-1)
    inside = (labels >= 0) & (labels < logits.shape[-1])
    picked = jnp.where(inside | (weights == 0), picked, jnp.nan)
    return ((jax.nn.logsumexp(logits, axis=-1) - picked) * weights).sum()


def head_loss(
    x: Float[Array, "chunks tokens width"],
    kernel: Float[Array, "rows columns"],
    labels: Int[Array, "chunks tokens"],
    weights: Float[Array, "chunks tokens"],
    tied: bool,
) -> Float[Array, ""]:
    """The weighted sum of the tokens' cross-entropies; differentiable in reverse mode.

    Args:
        x: What the head reads.
        kernel: Of a head without bias: logits = x @ kernel, or x @ kernel^T where it is a tied embedding.
        tied: Whether it is.
    """
    return _loss(x, kernel, weights, labels, tied)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss(x: Array, kernel: Array, weights: Array, labels: Array, tied: bool) -> Array:
    cast = kernel.astype(x.dtype)

    def body(total: Array, part: Chunk) -> tuple[Array, None]:
        h, label, weight = part
        return total + cross_entropy(_dot(h, cast, 1, int(tied)), label, weight), None

    return lax.scan(body, jnp.zeros((), jnp.float32), (x, labels, weights))[0]


def _forward(x: Any, kernel: Any, weights: Any, labels: Any, tied: bool) -> tuple[Array, tuple[Any, ...]]:
    """The loss and its gradients, each None where its argument, which knows that, is not differentiated."""
    cast = kernel.value.astype(x.value.dtype)

    def body(carry: tuple[Array, Array | None], part: Chunk) -> Any:
        total, d_kernel = carry
        h, label, weight = part
        logits = _dot(h, cast, 1, int(tied))
        loss, pullback = jax.vjp(lambda logits, weight: cross_entropy(logits, label, weight), logits, weight)
        d_logits, d_weight = pullback(jnp.ones_like(loss))
        d_logits = d_logits.astype(h.dtype)
        d_h = _dot(d_logits, cast, 1, int(not tied)).astype(h.dtype) if x.perturbed else None
        if d_kernel is not None:
            d_kernel += _dot(d_logits, h, 0, 0) if tied else _dot(h, d_logits, 0, 0)
        return (total + loss, d_kernel), (d_h, d_weight if weights.perturbed else None)

    carry = jnp.zeros((), jnp.float32), jnp.zeros(cast.shape, jnp.float32) if kernel.perturbed else None
    (total, d_kernel), (d_x, d_weights) = lax.scan(body, carry, (x.value, labels.value, weights.value))
    return total, (d_x, d_kernel, d_weights, kernel.value)


def _backward(tied: bool, saved: tuple[Any, ...], g: Any) -> tuple[Any, ...]:
    d_x, d_kernel, d_weights, kernel = saved
    if isinstance(g, SymbolicZero):
        return None, None, None, None
    d_x = None if d_x is None else (g * d_x.astype(jnp.float32)).astype(d_x.dtype)
    d_kernel = None if d_kernel is None else (g * d_kernel).astype(kernel.dtype)
    return d_x, d_kernel, None if d_weights is None else g * d_weights, None


_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Float[Array, "i j"]:
    """The product of two matrices over an axis of each, in float32."""
    return lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=jnp.float32)
