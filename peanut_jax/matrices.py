"""The frozen kernel as a method reads it: through products, so that a method does not know how it is stored."""

from typing import Any, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
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


def float32_dot(*args: Any, **kwargs: Any) -> Array:
    """`lax.dot_general` with a float32 result of operands in any dtype; for a module's `dot_general`."""
    return jax.lax.dot_general(*args, **{**kwargs, "preferred_element_type": jnp.float32})
