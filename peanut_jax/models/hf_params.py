"""The parameters of transformers' Flax models: every one from the checkpoint or drawn, every tensor accounted for."""

import difflib
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from peanut_jax.files.hub import Tensors
from peanut_jax.files.safetensors import finite
from peanut_jax.models import hf_faults, hf_init

logger = logging.getLogger(__name__)

# Heads beside a base that checkpoints do not keep under a prefix (T5).
HEADS = {"lm_head", "classifier", "qa_outputs", "classification_head"}
# Tensors that a checkpoint's base may have beyond the Flax model's: the function does not depend on them.
BUFFERS = re.compile(
    r"position_ids$|token_type_ids$|inv_freq$|num_batches_tracked$"
    r"|(attn|attention)\.(masked_)?bias$"  # causal masks of old GPT checkpoints
    r"|embed_positions\.weights?$"  # sinusoids, which Flax computes; learned positions have a place
    r"|embeddings\.mask_token$"  # for masked image modelling only
    r"|EncDecAttention\.relative_attention_bias\.weight$"  # of old T5 checkpoints, read by nobody
    r"|(^|\.)pooler\."  # PyTorch's class for such a task has none either
)

Keys = tuple[str, ...]


def read_params(
    model: Any, tensors: Tensors, is_flax: bool, *, new_modules: Iterable[str], new_head: bool, seed: int
) -> dict[str, Any]:
    """The whole parameter tree: each leaf from the checkpoint, or drawn because the caller or the task asks for it.

    Args:
        model: A `FlaxPreTrainedModel` without parameters.
        tensors: The checkpoint, by its own names.
        is_flax: Whether Flax saved it; else PyTorch.
        new_modules: Modules that are drawn whatever the checkpoint holds.
        new_head: Whether a head that the checkpoint lacks altogether is drawn, with a warning.

    Raises:
        ValueError: parameters or tensors that are missing, left over, misshapen or quantised; no such module.
    """
    leaves = flatten_dict(model.params_shape_tree)
    # With batch norm the tree holds two collections, and PyTorch's names do not say which one a tensor is for.
    start = 1 if "batch_stats" in model.params_shape_tree else 0
    full = {path[start:]: path for path in leaves}
    shapes = {path[start:]: leaf for path, leaf in leaves.items()}
    paths = {name: tuple(name.split("."))[start if is_flax else 0 :] for name in tensors}
    placed, left_over = _place(tensors, paths, is_flax, shapes, model.base_model_prefix)
    _check_left_over(model, left_over, placed)
    drawn = _within(new_modules, shapes)
    missing = shapes.keys() - placed.keys() - drawn
    if new_head:
        known = {model.base_model_prefix, *(path[0] for path in placed)}
        if head := {path for path in missing if path[0] not in known}:
            logger.warning("%s: the checkpoint has no %s, drawn from seed %d", _name(model), _list(head), seed)
        drawn, missing = drawn | head, missing - head
    _check_complete(model, missing)
    kept = {path: tensor for path, tensor in placed.items() if path not in drawn}
    _check_tensors(model, kept, shapes)
    params = {full[path]: jnp.asarray(tensor, model.dtype) for path, tensor in kept.items()}
    return unflatten_dict(params | _draw(model, {full[path] for path in drawn}, seed))


def _place(
    tensors: Tensors, paths: Mapping[str, Keys], is_flax: bool, shapes: Mapping[Keys, Any], prefix: str
) -> tuple[dict[Keys, np.ndarray], Tensors]:
    """Tensors by the path of the parameter they fill, and those of the base that fill none.

    A checkpoint of a model with a head keeps its base under `prefix` and one of a bare base does not, and the
    same goes for models: hence the two cases in which the prefix comes off or goes on. Other tasks' heads drop out.
    """
    from transformers.modeling_flax_pytorch_utils import rename_key_and_reshape_tensor

    in_model = any(path[0] == prefix for path in shapes)
    in_file = any(path[0] == prefix for path in paths.values())
    placed: dict[Keys, np.ndarray] = {}
    left_over: Tensors = {}
    for name, path in paths.items():
        tensor: Any = tensors[name]
        is_head = path[0] != prefix if in_file else path[0] in HEADS
        if in_file and not in_model and not is_head:
            path = path[1:]
        if not is_flax:
            path, tensor = rename_key_and_reshape_tensor(path, tensor, shapes, prefix)  # type: ignore[arg-type]
        if in_model and not in_file and (prefix, *path) in shapes:
            path = (prefix, *path)
        if path in shapes:
            placed[path] = tensor
        elif not is_head:
            left_over[name] = tensors[name]  # not transposed
    return placed, left_over


