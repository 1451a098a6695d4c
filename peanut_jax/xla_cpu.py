"""Products as XLA on CPU wants them: the same numbers, written so that its compiler makes the faster program.

Each function says what goes wrong without it. On GPU and TPU they cost nothing. They are differentiated by rules of
their own, in reverse mode alone.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

# What a remat policy may keep under this name: the r columns between the two products of a low-rank update.
LOW_RANK = "low_rank"


def transposed_times(
    kernel: Float[Array, "*stack d_in d_out"], m: Float[Array, "*stack d_in r"]
) -> Float[Array, "*stack d_out r"]:
    """kernel^T @ m as (m^T @ kernel)^T, operands in the kernel's dtype, accumulated in float32.

    XLA on CPU runs the first 2 to 8 times slower than the second (measured, r 32, sides 1024 to 4096), and would
    simplify the second back into the first across a missing barrier.
    """
    product = jnp.matmul(_t(m).astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)
    return _t(lax.optimization_barrier(product))


def waiting_for(z: Float[Array, "*shape"], g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """z, in a computation that cannot begin before g is there.

    XLA on CPU drops the barriers of `jax.checkpoint` before it schedules, so that what is computed a second time in the
    backward pass would be kept from the first (1.027 of LoRA's temporary bytes in a train step, against 1.005).
    """
    return z + 0 * g


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def low_rank_product(
    x: Float[Array, "*stack_rest d_in"],
    left: Float[Array, "*stack d_in r"],
    right: Float[Array, "*stack r d_out"],
    precision: lax.PrecisionLike,
) -> Float[Array, "*stack_rest d_out"]:
    """(x @ left) @ right for x [*stack, *rest, d_in].

    In the derived backward pass XLA on CPU transposes x and the cotangent of the result, the two large arrays, to
    contract their tokens. Here only arrays with r columns are transposed; the barrier keeps XLA from simplifying that
    away.
    """
    return _times(_times(x, left, precision), right, precision)


def _forward(x: Array, left: Array, right: Array, precision: lax.PrecisionLike):
    h = checkpoint_name(_times(x, left, precision), LOW_RANK)
    return _times(h, right, precision), (x, h, left, right)


def _backward(precision: lax.PrecisionLike, saved: tuple[Array, ...], g: Array):
    x, h, left, right = saved
    d_h = _times(g, _t(right), precision)
    d_x = _times(d_h, _t(left), precision)
    d_left = lax.optimization_barrier(_over_tokens(d_h, x, left.ndim - 2, precision))
    return d_x, _t(d_left), _over_tokens(h, g, left.ndim - 2, precision)


low_rank_product.defvjp(_forward, _backward)


def _times(x: Array, m: Array, precision: lax.PrecisionLike) -> Array:
    """[*stack, *rest, i] by [*stack, i, j] -> [*stack, *rest, j]."""
    stack = tuple(range(m.ndim - 2))
    return lax.dot_general(x, m, (((x.ndim - 1,), (m.ndim - 2,)), (stack, stack)), precision=precision)


def _over_tokens(a: Array, b: Array, n_stack: int, precision: lax.PrecisionLike) -> Array:
    """[*stack, *rest, i] and [*stack, *rest, j] -> [*stack, i, j], summed over rest."""
    stack, rest = tuple(range(n_stack)), tuple(range(n_stack, a.ndim - 1))
    return lax.dot_general(a, b, ((rest, rest), (stack, stack)), precision=precision)


def _t(m: Array) -> Array:
    return jnp.swapaxes(m, -1, -2)
