"""The files of one checkpoint: the arrays of a train state, and a note with the shape, dtype and checksum of each."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore
from jax import lax
from jaxtyping import Array, PyTree, UInt32

from peanut_jax.base.digest import SEEDS, position_weights
from peanut_jax.files.untrusted import read_json
from peanut_jax.training import TrainState

ARRAYS, NOTE = "state", "note"
_NOTE_FILE = "metadata"  # what orbax's JsonSave calls it
ABSENT = "(absent)"
# What damaged files were seen to raise in the parsers of orbax, tensorstore and json: one flipped byte of a JSON file
# can rename a key or change a type.
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, MemoryError, OverflowError, RecursionError,
    NotImplementedError,
)  # fmt: skip


@jax.jit
def digest(leaf: Array) -> UInt32[Array, "2"]:
    """Two sums modulo 2^32 of an array's bits, weighted by position: the same for every sharding and machine."""
    bits = _bits(leaf)
    sums = []
    for seed in SEEDS:
        terms = bits
        for axis, size in enumerate(bits.shape):
            weights = position_weights(size, seed * (2 * axis + 1))
            terms = terms * lax.broadcast_in_dim(weights, bits.shape, (axis,))
        sums.append(terms.sum(dtype=jnp.uint32))
    return jnp.stack(sums)


def _bits(leaf: Array) -> Array:
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    # 64-bit values have no integers to go to without jax_enable_x64; they become pairs.
    size = min(leaf.dtype.itemsize, 4)
    return lax.bitcast_convert_type(leaf, f"uint{8 * size}").astype(jnp.uint32)


def named(tree: PyTree) -> dict[str, Any]:
    """Path -> leaf. Orbax is given this and not the tree, so that no container type depends on how it stores one."""
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    for name, leaf in leaves.items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise ValueError(f"leaf {name} of the state must be an array, got {type(leaf).__name__}")
    return leaves


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _impl(leaf: Any) -> Any:
    """The implementation of a typed PRNG key, which `key_impl` tells of an array alone."""
    return jax.random.key_impl(jnp.empty(0, leaf.dtype))


def _raw(leaf: Any) -> Any:
    """The integers of a typed PRNG key; any other leaf itself."""
    if not _is_key(leaf):
        return leaf
    return jax.random.key_data(leaf) if isinstance(leaf, jax.Array) else jax.eval_shape(jax.random.key_data, leaf)


def host_copy(leaf: Any) -> Any:
    """What orbax is given: an array over several processes as it is, any other as a copy in host memory."""
    raw = _raw(leaf)
    return np.array(raw) if getattr(raw, "is_fully_addressable", True) else raw


def _description(leaf: Any) -> dict[str, Any]:
    raw = _raw(leaf)
    kind = {"key": str(leaf.dtype)} if _is_key(leaf) else {}
    return {"shape": list(raw.shape), "dtype": str(raw.dtype), **kind}


