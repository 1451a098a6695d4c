"""Adapters merged into the PyTorch checkpoint that they were trained on, shard by shard, without torch or a model."""

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from peanut_jax.adapters import Adapters, check, check_adapters
from peanut_jax.base import torch_names as names
from peanut_jax.files.atomic import check_apart, new_folder
from peanut_jax.files.hub import INDEX_FILE, NOT_FETCHED, local_folder, read_index, read_json
from peanut_jax.files.safetensors import copy_file, dtype_of, finite, write_entry
from peanut_jax.files.torch_checkpoint import MERGED_FILE, Checkpoint, open_base
from peanut_jax.interop import fingerprint
from peanut_jax.interop.lora import Track, tensor_update
from peanut_jax.interop.peft import by_module, from_tree
from peanut_jax.interop.peft_folder import ModuleAdapters, label_count, read
from peanut_jax.interop.places import Places, locate
from peanut_jax.methods.base import Method
from peanut_jax.updates import KernelUpdate, combine, outputs

logger = logging.getLogger(__name__)

# HF PEFT's task -> how transformers' class for it is called, after the name of the architecture.
_CLASSES = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}

_HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "shared.weight", "word_embeddings.weight", "word_embedding.weight")
# Rows of a tensor that are merged at a time.
BLOCK = 512


