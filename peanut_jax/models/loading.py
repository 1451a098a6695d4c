"""Checkpoints of the decoder, streamed: from safetensors straight into stacked, cast and sharded arrays."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, Sharding

from peanut_jax.architectures import Rules, rules_for
from peanut_jax.base.kernels import COLLECTION, flatten, replace
from peanut_jax.base.origin import note
from peanut_jax.base.torch_names import container, tensor_names
from peanut_jax.files.safetensors import finite
from peanut_jax.files.torch_checkpoint import HEAD, Checkpoint, check_tied_head, open_checkpoint
from peanut_jax.messages import short
from peanut_jax.models.decoder import Decoder, kept_dtype, variable_shapes
from peanut_jax.models.decoder_config import DecoderConfig, read_config
from peanut_jax.models.generation_config import generation_of
from peanut_jax.sharding.mesh import param_shardings

# Tensors that some checkpoints hold and no model reads: the rotary frequencies are computed.
_BUFFERS = re.compile(r".*rotary_emb\.inv_freq")
# Bytes of a tensor that are read at a time where a shard takes some of its columns.
_BLOCK_BYTES = 1 << 24
_TILE_ROWS = 32


def load_decoder(
    source: str | Path,
    dtype: Any = jnp.bfloat16,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    **overrides: Any,
) -> tuple[Decoder, dict[str, Any]]:
    """Loads a Llama, Mistral, Qwen2 or Qwen3 checkpoint.

    Tensor by tensor, the layers of a kernel into one stacked array. With a mesh each process reads the slices that its
    devices hold and no others.

    Args:
        source: A folder with config.json and safetensors (one file, or an index and its shards), or a hub name.
        dtype: Of activations, kernels and embeddings. Norms stay float32.
        mesh: Devices to spread the parameters over; None puts them on the default device.
        rules: As for `sharding.param_shardings`; None takes `sharding.rules_for`. Needs a mesh.
        **overrides: Fields of `DecoderConfig`, such as `remat="dots"`. `tie_word_embeddings=False` takes the head that
            the checkpoint holds.

    Returns:
        The model, and its variables: `model.apply(params, tokens)`. `model.config.generation` is what
        generation_config.json says.

    Raises:
        FileNotFoundError: no such folder or repository, a shard that is missing.
        ValueError: a config that the decoder does not run; a generation_config.json that cannot be; tensors that are
            missing, left over, misshapen, quantised or hold a NaN; a head that the config ties to the embedding and
            that differs from it; rules that do not fit.

    Examples:
        >>> from peanut_jax.models.loading import load_decoder
        >>> model, params = load_decoder("meta-llama/Llama-3.2-1B")
        >>> logits = model.apply(params, jnp.array([[1, 2, 3]]))
        >>> logits.shape == (1, 3, model.config.vocab_size)
        True
    """
    dtype = jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"dtype must be a floating dtype such as float32 or bfloat16, got {dtype.name}")
    if mesh is None and rules is not None:
        raise ValueError("rules need a mesh: they say how its axes cut the parameters")
    config = read_config(str(source), **overrides)
    checkpoint = open_checkpoint(source)
    generation = generation_of(checkpoint.folder, config.vocab_size)
    if generation is not None and "generation" not in overrides:
        config = dataclasses.replace(config, generation=generation)
    model = Decoder(config, dtype)
    leaves = flatten(variable_shapes(model))
    _check_tensors(checkpoint, leaves, config.tie_word_embeddings)
    arrays = {}
    for path, sharding in _shardings(leaves, config, mesh, rules).items():
        shape = leaves[path].shape
        read = partial(_read, checkpoint, path, shape, jnp.dtype(kept_dtype(path, dtype)))
        arrays[path] = jax.make_array_from_callback(shape, sharding, _once(read))
    note(arrays, str(source))
    return model, replace({COLLECTION: {}}, arrays)


def _shardings(
    leaves: Mapping[str, Any], config: DecoderConfig, mesh: Mesh | None, rules: Rules | None
) -> Mapping[str, Sharding]:
    """Where each leaf goes: over the mesh, or to the default device."""
    if mesh is None:
        return dict.fromkeys(leaves, jnp.zeros(()).sharding)
    rules = rules_for(config.model_type, scan_layers=config.scan_layers) if rules is None else rules
    return param_shardings(leaves, mesh, rules)


def _once(read: Callable[[Any], np.ndarray]) -> Callable[[Any], np.ndarray]:
    """`read`, whose result serves every device that holds the same slices."""
    found: dict[tuple, np.ndarray] = {}

    def call(index: Any) -> np.ndarray:
        key = tuple((one.start, one.stop) for one in index)
        if key not in found:
            found[key] = read(index)
        return found[key]

    return call


def decoder_shapes(source: str | Path, **overrides: Any) -> tuple[str, Any]:
    """The model type and the variables as `jax.ShapeDtypeStruct`s, from config.json alone.

    Raises:
        As `load_decoder`.
    """
    config = read_config(str(source), **overrides)
    return config.model_type, variable_shapes(Decoder(config))


def torch_names(path: str, shape: Sequence[int]) -> list[str]:
    """The checkpoint's tensors of a leaf: one, or one a layer."""
    return tensor_names(path, None if container(path) is None else range(shape[0]))


