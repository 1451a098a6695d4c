"""What a method does to a module: a pytree that is bound beside the module's kernel and called where the module runs.

Updates of one module add up: each is given the module's own output and says what to add to it, as each dW is a function
of the original W0. An update whose arrays are all zero changes nothing.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from peanut_jax import xla_cpu


@runtime_checkable
class Update(Protocol):
    """A pytree of arrays, a NamedTuple, bound beside the module that it changes."""

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """Field -> its axes behind the stack's, in words: "in", "out" (the kernel's sides), another for one of its own.

        They give each array's sharding.
        """

    def __call__(
        self, x: Float[Array, "*x d_in"], y: Float[Array, "*y d_out"], precision: lax.PrecisionLike = None
    ) -> Float[Array, "*y d_out"]:
        """What to add to the module's output y, given its input x in y's dtype, both [*stack, *rest, side]."""


@runtime_checkable
class KernelUpdate(Update, Protocol):
    """An update that is a change of the kernel."""

    def delta(self, kernel: Float[Array, "*stack d_in d_out"]) -> Float[Array, "*stack d_in d_out"]:
        """dW in float32 for the frozen kernel, given in float32. Merging forms it; training and serving never do."""


class LowRank(NamedTuple):
    """dW = left @ right, which is never formed where the module runs.

    Attributes:
        left: [*stack, d_in, r].
        right: [*stack, r, d_out], scaling folded in.
    """

    left: Float[Array, "*stack d_in r"]
    right: Float[Array, "*stack r d_out"]

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """See `Update`."""
        return {"left": ("in", "r"), "right": ("r", "out")}

    def __call__(self, x: Array, y: Array, precision: lax.PrecisionLike = None) -> Array:
        return xla_cpu.low_rank_product(x, self.left.astype(x.dtype), self.right.astype(x.dtype), precision)

    def delta(self, kernel: Array | None = None) -> Float[Array, "*stack d_in d_out"]:
        """left @ right in full float32, whatever the kernel."""
        return jnp.matmul(self.left, self.right, precision=lax.Precision.HIGHEST)


class Sum(NamedTuple):
    """Several updates of one kernel, each computed from the original W0."""

    parts: tuple[KernelUpdate, ...]

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """None here: each part has its own."""
        return {}

    def __call__(self, x: Array, y: Array, precision: lax.PrecisionLike = None) -> Array:
        return functools.reduce(jnp.add, [part(x, y, precision) for part in self.parts])

    def delta(self, kernel: Float[Array, "*stack d_in d_out"]) -> Float[Array, "*stack d_in d_out"]:
        """The sum of theirs."""
        return functools.reduce(jnp.add, [part.delta(kernel) for part in self.parts])


class PerRow(NamedTuple):
    """An update of each row of a batch: `update` has an axis of the rows before its own axes, "rows" in words."""

    update: KernelUpdate

    def axes(self) -> Mapping[str, tuple[str, ...]]:
        """None here: the update has them."""
        return {}

    def __call__(self, x: Array, y: Array, precision: lax.PrecisionLike = None) -> Array:
        def one(update: Update, x: Array, y: Array) -> Array:
            return update(x, y, precision)

        return jax.vmap(one)(self.update, x, y)


# Kernel path -> its update.
Updates = dict[str, KernelUpdate]


def checked(updates: Any, caller: str, kind: type = KernelUpdate) -> dict[str, Any]:
    """`updates`, once it is what `compute_updates` and `factors` return; a plain (left, right) tuple is a `LowRank`.

    Args:
        caller: The function's name, for the error.
        kind: What each has to be: an `Update` where none is merged.

    Raises:
        ValueError: anything else.
    """
    if not isinstance(updates, Mapping):
        raise ValueError(
            f"{caller} takes the mapping that peanut_jax.compute_updates(adapters, params, config) returns, got "
            f"{type(updates).__name__}"
        )
    found = {}
    for path, update in updates.items():
        if type(update) is tuple and len(update) == 2:
            update = LowRank(*update)
        if not isinstance(update, kind):
            raise ValueError(
                f"{caller} takes updates, and {path!r} is a {type(update).__name__}: pass adapters through "
                "peanut_jax.compute_updates(adapters, params, config) first"
            )
        found[path] = update
    return found


def combine(*trees: Updates) -> Updates:
    """Several adapters at once: the sum of their updates, each computed from the original W0.

    Low-rank updates of one kernel become one, side by side in `left` and `right`.

    Args:
        *trees: From `compute_updates` or `factors`.

    Raises:
        ValueError: anything that is not an update, by path.
    """
    given = [checked(tree, "combine") for tree in trees]
    paths = dict.fromkeys(path for tree in given for path in tree)
    return {path: _sum([tree[path] for tree in given if path in tree]) for path in paths}


def _sum(updates: Sequence[KernelUpdate]) -> KernelUpdate:
    if len(updates) == 1:
        return updates[0]
    low_rank = [update for update in updates if isinstance(update, LowRank)]
    if len(low_rank) < len(updates):
        return Sum(tuple(updates))
    left = jnp.concatenate([update.left for update in low_rank], axis=-1)
    return LowRank(left, jnp.concatenate([update.right for update in low_rank], axis=-2))


def parts(update: Update) -> tuple[Update, ...]:
    """The updates that a `Sum` is of; any other update itself."""
    return update.parts if isinstance(update, Sum) else (update,)


def map_with_axes(fn: Callable[[tuple[str, ...], Any], Any], update: Any) -> Any:
    """The update with `fn(its axes in words, array)` for each of its arrays."""
    if isinstance(update, Sum):
        return Sum(tuple(map_with_axes(fn, part) for part in update.parts))
    if isinstance(update, PerRow):
        return PerRow(map_with_axes(lambda axes, array: fn(("rows", *axes), array), update.update))
    axes = update.axes()
    return type(update)(*(fn(axes[name], getattr(update, name)) for name in update._fields))


def outputs(update: Any, part: slice) -> Any:
    """The update of some of the kernel's outputs alone: the columns `part` of its matrix."""

    def cut(axes: tuple[str, ...], array: Array) -> Array:
        if "out" not in axes:
            return array
        behind = len(axes) - axes.index("out") - 1
        return array[(..., part, *[slice(None)] * behind)]

    return map_with_axes(cut, update)


def scattered(update: Any, rows: Sequence[int], layers: int) -> Any:
    """The update of some layers as one of the whole stack, zero elsewhere.

    Args:
        rows: The layers that its arrays' first axis holds.
        layers: Number of layers of the stack.
    """
    index = jnp.array(rows)
    return jax.tree.map(lambda a: jnp.zeros((layers, *a.shape[1:]), a.dtype).at[index].set(a), update)
