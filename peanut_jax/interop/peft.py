"""Adapters of a Flax model to and from HF PEFT's directories.

Between a directory and our adapters stands `ModuleAdapters`: one theta for each torch module, which is what the files
hold.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from peanut_jax.adapters import Adapters, check
from peanut_jax.base import torch_names as names
from peanut_jax.base.kernels import Kernel, Leaf, find, flatten, module_of
from peanut_jax.base.origin import source_of
from peanut_jax.base.select import Target, saved_paths, select
from peanut_jax.interop import fingerprint, peft_folder
from peanut_jax.interop.peft_folder import ModuleAdapters, read, write
from peanut_jax.interop.peft_selection import check_modules, flax_saving, flax_selection, torch_saving, torch_selection
from peanut_jax.messages import reading
from peanut_jax.methods.base import Method


def save_adapter(
    folder: str | Path, adapters: Adapters, config: Method, params: PyTree, *, overwrite: bool = False
) -> None:
    """Writes an adapter as HF PEFT's directory: `adapter_config.json` and `adapter_model.safetensors`.

    `peft.PeftModel.from_pretrained` loads what PEFT has a function for: PEANuT of the output orientation with one of
    transformers' activations, and LoRA. It refuses the input orientation and nonlinear LoRA by their peft_type, `sin`
    by its act_fn; `to_lora` brings those to torch. `dropout` is kept for `load_adapter`, and PEFT ignores it.

    A fingerprint of the base's kernels is written with a method that reads them, such as PEANuT, since its update is a
    function of them. Where the config names no base, `base_model_name_or_path` is what the library's loaders loaded
    the kernels from.

    Args:
        folder: Made where it does not exist.
        adapters: From `init` or training. Layers of an `nn.scan` stack become modules of their own.
        config: The adapter's.
        params: The frozen base that it was trained on.
        overwrite: Replace the adapter that the folder holds; other files in it stay.

    With several processes all call it, and the first one writes.

    Raises:
        FileExistsError: the folder is not empty, and `overwrite` is false or it holds no adapter.
        ValueError: an adapter that does not belong to config and params.
        NotImplementedError: a method without such a form; a stack of layers that has no name in torch.
    """
    targets = check(adapters, params, config)
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(adapters) if isinstance(leaf, jax.Array)):
        adapters = multihost_utils.process_allgather(adapters, tiled=True)
    found = from_tree(adapters, config, params, targets)
    if jax.process_index() == 0:
        write(folder, found, overwrite=overwrite)


def load_adapter(folder: str | Path, params: PyTree, *, check_base: bool = True) -> tuple[Adapters, Method]:
    """Reads the directory that `save_adapter` or HF PEFT wrote, for a base in any layout (scanned or not).

    Args:
        folder: Holds `adapter_config.json` and `adapter_model.safetensors`; or a hub name.
        params: The frozen base, with the head that the adapter saved where it saved one.
        check_base: Compare the base with the fingerprint that was saved. False for a base that differs by design, such
            as one that was read as float16.

    Returns:
        The adapters, theta float32 and saved modules in their own dtype, and the config.

    Raises:
        FileNotFoundError: no such folder or file. Pickle files are not read.
        ValueError: a file, a config or tensors that cannot be read or do not fit `params`; another base.
    """
    loaded = read(folder)
    with reading(folder):
        adapters, config = to_tree(loaded, params)
    if check_base and config.READS_BASE:
        fingerprint.note_absence(loaded.fingerprint, str(folder))
        if loaded.fingerprint:
            found = fingerprint.fingerprint(params, config)
            fingerprint.check(found, loaded.fingerprint, str(folder), "these params")
    return adapters, config


def from_tree(adapters: Adapters, config: Method, params: PyTree, targets: Mapping[str, Target]) -> ModuleAdapters:
    """Our adapters as torch's modules, with the base's fingerprint."""
    flat = flatten(params)
    kernels = find(flat) | {path: target.kernel for path, target in targets.items()}
    rows = {path: names.rows_of(target) for path, target in targets.items()}
    found = by_module(adapters, config, rows, _stacks(kernels))
    config = torch_selection(config, found.thetas, module_slots(kernels))
    config = torch_saving(config, flat, names.every_module(flat, _stacks(kernels)))
    prints = fingerprint.of_targets(params, targets) if config.READS_BASE else {}
    dtype = next((flat[path].dtype.name for path in targets), None)
    if config.base_model_name_or_path is None:
        config = dataclasses.replace(config, base_model_name_or_path=source_of(flat[path] for path in targets))
    return dataclasses.replace(found, config=config, fingerprint=prints, base_dtype=dtype)


def by_module(
    adapters: Adapters, config: Method, rows: Mapping[str, Sequence[int] | None], scanned: Collection[str]
) -> ModuleAdapters:
    """Thetas by torch module and saved tensors by torch name.

    Args:
        rows: Rows of each kernel's stack.
        scanned: The containers of scanned layers.
    """
    thetas = {}
    for path, theta in adapters.theta.items():
        host = {name: np.asarray(jax.device_get(leaf)) for name, leaf in theta.items()}
        layers = names.modules(path, rows[path])
        for i, module in enumerate(layers):
            thetas[module] = {name: leaf if rows[path] is None else leaf[i] for name, leaf in host.items()}
    return ModuleAdapters(config, thetas, names.to_torch(adapters.saved, scanned), base_dtype="float32")


def to_tree(loaded: ModuleAdapters, params: PyTree) -> tuple[Adapters, Method]:
    """Torch's modules as adapters of `params`, and the config that selects them there.

    Raises:
        ValueError: modules that the model does not have, or that the config adapts and the files lack.
    """
    if loaded.own_fields:
        raise ValueError(
            f"this LoRA has ranks or scalings of its own for some modules, such as {next(iter(loaded.own_fields))!r}; "
            "from_lora reads it, as factors"
        )
    flat = flatten(params)
    axes = axes_of(loaded, flat)
    kernels = find(flat, axes)
    everywhere = module_slots(kernels)
    check_modules(loaded, everywhere)
    here = {module: place for module, place in everywhere.items() if module in loaded.thetas}
    layers: dict[str, list[str]] = {}
    for module, (path, _) in here.items():
        layers.setdefault(path, []).append(module)
    rows: dict[str, list[int] | None] = {
        path: None if here[of[0]][1] is None else [row for module in of if (row := here[module][1]) is not None]
        for path, of in layers.items()
    }
    config = flax_saving(loaded.config, flat, names.every_module(flat, _stacks(kernels)))
    if axes:
        config = dataclasses.replace(config, kernel_axes=axes)
    config = flax_selection(config, rows, params)
    targets = select(params, config)
    adapters = Adapters({}, {})
    for path in targets:
        parts = [loaded.thetas[module] for module in layers[path]]
        _check_alike(layers[path], parts)
        stacked = rows[path] is not None
        adapters.theta[path] = {
            name: jnp.asarray(np.stack([part[name] for part in parts]) if stacked else parts[0][name])
            for name in parts[0]
        }
    wanted = {path: flat[path] for path in saved_paths(flat, config)}
    kept = names.from_torch(loaded.saved, wanted, _stacks(kernels))
    adapters.saved.update({path: jnp.asarray(leaf) for path, leaf in kept.items()})
    check(adapters, params, config)
    return adapters, config


def axes_of(loaded: ModuleAdapters, flat: Mapping[str, Leaf]) -> dict[str, tuple[int, int]]:
    """How the thetas, each of one matrix, divide the axes of kernels that have more than two and no layer axis."""
    axes = {}
    for path, leaf in flat.items():
        theta = loaded.thetas.get(module_of(path))
        if theta is None or path.rpartition("/")[2] != "kernel" or leaf.ndim == 2:
            continue
        sides = peft_folder.sides(loaded.module_config(module_of(path)), theta)
        for n_out in range(1, leaf.ndim):
            own = math.prod(leaf.shape[: leaf.ndim - n_out]), math.prod(leaf.shape[leaf.ndim - n_out :])
            if all(side in (0, size) for side, size in zip(sides, own, strict=True)):
                axes[path] = (leaf.ndim - n_out, n_out)
                break
    return axes


def module_slots(kernels: Mapping[str, Kernel]) -> names.Slots:
    """The torch modules of `kernels`, as `names.slots`; a stack that has no name in torch cannot be meant by a file."""
    named = [
        kernel
        for kernel in kernels.values()
        if not kernel.stack or (len(kernel.stack) == 1 and names.container(kernel.path) is not None)
    ]
    return names.slots(Target(kernel) for kernel in named)


def _stacks(kernels: Mapping[str, Kernel]) -> set[str]:
    """The containers of scanned layers."""
    prefixes = {names.container(path) for path, kernel in kernels.items() if kernel.stack}
    return {prefix for prefix in prefixes if prefix is not None}


def _check_alike(modules: Sequence[str], thetas: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Refuses layers of one stack whose thetas have different shapes."""
    for module, theta in zip(modules, thetas, strict=True):
        for name, leaf in theta.items():
            if leaf.shape != thetas[0][name].shape:
                raise ValueError(
                    f"{name} is {leaf.shape} for {module!r} and {thetas[0][name].shape} for {modules[0]!r}, two layers "
                    "of one kernel; the adapter was trained on another base"
                )