def descriptions(leaves: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and checksum of every leaf."""
    digests = jax.device_get({name: digest(_raw(leaf)) for name, leaf in leaves.items()})
    return {name: {**_description(leaf), "checksum": digests[name].tolist()} for name, leaf in leaves.items()}


def check_leaves(saved: Mapping[str, dict], like: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError unless the leaves are those of `like`, in name, shape and dtype."""
    here = {name: _description(leaf) for name, leaf in like.items()}
    there = {name: {k: v for k, v in leaf.items() if k != "checksum"} for name, leaf in saved.items()}
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if names:
        more = f" (and {len(names) - 1} more leaves differ)" if len(names) > 1 else ""
        raise ValueError(
            f"checkpoint {path} is of another state: leaf {names[0]} is {_brief(there.get(names[0]))} there and "
            f"{_brief(here.get(names[0]))} here{more}"
        )


def _brief(leaf: Mapping[str, Any] | None) -> str:
    return ABSENT if leaf is None else f"{leaf.get('key', leaf['dtype'])}{leaf['shape']}"


def read_note(path: Path) -> dict[str, Any]:
    """The note of the checkpoint in a folder.

    Raises:
        One of `UNREADABLE`: it is damaged.
    """
    file = path / NOTE / _NOTE_FILE
    note = read_json(file)
    content = {name: value for name, value in note.items() if name != "sha256"}
    if sealed(content) != note:
        raise ValueError(f"the checksum of {file} does not fit")
    if not _is_note(content):
        raise ValueError(f"{file} does not hold the leaves, the record and the metrics of a checkpoint")
    return content


def _is_note(content: Mapping[str, Any]) -> bool:
    leaves, metrics = content.get("leaves"), content.get("metrics", ABSENT)
    described = {"shape": list, "dtype": str, "checksum": list}
    return (
        isinstance(leaves, dict)
        and all(isinstance(leaf, dict) for leaf in leaves.values())
        and all(isinstance(leaf.get(name), kind) for leaf in leaves.values() for name, kind in described.items())
        and isinstance(content.get("record"), dict)
        and (metrics is None or isinstance(metrics, dict))
        and all(isinstance(value, (int, float)) for value in (metrics or {}).values())
        and isinstance(content.get("good"), (int, type(None)))
    )


def sealed(note: Mapping[str, Any]) -> dict[str, Any]:
    """The note with the checksum of its text."""
    return {**note, "sha256": hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()}


def read_arrays(path: Path, leaves: Mapping[str, dict]) -> dict[str, np.ndarray]:
    """The leaves as numpy arrays, read by this process alone, each compared with its checksum.

    By tensorstore, which orbax reads with too: orbax closes its event loop at the first damaged leaf, and every other
    leaf that is on its way then prints a traceback.

    Raises:
        One of `UNREADABLE`: a file or a leaf is damaged.
    """
    opening = {name: tensorstore.open(_spec(path / ARRAYS, name), open=True, read=True) for name in leaves}
    stores = {name: future.result() for name, future in opening.items()}
    for name, store in stores.items():
        _check_size(name, store, leaves[name])
    reading = {name: store.read() for name, store in stores.items()}
    arrays = {name: np.asarray(future.result()) for name, future in reading.items()}
    digests = jax.device_get({name: digest(array) for name, array in arrays.items()})
    for name, leaf in leaves.items():
        found = {**_description(arrays[name]), "checksum": digests[name].tolist()}
        if any(leaf[field] != value for field, value in found.items()):
            raise ValueError(f"the checksum of leaf {name} does not fit")
    return arrays


def _spec(folder: Path, name: str) -> dict[str, Any]:
    """Where orbax keeps a leaf of a flat mapping."""
    base = {"driver": "file", "path": f"{folder}/"}
    return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": f"{name}/"}}


def _check_size(name: str, store: Any, leaf: Mapping[str, Any]) -> None:
    """Before anything is read: a damaged size would be allocated."""
    shape, chunk = list(store.shape), list(store.chunk_layout.read_chunk.shape or ())
    if shape != leaf["shape"] or any(part > max(whole, 1) for part, whole in zip(chunk, shape, strict=True)):
        raise ValueError(f"leaf {name} has shape {shape} in chunks of {chunk}, and its note says {leaf['shape']}")


def placed(arrays: Mapping[str, np.ndarray], like: TrainState) -> TrainState:
    return jax.tree_util.tree_map_with_path(lambda path, leaf: _place(arrays[jax.tree_util.keystr(path)], leaf), like)


def _place(array: np.ndarray, like: Any) -> Array:
    """The array with the sharding of `like`; on the default device, uncommitted, where it has none of its own."""
    raw = _raw(like)
    sharding = getattr(raw, "sharding", None) if getattr(raw, "committed", True) else None
    if sharding is None:
        placed = jnp.array(array)
    else:
        placed = jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
    return jax.random.wrap_key_data(placed, impl=_impl(like)) if _is_key(like) else placed
