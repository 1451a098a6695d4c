"""Adapters applied unmerged while the decoder generates: one for all rows, or several, one a row."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from peanut_jax.frontends.linen import bind
from peanut_jax.messages import short
from peanut_jax.models.decoder import Decoder
from peanut_jax.models.side_by_side import side_by_side
from peanut_jax.updates import KernelUpdate, LowRank, PerRow, Sum, Updates, checked, combine, map_with_axes, parts

# As a caller gives them: kernel path -> update, or a (left, right) tuple.
Factors = Mapping[str, Any]
# What is applied: updates for all rows or with rows of their own, or nothing.
Served = dict[str, Any] | None


def serve(
    factors: Factors | Sequence[Factors] | None, adapter_ids: Sequence[int] | None, prompts: int, rows: int, dtype: Any
) -> Served:
    """What `generate`'s arguments say is applied to each row.

    Args:
        factors: The updates of one adapter, or of several.
        adapter_ids: With several: the number of each prompt's adapter.
        prompts: Number of prompts.
        rows: Rows of the batch, which may be more.
        dtype: Of the model's products.

    Raises:
        ValueError: ids without several adapters, or the other way round; ids that do not fit them.
    """
    if adapter_ids is None:
        if factors is None or isinstance(factors, Mapping):
            return None if factors is None else checked(factors, "generate")
    elif factors is not None and not isinstance(factors, Mapping):
        adapters = [checked(one, "generate") for one in factors]
        return by_row(adapters, _checked_ids(adapter_ids, adapters, prompts), rows, dtype)
    raise ValueError("adapter_ids goes with a list of several adapters' factors, and says which each prompt takes")


def _checked_ids(adapter_ids: Sequence[int], adapters: Sequence[Updates], prompts: int) -> list[int]:
    chosen = np.asarray(adapter_ids)
    whole = chosen.shape == (prompts,) and chosen.dtype.kind in "iu"
    if not whole or not all(0 <= one < len(adapters) for one in chosen):
        raise ValueError(f"adapter_ids must be {prompts} numbers below {len(adapters)}, got {short(chosen.tolist())}")
    if not any(adapters):
        raise ValueError("factors holds no adapted kernel")
    return chosen.tolist()


def by_row(adapters: Sequence[Updates], adapter_ids: Sequence[int], rows: int, dtype: Any) -> Served:
    """Updates that give each row its own adapter; rows behind the last of `adapter_ids` have none.

    Adapters that no row takes are left out. Low-rank updates are kept once each, others once a row.
    """
    used = sorted(set(adapter_ids))
    numbers = [used.index(one) for one in adapter_ids] + [-1] * (rows - len(adapter_ids))
    paths = dict.fromkeys(path for one in used for path in adapters[one])
    return {path: _at_one_kernel([adapters[one].get(path) for one in used], numbers, dtype) for path in paths} or None


def _at_one_kernel(updates: Sequence[KernelUpdate | None], rows: Sequence[int], dtype: Any) -> Any:
    """One update of a kernel from those of several adapters: of each kind of update, its part of every adapter."""
    split = [() if update is None else parts(update) for update in updates]
    found: list[Any] = []
    for kind in dict.fromkeys(type(part) for one in split for part in one):
        own = [_combined([part for part in one if type(part) is kind]) for one in split]
        found.append(side_by_side(own, rows, dtype) if kind is LowRank else _per_row(own, rows))
    return found[0] if len(found) == 1 else Sum(tuple(found))


def _combined(updates: Sequence[Any]) -> Any:
    """The sum of one adapter's updates of one kind; None of none."""
    return combine(*({"": update} for update in updates))[""] if updates else None


def _per_row(updates: Sequence[Any], rows: Sequence[int]) -> PerRow:
    """Each row's own of updates of one kind, zeros where it has none."""
    real = [update for update in updates if update is not None]
    widest: dict[str, int] = {}

    def note(axes: tuple[str, ...], array: Array) -> Array:
        for word, size in zip(axes, array.shape[array.ndim - len(axes) :], strict=True):
            widest[word] = max(size, widest.get(word, 0))
        return array

    def pad(axes: tuple[str, ...], array: Array) -> Array:
        own = [(0, widest[word] - n) for word, n in zip(axes, array.shape[array.ndim - len(axes) :], strict=True)]
        return jnp.pad(array, [(0, 0)] * (array.ndim - len(axes)) + own)

    for update in real:
        map_with_axes(note, update)
    nothing = jax.tree.map(jnp.zeros_like, map_with_axes(pad, real[0]))
    alike = [nothing if update is None else map_with_axes(pad, update) for update in updates]
    index = np.array([len(alike) if row < 0 else row for row in rows])
    leaves = [jax.tree.leaves(one) for one in (*alike, nothing)]
    stacks: list[int] = []
    map_with_axes(lambda axes, array: stacks.append(array.ndim - len(axes)), real[0])
    stacked = [
        jnp.take(jnp.stack(arrays, axis=stack), index, axis=stack)
        for arrays, stack in zip(zip(*leaves, strict=True), stacks, strict=True)
    ]
    return PerRow(jax.tree.unflatten(jax.tree.structure(nothing), stacked))


def repeated(served: Served, copies: int) -> Served:
    """For rows of which each prompt has `copies`, one after the other."""

    def repeat(axes: tuple[str, ...], array: Array) -> Array:
        if "rows" not in axes:
            return array
        return jnp.repeat(array, copies, axis=axes.index("rows") - len(axes))

    return served and {path: map_with_axes(repeat, update) for path, update in served.items()}


def adapted(model: Decoder, method: str, served: Served) -> Callable[..., Any]:
    """A method of the plain or the adapted model, as a function of its variables and arguments."""
    plain = partial(model.apply, method=method)
    return plain if served is None else bind(plain, served)
