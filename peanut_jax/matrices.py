"""The frozen kernel as a method reads it: through products, so that a method does not know how it is stored."""

from functools import partial
from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from peanut_jax import xla_cpu


@runtime_checkable
class Matrix(Protocol):
    """W0 [*stack, d_in, d_out], frozen: products are differentiable in the other operand alone."""

    @property
    def shape(self) -> tuple[int, ...]:
        """[*stack, d_in, d_out]."""

    def times(self, a: Float[Array, "*stack d_out r"]) -> Float[Array, "*stack d_in r"]:
        """W0 @ a, accumulated in float32."""

    def transposed_times(self, a: Float[Array, "*stack d_in r"]) -> Float[Array, "*stack d_out r"]:
        """W0^T @ a, accumulated in float32."""

    def array(self) -> Float[Array, "*stack d_in d_out"]:
        """The whole of it, for sums over its elements and for the start of training; not for products in a step."""


@flax.struct.dataclass
class Plain:
    """A `Matrix` that is an array of floats in any dtype."""

    values: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def times(self, a: Float[Array, "*stack d_out r"]) -> Float[Array, "*stack d_in r"]:
        return _times(self.values, a)

    def transposed_times(self, a: Float[Array, "*stack d_in r"]) -> Float[Array, "*stack d_out r"]:
        return _transposed_times(self.values, a)

    def array(self) -> Float[Array, "*stack d_in d_out"]:
        if isinstance(self.values, jax.ShapeDtypeStruct):
            raise ValueError(
                "this method's start reads the kernel, and only its shape is known here: pass arrays, or params as an "
                "argument of the function given to jax.eval_shape"
            )
        return self.values


# Rules of their own, because the cotangent is float32 where the kernel may be bfloat16: the rules that JAX derives
# would hold a float32 copy of W0 to multiply the two.


@jax.custom_vjp
def _times(kernel: Array, a: Array) -> Array:
    return jnp.matmul(kernel, a.astype(kernel.dtype), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _transposed_times(kernel: Array, a: Array) -> Array:
    return xla_cpu.transposed_times(kernel, a)


def _times_forward(kernel: Array, a: Array) -> tuple[Array, Array]:
    return _times(kernel, a), kernel


def _times_backward(kernel: Array, g: Array) -> tuple[None, Array]:
    return None, xla_cpu.transposed_times(kernel, g)


def _transposed_times_forward(kernel: Array, a: Array) -> tuple[Array, Array]:
    return _transposed_times(kernel, a), kernel


def _transposed_times_backward(kernel: Array, g: Array) -> tuple[None, Array]:
    return None, jnp.matmul(kernel, g.astype(kernel.dtype), preferred_element_type=jnp.float32)


_times.defvjp(_times_forward, _times_backward)
_transposed_times.defvjp(_transposed_times_forward, _transposed_times_backward)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _float32_dot(x: Array, kernel: Array, dimension_numbers: Any, precision: lax.PrecisionLike) -> Array:
    return lax.dot_general(x, kernel, dimension_numbers, precision, preferred_element_type=jnp.float32)


@_float32_dot.defjvp
def _float32_dot_jvp(dimension_numbers: Any, precision: lax.PrecisionLike, primals: Any, tangents: Any) -> Any:
    # The derived rule would multiply the float32 cotangent by a float32 copy of the kernel.
    _, tangent = jax.jvp(
        partial(lax.dot_general, dimension_numbers=dimension_numbers, precision=precision), primals, tangents
    )
    return _float32_dot(*primals, dimension_numbers, precision), tangent.astype(jnp.float32)


def float32_dot(x: Array, kernel: Array, dimension_numbers: Any, precision: lax.PrecisionLike = None) -> Array:
    """`lax.dot_general` with a float32 result of operands in any dtype, which are those of its backward pass too.

    For a module's `dot_general`.
    """
    return _float32_dot(x, kernel, dimension_numbers, precision)
