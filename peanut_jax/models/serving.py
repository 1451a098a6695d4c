"""Adapters applied unmerged while the decoder generates: one for all rows, or several, one a row."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from peanut_jax.frontends.linen import bind
from peanut_jax.messages import short
from peanut_jax.models.cache import Cache, change_rows, row_axes
from peanut_jax.models.decoder import Decoder
from peanut_jax.updates import KernelUpdate, Updates, checked, map_with_axes

# (tokens [batch, seq], real [batch, seq], cache) -> (logits [batch, vocab], cache)
Step = Callable[[Array, Array, Cache], tuple[Array, Cache]]


@flax.struct.dataclass
class RowUpdates:
    """Each row's own updates: `updates` with a leading axis of the rows."""

    updates: Updates


# As a caller gives them: kernel path -> update, or a (left, right) tuple.
Factors = Mapping[str, Any]
# What is applied: one adapter's updates for all rows, each row's own, or nothing.
Served = Updates | RowUpdates | None


def serve(
    factors: Factors | Sequence[Factors] | None, adapter_ids: Sequence[int] | None, rows: int, copies: int
) -> Served:
    """What `generate`'s arguments say is applied to each row.

    Args:
        factors: The updates of one adapter, or of several.
        adapter_ids: With several: the number of each prompt's adapter.
        rows: Number of prompts.
        copies: Rows that each prompt becomes, one after the other: the number of beams.

    Raises:
        ValueError: ids without several adapters, or the other way round; ids that do not fit them.
    """
    if adapter_ids is None:
        if factors is None or isinstance(factors, Mapping):
            return None if factors is None else checked(factors, "generate")
    elif factors is not None and not isinstance(factors, Mapping):
        return by_row([checked(one, "generate") for one in factors], adapter_ids, rows, copies)
    raise ValueError("adapter_ids goes with a list of several adapters' factors, and says which each prompt takes")


def by_row(adapters: Sequence[Updates], adapter_ids: Sequence[int], rows: int, copies: int) -> RowUpdates:
    """Each row's own updates. Adapters of other targets or ranks are filled up with zeros.

    Raises:
        ValueError: ids that are not one for each row, each an adapter's number; adapters without any kernel, or of
            methods whose updates of one kernel differ in kind.
    """
    chosen = np.asarray(adapter_ids)
    whole = chosen.shape == (rows,) and chosen.dtype.kind in "iu"
    if not whole or not all(0 <= one < len(adapters) for one in chosen):
        raise ValueError(f"adapter_ids must be {rows} numbers below {len(adapters)}, got {short(chosen.tolist())}")
    if not any(adapters):
        raise ValueError("factors holds no adapted kernel")
    widest = _own_sizes(update for tree in adapters for update in tree.values())
    like: Updates = {path: update for tree in adapters for path, update in tree.items()}
    alike = [{path: _filled_up(tree.get(path), one, widest, path) for path, one in like.items()} for tree in adapters]
    ids = jnp.repeat(jnp.asarray(chosen), copies)
    return RowUpdates(jax.tree.map(lambda *arrays: jnp.stack(arrays)[ids], *alike))


def _own_sizes(updates: Iterable[KernelUpdate]) -> dict[str, int]:
    """The largest size of each axis that is not a side of the kernel, such as the rank, by its word."""
    found: dict[str, int] = {}

    def note(axes: tuple[str, ...], array: Array) -> Array:
        for word, size in zip(axes, array.shape[array.ndim - len(axes) :], strict=True):
            if word not in ("in", "out"):
                found[word] = max(size, found.get(word, 0))
        return array

    for update in updates:
        map_with_axes(note, update)
    return found


def _filled_up(update: KernelUpdate | None, like: KernelUpdate, widest: Mapping[str, int], path: str) -> KernelUpdate:
    """The update with zeros up to the widest of its own axes, which changes nothing; without one, zeros as `like`."""

    def pad(axes: tuple[str, ...], array: Array) -> Array:
        own = zip(axes, array.shape[array.ndim - len(axes) :], strict=True)
        return jnp.pad(array, [(0, 0)] * (array.ndim - len(axes)) + [(0, widest.get(w, n) - n) for w, n in own])

    if update is not None and type(update) is not type(like):
        raise ValueError(
            f"the updates of {path!r} are a {type(update).__name__} and a {type(like).__name__}: adapters side by side "
            "in one batch must be of one method"
        )
    return map_with_axes(pad, jax.tree.map(jnp.zeros_like, like) if update is None else update)


def adapted_step(model: Decoder, params: PyTree, served: Served) -> Step:
    """`Decoder.step` of the plain or the adapted model."""

    def plain(
        params: PyTree, tokens: Int[Array, "batch seq"], real: Bool[Array, "batch seq"], cache: Cache
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        return model.apply(params, tokens, real, cache, method="step")  # type: ignore[return-value]

    if served is None:
        return partial(plain, params)
    if not isinstance(served, RowUpdates):
        return partial(bind(plain, served), params)

    def one_row(updates: Updates, tokens: Array, real: Array, cache: Cache) -> tuple[Array, Cache]:
        alone = change_rows(cache, jnp.expand_dims)
        logits, alone = bind(plain, updates)(params, tokens[None], real[None], alone)
        return logits[0], change_rows(alone, jnp.squeeze)

    axes = row_axes(model.config)
    return partial(jax.vmap(one_row, in_axes=(0, 0, 0, axes), out_axes=(0, axes)), served.updates)
