"""Digests of a whole base: every leaf, exact, by which a base that changed is told from the one that was trained on.

As `digest`, a sum of integers: the same for every sharding, number of processes and layout of the layers. The bits of
each element are mixed before they are weighted, since sums modulo 2^32 of float32 bits do not show an even number of
changed signs.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from flax.traverse_util import flatten_dict
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

from peanut_jax.base.digest import SEEDS, hexadecimal, mixed, position_weights
from peanut_jax.base.kernels import COLLECTION, Leaf, find, flatten
from peanut_jax.base.torch_names import container, modules

# numpy adds up smaller leaves: that takes less time than to compile a program for their shape.
_HOST_BYTES = 1 << 20
# What one reduction takes at least, so that its result is small beside the leaf.
_BLOCK = 256


def digests(params: PyTree, skipped: Collection[str] = ()) -> dict[str, str]:
    """Name -> 16 hexadecimal digits, for every leaf of the base and each layer of a stacked one.

    No array of a leaf's size is made, and none is gathered. With several processes all of them call this.

    Args:
        params: The base, of any sharding and layout; variables with other collections too.
        skipped: Paths of leaves that do not count, such as those of a head that is trained.

    Returns:
        Digests by module and leaf, such as `model.layers.0.mlp.up_proj.kernel`, scanned layers or not.

    Raises:
        ValueError: as `flatten`.
    """
    leaves = {path: _raw(leaf) for path, leaf in _every_leaf(params).items() if path not in skipped}
    stacks = _stacks(leaves)
    small = {path: leaf for path, leaf in leaves.items() if _is_small(leaf)}
    # All are sent off before the first is fetched.
    parts: dict[str, Any] = {
        path: _large(leaf, path in stacks) for path, leaf in leaves.items() if path not in small
    } | small
    found: dict[str, str] = {}
    for path, part in jax.device_get(parts).items():
        stacked, shape = path in stacks, _bits_shape(leaves[path])
        sums = _whole(part, stacked) if path in small else _finished(part, shape, stacked)
        rows = range(len(sums)) if stacked else None
        names = [f"{name}.{path.rpartition('/')[2]}".removeprefix(".") for name in modules(path, rows)]
        found |= {name: hexadecimal(one) for name, one in zip(names, sums.reshape(-1, 2), strict=True)}
    return found


def _every_leaf(params: PyTree) -> dict[str, Leaf]:
    """The leaves of `flatten`, and those of other collections under the collection's name."""
    rest = {name: tree for name, tree in unfreeze(params).items() if name != COLLECTION} if COLLECTION in params else {}
    return flatten(params) | flatten_dict(rest, sep="/")


def _stacks(leaves: Mapping[str, Leaf]) -> set[str]:
    """The leaves with a leading axis of layers: those of a container that holds a stacked kernel."""
    depths = {container(path): kernel.stack[0] for path, kernel in find(leaves).items() if len(kernel.stack) == 1}
    members = {path: container(path) for path in leaves}
    scanned = {
        prefix
        for prefix, depth in depths.items()
        if prefix and all(leaf.shape[:1] == (depth,) for path, leaf in leaves.items() if members[path] == prefix)
    }
    return {path for path, prefix in members.items() if prefix in scanned}


def _is_small(leaf: Leaf) -> bool:
    here = not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated
    return here and leaf.size * leaf.dtype.itemsize <= _HOST_BYTES


def _raw(leaf: Leaf) -> Leaf:
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _large(leaf: Leaf, stacked: bool) -> list[jax.Array]:
    """For each seed the sums over the last axes, of which there are enough to leave little."""
    count, block, words = 0, 1, _words(leaf.dtype)
    while count < leaf.ndim - stacked and block < _BLOCK:
        count += 1
        block *= leaf.shape[-count]
    shape = _bits_shape(leaf)
    weights = _weights(shape, range(len(shape) - count - (words > 1), len(shape)))
    across = None if getattr(leaf, "is_fully_addressable", True) else NamedSharding(leaf.sharding.mesh, PartitionSpec())
    return _program(across)(leaf, weights)