def _check_left_over(model: Any, left_over: Tensors, placed: Mapping[Keys, np.ndarray]) -> None:
    """Refuse tensors of the base that the Flax class has no place for: without them it is another function."""
    shared = [tensor for path, tensor in placed.items() if path[-2:] == ("shared", "embedding")]
    names = []
    for name, tensor in left_over.items():
        copy = name.endswith("embed_tokens.weight") and any(np.array_equal(tensor, one) for one in shared)
        if not copy and not BUFFERS.search(name):
            names.append(name)
    if names:
        raise ValueError(
            f"{_name(model)} has no place for {len(names)} tensors of the checkpoint's base, which it then "
            f"computes without: {', '.join(names[:5])}. {hf_faults.way_out(model.config.model_type)}"
        )


def _check_complete(model: Any, missing: Collection[Keys]) -> None:
    if missing:
        modules = sorted({path[-2] if len(path) > 1 else path[-1] for path in missing})[:4]
        raise ValueError(
            f"the checkpoint lacks {len(missing)} parameters of {_name(model)}: {_list(missing)}. Load the task "
            f"that it was saved for, or pass new_modules={tuple(modules)} to draw them from `seed`"
        )


def _check_tensors(model: Any, kept: Mapping[Keys, np.ndarray], shapes: Mapping[Keys, Any]) -> None:
    for path, tensor in kept.items():
        where = "/".join(path)
        if tensor.shape != shapes[path].shape:
            raise ValueError(
                f"{where!r} is {tensor.shape} in the checkpoint (in Flax's layout) and {shapes[path].shape} in "
                f"{_name(model)}. Drop the override that resizes it, or pass new_modules=({path[-2:][0]!r},) to "
                "draw that module from `seed`"
            )
        if not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2:
            raise ValueError(f"{where!r} is {tensor.dtype}: quantised weights cannot be read; dequantise them")
        with np.errstate(over="ignore"):
            if not finite(np.asarray(tensor, model.dtype)):
                raise ValueError(f"{where!r} holds a NaN or an infinity in {jnp.dtype(model.dtype).name}")


def _within(modules: Iterable[str], shapes: Mapping[Keys, Any]) -> set[Keys]:
    """Paths inside the named modules, each of which must exist."""
    found = set()
    for module in modules:
        inside = {path for path in shapes if f"/{module}/" in f"/{'/'.join(path)}/"}
        if not inside:
            near = difflib.get_close_matches(module, {key for path in shapes for key in path})
            raise ValueError(f"new_modules: the model has no module {module!r}; closest: {near}")
        found |= inside
    return found


def _draw(model: Any, paths: Collection[Keys], seed: int) -> dict[Keys, jax.Array]:
    """Initial values at `paths`, as PyTorch's class draws them."""
    shapes = {path: leaf.shape for path, leaf in flatten_dict(model.params_shape_tree).items()}
    key, drawn, rest = jax.random.key(seed), {}, []
    for path in sorted(paths):
        if draw := hf_init.draw_of(model.config, path, shapes):
            drawn[path] = draw(hf_init.key_of(key, path), shapes[path]).astype(model.dtype)
        else:
            rest.append(path)
    return drawn | (_draw_as_flax(model, rest, key) if rest else {})


def _draw_as_flax(model: Any, paths: Sequence[Keys], key: jax.Array) -> dict[Keys, jax.Array]:
    """What Flax's class writes at `paths`; under jit, so that XLA drops every other parameter's."""

    def draw(key: jax.Array) -> list[jax.Array]:
        fresh = flatten_dict(model.init_weights(key, model.input_shape))
        return [fresh[path].astype(model.dtype) for path in paths]

    return dict(zip(paths, jax.jit(draw)(key), strict=True))


def _name(model: Any) -> str:
    return type(model).__name__


def _list(paths: Collection[Keys]) -> str:
    names = sorted("/".join(path) for path in paths)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
