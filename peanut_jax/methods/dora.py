"""DoRA: LoRA of the kernel's columns, each then brought to a trained length."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from peanut_jax import xla_cpu
from peanut_jax.matrices import Matrix
from peanut_jax.methods.base import Leaf, RankMethod, zeros


class Rescaled(NamedTuple):
    """W0 + dW = gain * (W0 + left @ right), a gain for each output; the bias is not rescaled.

    Attributes:
        left: [*stack, d_in, r].
        right: [*stack, r, d_out], the gain and scaling folded in.
        excess: [*stack, d_out], gain - 1.
        shift: [*stack, d_out], what takes the gain off the bias: -excess * bias.
    """

    left: Float[Array, "*stack d_in r"]
    right: Float[Array, "*stack r d_out"]
    excess: Float[Array, "*stack d_out"]
    shift: Float[Array, "*stack d_out"]

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """See `updates.Update`."""
        return {"left": ("in", "r"), "right": ("r", "out"), "excess": ("out",), "shift": ("out",)}

    def __call__(self, x: Array, y: Array, precision: lax.PrecisionLike = None) -> Array:
        product = xla_cpu.low_rank_product(x, self.left.astype(x.dtype), self.right.astype(x.dtype), precision)
        return product + _along(self.excess, y) * y + _along(self.shift, y)

    def delta(self, kernel: Float[Array, "*stack d_in d_out"]) -> Float[Array, "*stack d_in d_out"]:
        """left @ right + excess * W0 in full float32."""
        product = jnp.matmul(self.left, self.right, precision=lax.Precision.HIGHEST)
        return product + self.excess[..., None, :] * kernel


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoraConfig(RankMethod):
    """DoRA: W = m * (W0 + scaling * A @ B) / ||W0 + scaling * A @ B||, with the norm and m for each output.

    The norm counts as a constant in the backward pass (section 4.3 of the paper; HF PEFT does the same). It is computed
    from products with r columns, once a step: neither dW nor W0 + dW is formed, where HF PEFT forms both in every
    forward pass. Dropout falls on the input of A alone; HF PEFT's falls on the rescaled base as well.

    See `RankMethod` and `AdapterConfig` for the fields. `scaling` is LoRA's alpha / r.

    Examples:
        >>> pj.DoraConfig(r=8).shapes(16, 24)
        {'a': (16, 8), 'b': (8, 24), 'magnitude': (24,)}

    References:
        arXiv:2402.09353v6, equations 5 and 11; `peft/tuners/lora/dora.py` of huggingface/peft 0.21.2.
    """

    NAME: ClassVar[str] = "DoRA"

    def leaves(self) -> dict[str, Leaf]:
        """LoRA's A and B, and the magnitude m, which starts as W0's."""
        return {"a": Leaf(("in", "r")), "b": Leaf(("r", "out"), zeros), "magnitude": Leaf(("out",), _norms)}

    def update(
        self,
        theta: Mapping[str, Float[Array, "..."]],
        kernel: Matrix,
        bias: Float[Array, "*stack d_out"] | None = None,
    ) -> Rescaled:
        """The low-rank part with its gain, and the gain of the base."""
        left, right = theta["a"], self.scaling * theta["b"]
        norm = lax.stop_gradient(jnp.sqrt(_squares(kernel, left, right)))
        # A column of zeros stays one, whatever its gain.
        gain = jnp.where(norm > 0, theta["magnitude"] / jnp.where(norm > 0, norm, 1.0), 1.0)
        excess = gain - 1
        shift = jnp.zeros_like(excess) if bias is None else -excess * bias.astype(jnp.float32)
        return Rescaled(left, gain[..., None, :] * right, excess, shift)


def _norms(key: PRNGKeyArray, shape: tuple[int, ...], kernel: Matrix) -> Array:
    return jnp.sqrt(_column_squares(kernel))


def _squares(
    kernel: Matrix, left: Float[Array, "*stack d_in r"], right: Float[Array, "*stack r d_out"]
) -> Float[Array, "*stack d_out"]:
    """Squared lengths of the columns of W0 + left @ right: |w|^2 + 2 w . (left @ b) + b^T (left^T left) b."""
    cross = (jnp.swapaxes(kernel.transposed_times(left), -1, -2) * right).sum(-2)
    own = (right * (jnp.swapaxes(left, -1, -2) @ left @ right)).sum(-2)
    return jnp.maximum(_column_squares(kernel) + 2 * cross + own, 0)


def _column_squares(kernel: Matrix) -> Float[Array, "*stack d_out"]:
    return jnp.square(kernel.array().astype(jnp.float32)).sum(-2)


def _along(gains: Float[Array, "*stack d_out"], y: Array) -> Array:
    """[*stack, d_out] -> the same with an axis of 1 for each of y's axes in between, in y's dtype."""
    between = [1] * (y.ndim - gains.ndim)
    return gains.reshape(*gains.shape[:-1], *between, gains.shape[-1]).astype(y.dtype)