@cache
def _program(across: NamedSharding | None) -> Any:
    """Adds up the axes that have weights, the last ones; `across` gives the result to every process."""
    return jax.jit(_added, out_shardings=across)


def _added(leaf: jax.Array, weights: Sequence[Sequence[jax.Array]]) -> list[jax.Array]:
    bits = mixed(_bits(leaf) ^ np.uint32(SEEDS[0]))
    terms = [_weighted(bits, one) for one in weights]
    zero = np.uint32(0)
    # One reduction for both: XLA on CPU would otherwise keep `bits`, and each product, as an array of its own.
    axes = tuple(range(bits.ndim - len(weights[0]), bits.ndim))
    return lax.reduce(terms, [zero, zero], lambda x, y: [x[0] + y[0], x[1] + y[1]], axes)


def _finished(parts: Sequence[np.ndarray], shape: tuple[int, ...], stacked: bool) -> np.ndarray:
    """The digest, or one for each layer, from sums over the last axes of an array of that shape."""
    sums = []
    for part, weights in zip(parts, _weights(shape, range(stacked, parts[0].ndim)), strict=True):
        axes = tuple(range(int(stacked), part.ndim))
        sums.append(_weighted(part, weights).sum(axes, dtype=np.uint32))
    return np.stack(sums, -1)


def _whole(leaf: np.ndarray, stacked: bool) -> np.ndarray:
    """The digest of a leaf on the host, or one for each of its layers."""
    bits = mixed(np.atleast_1d(_host_bits(leaf)) ^ np.uint32(SEEDS[0]))
    return _finished([bits, bits], bits.shape, stacked)


def _weights(shape: Sequence[int], axes: Iterable[int]) -> list[list[np.ndarray]]:
    """For each seed the weights of these axes, which depend on how far they are from the last."""
    axes = list(axes)
    return [[position_weights(shape[a], seed * (2 * (len(shape) - a) + 1), np) for a in axes] for seed in SEEDS]


def _weighted(array: Any, weights: Sequence[Any]) -> Any:
    """The array times the weights of its last axes, or of all but the first."""
    for back, one in enumerate(reversed(weights)):
        array = array * one.reshape(-1, *[1] * back)
    return array


def _words(dtype: np.dtype) -> int:
    """32-bit words of an element; 1 for what is smaller too."""
    return max(1, dtype.itemsize // 4)


def _bits_shape(leaf: Leaf) -> tuple[int, ...]:
    words = _words(leaf.dtype)
    return (*leaf.shape, words) if words > 1 else tuple(leaf.shape)


def _bits(leaf: jax.Array) -> jax.Array:
    """The bits of each element as 32-bit integers, along an axis of their own where it has more of them."""
    leaf = _whole_bytes(leaf)
    shape = _bits_shape(leaf)
    if jnp.iscomplexobj(leaf):  # which XLA does not cast to integers
        leaf = jnp.stack([leaf.real, leaf.imag], -1)
    unsigned = lax.bitcast_convert_type(leaf, f"uint{8 * min(leaf.dtype.itemsize, 4)}")
    return unsigned.astype(jnp.uint32).reshape(shape)


def _host_bits(leaf: np.ndarray) -> np.ndarray:
    """As `_bits`."""
    leaf = _whole_bytes(leaf)
    shape, leaf = _bits_shape(leaf), np.ascontiguousarray(leaf)
    return leaf.reshape(-1).view(f"<u{min(leaf.dtype.itemsize, 4)}").astype(np.uint32).reshape(shape)


def _whole_bytes(leaf: Any) -> Any:
    """Dtypes that take less than a byte, and booleans, as integers or floats that take one or more."""
    if leaf.dtype == bool or (jnp.issubdtype(leaf.dtype, jnp.integer) and jnp.iinfo(leaf.dtype).bits < 8):
        return leaf.astype(np.int8)
    narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and jnp.finfo(leaf.dtype).bits < 8
    return leaf.astype(np.float32) if narrow else leaf
