"""Adapters merged into the PyTorch checkpoint that they were trained on, shard by shard, without torch or a model."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from peanut_jax.adapters import Adapters, check, check_adapters
from peanut_jax.base import torch_names as names
from peanut_jax.files.atomic import check_apart, new_folder
from peanut_jax.files.hub import local_folder
from peanut_jax.files.safetensors import copy_file, write_entry
from peanut_jax.files.torch_checkpoint import MERGED_FILE, Checkpoint, open_base
from peanut_jax.interop import fingerprint
from peanut_jax.interop.lora import Track, tensor_update
from peanut_jax.interop.merged_files import check_others, copy_others, write_config, write_index
from peanut_jax.interop.merged_saved import saved_tensors
from peanut_jax.interop.peft import by_module, from_tree
from peanut_jax.interop.peft_folder import ModuleAdapters, read
from peanut_jax.interop.places import Places, locate, read_dense
from peanut_jax.methods.base import Method
from peanut_jax.updates import KernelUpdate, combine, outputs

logger = logging.getLogger(__name__)


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
    check_others(checkpoint)
    places = {name: locate(checkpoint, adapter) for name, adapter in adapters.items()}
    replaced, added, rename = saved_tensors(checkpoint, adapters, places)
    uses: dict[str, list[tuple[str, str]]] = {}
    for adapter, place in places.items():
        for module, tensor in place.tensors.items():
            uses.setdefault(tensor, []).append((adapter, module))
    if clash := sorted(uses.keys() & replaced.keys()):
        raise ValueError(f"{clash[0]!r} is adapted by one adapter and saved in full by another")
    files = list(checkpoint.headers)
    order = sorted([*uses, *replaced], key=lambda name: (files.index(checkpoint.entries[name].file), name))
    with new_folder(Path(folder), overwrite, MERGED_FILE) as temporary:
        copy_others(checkpoint, temporary)
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
            write_index(temporary, checkpoint, rename, added)
            write_config(temporary, Path(folder), adapters.values(), added)
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
    (tensor, bias), updates = read_dense(checkpoint, name), []
    for adapter, module in uses:
        one = adapters[adapter]
        update, found = tensor_update(
            tensor, bias, one.thetas[module], one.module_config(module), one.update_dtype, conv1d
        )
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
