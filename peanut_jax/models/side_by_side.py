"""Low-rank updates of several adapters in one batch, of any methods and ranks: each row has its own."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from peanut_jax.models.sizes import power_of_two
from peanut_jax.updates import LowRank

# Up to so many columns a product costs a matrix unit as much as one column.
_FREE = 128


class SideBySide(NamedTuple):
    """Every adapter's factors once, one behind the other, and which of their columns are a row's own.

    Attributes:
        left: [*stack, total, d_in], transposed, so that an adapter's part is contiguous.
        right: [*stack, total, d_out], finite.
        columns: [*stack, rows, r], one after the other; -1 behind the last, for adapters of smaller ranks.
    """

    left: Float[Array, "*stack total d_in"]
    right: Float[Array, "*stack total d_out"]
    columns: Int[Array, "*stack rows r"]

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """See `updates.Update`."""
        return {"left": ("total", "in"), "right": ("total", "out"), "columns": ("rows", "r")}

    def __call__(
        self, x: Float[Array, "rows seq d_in"], y: Float[Array, "rows seq d_out"], precision: lax.PrecisionLike = None
    ) -> Float[Array, "rows seq d_out"]:
        """Each row's own factors alone count, a NaN of another's too.

        A step of decoding reads memory more than it computes, and so multiplies by all factors, each read once however
        many rows share it. For prompts every row's own factors are gathered.
        """
        total = self.left.shape[-2]
        if x.shape[1] == 1 or total <= _FREE:
            first, count = self.columns[:, :1], (self.columns >= 0).sum(-1, keepdims=True)
            column = jnp.arange(total)
            own = (column >= first) & (column < first + count)
            left, right, equation = self.left, self.right, ("bsd,td->bst", "bst,to->bso")
        else:
            own, places = self.columns >= 0, jnp.maximum(self.columns, 0)
            left, right, equation = self.left[places], self.right[places], ("bsd,btd->bst", "bst,bto->bso")
        h = jnp.einsum(equation[0], x, left.astype(x.dtype), precision=precision)
        h = jnp.where(own[:, None], h, 0)
        return jnp.einsum(equation[1], h, right.astype(x.dtype), precision=precision)


def side_by_side(updates: Sequence[LowRank | None], rows: Sequence[int], dtype: Any) -> SideBySide:
    """The updates of one kernel in one; sizes are rounded up, so that other adapters share what was compiled.

    Args:
        updates: Of each adapter, None where it does not change the kernel.
        rows: The number of each row's adapter; -1 for none.
        dtype: Of the model's products.
    """
    ranks = [0 if update is None else update.left.shape[-1] for update in updates]
    starts = np.cumsum([0, *ranks])
    total, widest = power_of_two(int(starts[-1])), power_of_two(max(ranks))
    columns = np.full((len(rows), widest), -1, np.int32)
    for row, adapter in enumerate(rows):
        if adapter >= 0:
            columns[row, : ranks[adapter]] = np.arange(starts[adapter], starts[adapter + 1])
    real = [update for update in updates if update is not None]
    stack = real[0].left.shape[:-2]
    behind = [(0, 0)] * len(stack) + [(0, total - int(starts[-1])), (0, 0)]
    left = jnp.concatenate([jnp.swapaxes(update.left, -1, -2).astype(dtype) for update in real], axis=-2)
    right = jnp.concatenate([update.right.astype(dtype) for update in real], axis=-2)
    # 0 * NaN is NaN: what is not finite goes to the left, where other rows' columns are put away.
    broken = ~jnp.isfinite(right).all(-1, keepdims=True)
    left, right = jnp.where(broken, jnp.nan, left), jnp.where(broken, 0, right)
    wide = np.broadcast_to(columns, (*stack, *columns.shape))
    return SideBySide(jnp.pad(left, behind), jnp.pad(right, behind), jnp.asarray(wide))