def _check_tensors(checkpoint: Checkpoint, leaves: Mapping[str, Any], tied: bool) -> None:
    """Every tensor of the model is there, in its shape, and none is left over."""
    expected = {}
    for path, leaf in leaves.items():
        shape = tuple(leaf.shape[1:] if container(path) is not None else leaf.shape)
        for name in torch_names(path, leaf.shape):
            expected[name] = shape[::-1] if path.endswith("kernel") else shape
    missing = [name for name in expected if name not in checkpoint.entries]
    if missing:
        way_out = "; if the head is the embedding, set tie_word_embeddings to true there" if missing == [HEAD] else ""
        raise ValueError(
            f"{checkpoint.folder} lacks {len(missing)} tensors that its config.json asks for, first {missing[0]!r}"
            f"{way_out}"
        )
    for name, shape in expected.items():
        if checkpoint.entries[name].shape != shape:
            found = short(checkpoint.entries[name].shape)
            raise ValueError(f"{name!r} is {found}, and its config.json makes it {shape}")
    extra = [name for name in checkpoint.entries if name not in expected and not _BUFFERS.fullmatch(name)]
    if tied and HEAD in extra:
        check_tied_head(checkpoint)
        extra.remove(HEAD)  # a copy of the embedding
    if extra:
        raise ValueError(
            f"{checkpoint.folder} holds {len(extra)} tensors that the decoder has no place for, first "
            f"{short(extra[0])}: it would be another function without them"
        )


def _read(
    checkpoint: Checkpoint, path: str, shape: tuple[int, ...], dtype: np.dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """One shard of a leaf: the slices `index` of the array that the tensors make."""
    names = torch_names(path, shape)
    stacked = container(path) is not None
    layers = range(*index[0].indices(shape[0])) if stacked else range(1)
    inner, inner_shape = (index[1:], shape[1:]) if stacked else (index, shape)
    spans = [range(*one.indices(size)) for one, size in zip(inner, inner_shape, strict=True)]
    out = np.empty((len(layers), *map(len, spans)), dtype)
    for slot, layer in zip(out, layers, strict=True):
        _fill(checkpoint, names[layer], slot.T if path.endswith("kernel") else slot, spans, path.endswith("kernel"))
    return out if stacked else out[0]


def _fill(checkpoint: Checkpoint, name: str, slot: np.ndarray, spans: Sequence[range], transposed: bool) -> None:
    """Reads the part of a tensor into `slot`, which has the tensor's own layout, some rows at a time."""
    rows, *columns = reversed(spans) if transposed else spans
    entry = checkpoint.entries[name]
    step = max(1, _BLOCK_BYTES * len(rows) // max(1, (entry.stop - entry.start)))
    for start in range(rows.start, rows.stop, step):
        block = checkpoint.read_rows(name, start, min(start + step, rows.stop))
        if columns:
            block = block[:, columns[0].start : columns[0].stop]
        if not finite(block):
            raise ValueError(f"{name!r} in {entry.file} holds a NaN or an infinity")
        _copy(block, slot[start - rows.start : start - rows.start + len(block)])


def _copy(block: np.ndarray, slot: np.ndarray) -> None:
    """block -> slot, in tiles of rows: numpy transposes a whole tensor at a tenth of the speed, against the cache."""
    block = np.asarray(block, slot.dtype)
    unsigned = f"u{block.dtype.itemsize}"  # numpy copies its own dtypes faster than bfloat16
    source, target = block.view(unsigned), slot.view(unsigned) if slot.flags.c_contiguous else slot.T.view(unsigned).T
    for start in range(0, len(source), _TILE_ROWS):
        target[start : start + _TILE_ROWS] = source[start : start + _TILE_ROWS]