def export_merged(
    source: str | Path,
    folder: str | Path,
    adapters: Adapters | Sequence[Adapters],
    config: Method | Sequence[Method],
    params: PyTree | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes the checkpoint `source` with W0 + dW in place of each adapted kernel, for transformers, vLLM or llama.cpp.

    Only adapted tensors and saved modules change; every other tensor keeps its bytes, and names, dtypes, shards, index,
    configuration and tokenizer stay. The sum is formed in float32 and rounded once to the checkpoint's dtype. Of each
    shard one tensor at a time is in memory. The folder appears whole, at the end, or not at all.

    A head that the checkpoint lacks is added to the last shard; `config.json` then gets the architecture of the
    config's `task_type` and the number of labels, and a bare base takes the names that it has beside a head.

    Args:
        source: A Hugging Face checkpoint in PyTorch's safetensors, a folder or a hub name: the base, not a merged one.
        folder: Where to write; its parent must be on the disk that takes the result.
        adapters: From `init` or training; several are added up, each computed from the original W0.
        config: The adapter's, or one for each of several.
        params: The base that was trained on, where it is at hand: `source` is then compared with it by its fingerprint,
            and the updates are computed in its dtype, as in training. Otherwise nothing is compared, and the updates
            are computed in float32.
        overwrite: Replace `folder` where it holds a merged checkpoint.

    Raises:
        FileExistsError: the folder exists.
        FileNotFoundError, ValueError: a checkpoint that cannot be read or is not the base; NaNs in the result; saved
            modules that have no place in it.
        NotImplementedError: adapters with a stack of layers that has no name in torch.
    """
    trees = [adapters] if isinstance(adapters, Adapters) else list(adapters)
    configs = list(config) if isinstance(config, Sequence) else [config]
    for tree in trees:
        check_adapters(tree)
    if len(trees) != len(configs) or not trees:
        raise ValueError(f"adapters and config must be as many: got {len(trees)} and {len(configs)}")
    loaded = {}
    for i, (tree, one) in enumerate(zip(trees, configs, strict=True)):
        if params is None:
            rows = _rows(tree, one)
            scanned = {names.container(path) or "" for path, stacked in rows.items() if stacked is not None}
            loaded[f"adapter {i}"] = by_module(tree, one, rows, scanned)
        else:
            loaded[f"adapter {i}"] = from_tree(tree, one, params, check(tree, params, one))
    _export(source, folder, loaded, overwrite, iter)


def merge_folders(
    source: str | Path,
    adapters: Sequence[str | Path],
    folder: str | Path,
    *,
    overwrite: bool = False,
    check_base: bool = True,
    track: Track = iter,
) -> None:
    """As `export_merged`, from adapter directories, whose fingerprints are checked.

    Args:
        adapters: What `save_adapter` or HF PEFT wrote: PEANuTs and LoRAs.
        check_base: As for `load_adapter`.
        track: Wraps the list of tensors that change, to show progress.
    """
    folders = [local_folder(str(one)).resolve() for one in adapters]
    if len(set(folders)) < len(folders):
        raise ValueError(f"the same adapter is given twice: {', '.join(map(str, adapters))}")
    check_apart(Path(folder), *folders)
    loaded = {str(one): read(one) for one in adapters}
    for name, adapter in loaded.items():
        if check_base and adapter.config.READS_BASE:
            fingerprint.note_absence(adapter.fingerprint, name)
    if not check_base:
        loaded = {name: dataclasses.replace(adapter, fingerprint={}) for name, adapter in loaded.items()}
    _export(source, folder, loaded, overwrite, track, check_base)


def _export(
    source: str | Path,
    folder: str | Path,
    adapters: Mapping[str, ModuleAdapters],
    overwrite: bool,
    track: Track,
    check_base: bool = True,
) -> None:
    fingerprinted = all(adapter.fingerprint for adapter in adapters.values())
    checkpoint = open_base(source, fingerprinted or not check_base)
    check_apart(Path(folder), checkpoint.folder)
    places = {name: locate(checkpoint, adapter) for name, adapter in adapters.items()}
    replaced, added, rename = _saved_tensors(checkpoint, adapters, places)
    uses: dict[str, list[tuple[str, str]]] = {}
    for adapter, place in places.items():
        for module, tensor in place.tensors.items():
            uses.setdefault(tensor, []).append((adapter, module))
    if clash := sorted(uses.keys() & replaced.keys()):
        raise ValueError(f"{clash[0]!r} is adapted by one adapter and saved in full by another")
    files = list(checkpoint.headers)
    order = sorted([*uses, *replaced], key=lambda name: (files.index(checkpoint.entries[name].file), name))
    with new_folder(Path(folder), overwrite, MERGED_FILE) as temporary:
        _copy_others(checkpoint, temporary)
        starts: dict[Path, int] = {}

        def copy(file: Path) -> None:
            extra = added if file == files[-1] else {}
            starts[file] = copy_file(file, temporary / file.name, checkpoint.headers[file], rename, extra)

        for name in track(order):
            entry = checkpoint.entries[name]
            if entry.file not in starts:  # shard by shard: another base shows before all is copied
                copy(entry.file)
            array = replaced[name] if name in replaced else _merged(checkpoint, name, uses[name], adapters, places)
            write_entry(temporary / entry.file.name, starts[entry.file] + entry.start, array)
        for file in files:
            if file not in starts:
                copy(file)
        if rename or added:
            _write_index(temporary, checkpoint, rename, added)
            _write_config(temporary, Path(folder), adapters.values(), added)
        record = {"base": str(source), "adapters": {n: str(a.config) for n, a in adapters.items()}, "tensors": order}
        (temporary / MERGED_FILE).write_text(json.dumps(record, indent=1) + "\n")


def _merged(
    checkpoint: Checkpoint,
    name: str,
    uses: Sequence[tuple[str, str]],
    adapters: Mapping[str, ModuleAdapters],
    places: Mapping[str, Places],
) -> np.ndarray:
    """The tensor with every adapter's update, each of the original kernel."""
    conv1d = places[uses[0][0]].kernels[uses[0][1]].transposed
    tensor, updates = checkpoint.read(name), []
    for adapter, module in uses:
        one = adapters[adapter]
        update, found = tensor_update(tensor, one.thetas[module], one.module_config(module), one.update_dtype, conv1d)
        if one.fingerprint:
            fingerprint.check({module: found}, one.fingerprint, adapter, str(checkpoint.folder))
        updates.append({name: update})
    update = combine(*updates)[name]
    for start in range(0, tensor.shape[1 if conv1d else 0], BLOCK):  # no float32 array of the kernel's size is made
        part = slice(start, start + BLOCK)
        place = (slice(None), part) if conv1d else (part,)
        tensor[place], whole = _add(tensor[place], outputs(update, part), conv1d)
        if not whole:
            raise ValueError(f"NaNs detected in the merged weights; the adapter or the base is broken at {name!r}")
    return tensor


@partial(jax.jit, static_argnums=2)
def _add(
    tensor: Float[Array, "rows columns"], update: KernelUpdate, conv1d: bool
) -> tuple[Float[Array, "rows columns"], Bool[Array, ""]]:
    """W0 + dW in torch's layout, summed in float32 and rounded once; and whether all of it is finite."""
    kernel = (tensor if conv1d else tensor.T).astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        total = kernel + update.delta(kernel)
    total = (total if conv1d else total.T).astype(tensor.dtype)
    return total, jnp.isfinite(total).all()


def _rows(adapters: Adapters, config: Method) -> dict[str, list[int] | None]:
    """The rows of each stack, by what theta's axes and the config say."""
    found: dict[str, list[int] | None] = {}
    axes = {name: len(leaf.axes) for name, leaf in config.leaves().items()}
    for path, theta in adapters.theta.items():
        name, leaf = next(iter(theta.items()))
        stack = leaf.shape[: leaf.ndim - axes[name]]
        if len(stack) > 1:
            raise NotImplementedError(
                f"kernel {path!r} is a stack of {stack}; PyTorch's names reach one axis of layers"
            )
        layers = config.layers_to_transform
        wanted = range(stack[0]) if stack and layers is None else (layers,) if isinstance(layers, int) else layers
        # A stack that is shorter than another lacks the last of the chosen layers.
        found[path] = sorted(set(wanted or ()))[: stack[0]] if stack else None
        if stack and len(found[path] or ()) != stack[0]:
            raise ValueError(f"theta of {path!r} has {stack[0]} layers, and layers_to_transform names {wanted}")
    return found


def _saved_tensors(
    checkpoint: Checkpoint, adapters: Mapping[str, ModuleAdapters], places: Mapping[str, Places]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, str]]:
    """Tensors of saved modules: those to replace, those to add, and the renaming (old -> new) that adding asks for."""
    replaced: dict[str, np.ndarray] = {}
    added: dict[str, np.ndarray] = {}
    prefix = ""
    some = next(iter(next(iter(places.values())).tensors.values()))
    own_dtype = dtype_of(checkpoint.entries[some].dtype, some)
    top = {name.partition(".")[0] for name in checkpoint.entries}
    for name, adapter in adapters.items():
        _check_tied(checkpoint, name, adapter)
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


