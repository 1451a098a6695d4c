"""Adapters applied unmerged while the decoder generates: one for all rows, or several, one a row."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from peanut_jax.adapters import FactorTree
from peanut_jax.frontends.linen import with_pairs
from peanut_jax.models.cache import Cache, change_rows, row_axes
from peanut_jax.models.decoder import Decoder

# (tokens [batch, seq], real [batch, seq], cache) -> (logits [batch, vocab], cache)
Step = Callable[[Array, Array, Cache], tuple[Array, Cache]]


@flax.struct.dataclass
class RowFactors:
    """Each row's own factors: `factors` with a leading axis of the rows."""

    factors: FactorTree


# What is applied: one adapter's factors for all rows, each row's own, or nothing.
Served = FactorTree | RowFactors | None


def serve(
    factors: FactorTree | Sequence[FactorTree] | None, adapter_ids: Sequence[int] | None, rows: int, copies: int
) -> Served:
    """What `generate`'s arguments say is applied to each row.

    Args:
        factors: Those of one adapter, or of several.
        adapter_ids: With several: the number of each prompt's adapter.
        rows: Number of prompts.
        copies: Rows that each prompt becomes, one after the other: the number of beams.

    Raises:
        ValueError: ids without several adapters, or the other way round; ids that do not fit them.
    """
    if adapter_ids is None:
        if factors is None or isinstance(factors, dict):
            return factors
    elif factors is not None and not isinstance(factors, dict):
        return by_row(factors, adapter_ids, rows, copies)
    raise ValueError("adapter_ids goes with a list of several adapters' factors, and says which each prompt takes")


def by_row(factors: Sequence[FactorTree], adapter_ids: Sequence[int], rows: int, copies: int) -> RowFactors:
    """Each row's own factors. Adapters of other targets or ranks are filled up with zeros.

    Raises:
        ValueError: ids that are not one for each row, each an adapter's number; adapters without any kernel.
    """
    if len(adapter_ids) != rows or not all(0 <= one < len(factors) for one in adapter_ids):
        raise ValueError(f"adapter_ids must be {rows} numbers below {len(factors)}, got {list(adapter_ids)}")
    if not any(factors):
        raise ValueError("factors holds no adapted kernel")
    like = {path: pair for tree in factors for path, pair in tree.items()}
    rank = max(left.shape[-1] for tree in factors for left, _ in tree.values())
    alike = [{path: _filled_up(tree.get(path), pair, rank) for path, pair in like.items()} for tree in factors]
    ids = jnp.repeat(jnp.asarray(adapter_ids), copies)
    return RowFactors(jax.tree.map(lambda *arrays: jnp.stack(arrays)[ids], *alike))


def _filled_up(
    pair: tuple[Array, Array] | None, like: tuple[Array, Array], rank: int
) -> tuple[Float[Array, "*stack d_in rank"], Float[Array, "*stack rank d_out"]]:
    """The pair with zeros up to `rank`; without a pair, zeros for the kernel of `like`."""
    left, right = map(jnp.zeros_like, like) if pair is None else pair
    more, rest = (0, rank - left.shape[-1]), [(0, 0)] * (left.ndim - 1)
    return jnp.pad(left, [*rest, more]), jnp.pad(right, [*rest[1:], more, (0, 0)])


def adapted_step(model: Decoder, params: PyTree, served: Served) -> Step:
    """`Decoder.step` of the plain or the adapted model."""

    def plain(
        params: PyTree, tokens: Int[Array, "batch seq"], real: Bool[Array, "batch seq"], cache: Cache
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        return model.apply(params, tokens, real, cache, method="step")  # type: ignore[return-value]

    if served is None:
        return partial(plain, params)
    if not isinstance(served, RowFactors):
        return partial(with_pairs(plain, served), params)

    def one_row(factors: FactorTree, tokens: Array, real: Array, cache: Cache) -> tuple[Array, Cache]:
        alone = change_rows(cache, jnp.expand_dims)
        logits, alone = with_pairs(plain, factors)(params, tokens[None], real[None], alone)
        return logits[0], change_rows(alone, jnp.squeeze)

    axes = row_axes(model.config)
    return partial(jax.vmap(one_row, in_axes=(0, 0, 0, axes), out_axes=(0, axes)), served.factors)
