"""Saved modules in a merged checkpoint: what they replace, what they add, and what cannot be."""

from collections.abc import Mapping

import numpy as np

from peanut_jax.files.safetensors import dtype_of, finite
from peanut_jax.files.torch_checkpoint import EMBEDDINGS, HEAD, Checkpoint
from peanut_jax.files.untrusted import FLAG, read_json, typed
from peanut_jax.interop.peft_folder import ModuleAdapters
from peanut_jax.interop.places import Places
from peanut_jax.messages import reading


def saved_tensors(
    checkpoint: Checkpoint, adapters: Mapping[str, ModuleAdapters], places: Mapping[str, Places]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, str]]:
    """Tensors of saved modules: those to replace, those to add, and the renaming (old -> new) that adding asks for."""
    replaced: dict[str, np.ndarray] = {}
    added: dict[str, np.ndarray] = {}
    prefix = ""
    some = next(
        (tensor for place in places.values() for tensor in place.tensors.values()), next(iter(checkpoint.entries))
    )
    own_dtype = dtype_of(checkpoint.entries[some].dtype, some)
    top = {name.partition(".")[0] for name in checkpoint.entries}
    for name, adapter in adapters.items():
        _check_tied(checkpoint, name, adapter, places[name])
        for saved, array in adapter.saved.items():
            place = places[name].saved[saved]
            entry = checkpoint.entries.get(place or "")
            if (place or saved) in (added if entry is None else replaced):
                raise ValueError(f"two of the adapters save {saved!r}; the sum of two heads means nothing")
            if entry is not None and entry.shape != array.shape:
                raise ValueError(
                    f"{saved!r} is {array.shape} in {name} and {entry.shape} in {checkpoint.folder}; give the "
                    "checkpoint without this head, or the one that was trained on"
                )
            if entry is None and not places[name].tensors:
                raise ValueError(
                    f"{saved!r} of {name} has no place in {checkpoint.folder}, and no adapted kernel says what the "
                    "base is called beside it: give the checkpoint of a model with this head"
                )
            if entry is None and saved.removeprefix(places[name].prefix).partition(".")[0] in top:
                raise ValueError(f"{saved!r} of {name} has no place in {checkpoint.folder}, and is no new head either")
            with np.errstate(over="ignore"):  # an error below
                cast = array.astype(own_dtype if entry is None else dtype_of(entry.dtype, place or ""))
            if not finite(cast):
                raise ValueError(f"{saved!r} of {name} holds a NaN or an infinity in the checkpoint's {cast.dtype}")
            if entry is None:
                prefix = places[name].prefix
                added[saved] = cast
            else:
                replaced[str(place)] = cast
    rename = {name: prefix + name for name in checkpoint.entries} if prefix else {}
    return replaced, added, rename


def _check_tied(checkpoint: Checkpoint, name: str, adapter: ModuleAdapters, place: Places) -> None:
    """Refuses to change one of two tied matrices, which whoever loads the result would tie again."""
    path = checkpoint.folder / "config.json"
    with reading(path):
        if not typed(read_json(path), "tie_word_embeddings", FLAG, HEAD not in checkpoint.entries):
            return
    changed = [
        *(f"saves {one!r}" for one in adapter.saved if one == HEAD),
        *(f"saves {one!r}" for one in adapter.saved if one.endswith(EMBEDDINGS) and adapter.base_dtype is None),
        *(f"adapts {one!r}" for one in place.tensors.values() if one == HEAD),
    ]
    if changed:
        raise ValueError(
            f"{name} {changed[0]}, and {checkpoint.folder} ties its head to its embedding, so that whoever loads a "
            "merged checkpoint would replace one by the other. Serve this adapter unmerged, or untie the base "
            "(tie_word_embeddings: false and a lm_head.weight of its own) before training"
        )