def _check_tied(checkpoint: Checkpoint, name: str, adapter: ModuleAdapters) -> None:
    """Refuses to replace one of two tied matrices, which whoever loads the result would tie again."""
    if not read_json(checkpoint.folder / "config.json").get("tie_word_embeddings", _HEAD not in checkpoint.entries):
        return
    for saved in adapter.saved:
        if saved == _HEAD or (saved.endswith(_EMBEDDINGS) and adapter.base_dtype is None):
            raise ValueError(
                f"{name} saves {saved!r}, and {checkpoint.folder} ties its head to its embedding, so that whoever "
                "loads a merged checkpoint would replace one by the other. Serve this adapter unmerged, or untie the "
                "base (tie_word_embeddings: false and a lm_head.weight of its own) before training"
            )


def _copy_others(checkpoint: Checkpoint, folder: Path) -> None:
    """Everything beside the weights: configuration, tokenizer, index, folders. No other copy of the old weights."""
    shards = {file.name for file in checkpoint.headers}
    stale = shutil.ignore_patterns(
        *(pattern.partition("/")[0] for pattern in NOT_FETCHED), "openvino", ".cache", ".git"
    )
    for entry in checkpoint.folder.iterdir():
        weights = entry.suffix == ".safetensors" or stale(str(checkpoint.folder), [entry.name])
        if entry.name in shards or weights or entry.name == MERGED_FILE:
            continue
        if entry.is_dir():
            shutil.copytree(entry, folder / entry.name)
        else:
            shutil.copyfile(entry, folder / entry.name)


def _write_index(folder: Path, checkpoint: Checkpoint, rename: Mapping[str, str], added: Mapping[str, Any]) -> None:
    path = folder / INDEX_FILE
    if not path.is_file():
        return
    index = read_index(path)
    index["weight_map"] = {rename.get(name, name): file for name, file in index["weight_map"].items()}
    index["weight_map"] |= dict.fromkeys(added, list(checkpoint.headers)[-1].name)
    if "total_size" in (index.get("metadata") or {}):
        index["metadata"]["total_size"] += sum(array.nbytes for array in added.values())
    path.write_text(json.dumps(index, indent=2) + "\n")


def _write_config(
    folder: Path, final: Path, adapters: Iterable[ModuleAdapters], added: Mapping[str, np.ndarray]
) -> None:
    """The class that has the added head and the number of its labels; transformers makes a head of these."""
    task_type = next((adapter.config.task_type for adapter in adapters if added.keys() & adapter.saved), None)
    path = folder / "config.json"
    content = read_json(path)
    own = re.match(r"(\w+?)(For[A-Z]\w+|LMHeadModel|Model)$", str((content.get("architectures") or [""])[0]))
    if own is None or task_type not in _CLASSES:
        logger.warning(
            "%s: the head (%s) is added, but config.json stays as it is: its architectures=%s and task_type=%r name no "
            "class for it",
            final, ", ".join(added), content.get("architectures"), task_type,
        )  # fmt: skip
        return
    content["architectures"] = [own[1] + _CLASSES[task_type]]
    labels = label_count(added)
    if labels is not None and len(content.get("id2label") or {}) != labels:
        content["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        content["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
    path.write_text(json.dumps(content, indent=2) + "\n")
