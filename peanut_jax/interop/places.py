"""Where an adapter's modules and saved tensors are in a PyTorch checkpoint."""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from peanut_jax.base.kernels import Kernel
from peanut_jax.base.torch_names import torch_kernels
from peanut_jax.files.torch_checkpoint import Checkpoint
from peanut_jax.interop.peft_folder import ModuleAdapters
from peanut_jax.messages import reading
from peanut_jax.methods.base import Method

# What old checkpoints call the leaves of a LayerNorm.
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


@dataclasses.dataclass(frozen=True)
class Places:
    """Where an adapter's modules and saved tensors are in a checkpoint.

    Attributes:
        tensors: Adapted module, as the adapter calls it -> name of its weight in the checkpoint.
        kernels: The same module -> its kernel.
        saved: Saved tensor -> its name in the checkpoint, or None where it has none yet.
        prefix: What the adapter's names begin with and the checkpoint's, of a bare base, do not.
    """

    tensors: dict[str, str]
    kernels: dict[str, Kernel]
    saved: dict[str, str | None]
    prefix: str


def read_dense(checkpoint: Checkpoint, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The weight `name` of a dense layer, and its bias, None where it has none."""
    bias = name.removesuffix("weight") + "bias"
    return checkpoint.read(name), checkpoint.read(bias) if bias in checkpoint.entries else None


def locate(checkpoint: Checkpoint, adapter: ModuleAdapters) -> Places:
    """Finds an adapter's modules in a checkpoint, with or without the prefix of a model with a head.

    Raises:
        ValueError: a module that is not there, or whose weight does not have the shape that theta asks for.
    """
    with reading(checkpoint.folder):
        return _locate(checkpoint, adapter)


def _locate(checkpoint: Checkpoint, adapter: ModuleAdapters) -> Places:
    modules, entries = list(adapter.thetas), checkpoint.entries
    if not modules:  # saved modules alone, which are called what the checkpoint calls them
        return Places({}, {}, {name: _saved_place(name, entries, "", "") for name in adapter.saved}, "")
    first = {module.partition(".")[0] for module in modules}
    off = f"{first.pop()}." if len(first) == 1 else ""
    on = {f"{name.partition('.')[0]}." for name in entries if "." in name}
    renamings = [("", ""), (off, ""), *(("", prefix) for prefix in sorted(on))]
    fitting = [
        (strip, add)
        for strip, add in dict.fromkeys(renamings)
        if all(f"{add}{module.removeprefix(strip)}.weight" in entries for module in modules)
    ]
    if len(fitting) > 1 and fitting[0][1]:
        raise ValueError(
            f"{modules[0]!r} could be {' or '.join(repr(add + modules[0]) for _, add in fitting)} in "
            f"{checkpoint.folder}; load the adapter into the whole model and save it again, so that its names say which"
        )
    if not fitting:
        missing = [module for module in modules if f"{module}.weight" not in entries]
        raise ValueError(
            f"{checkpoint.folder} has no tensor {missing[0] + '.weight'!r}, nor under another prefix, for "
            f"{len(missing)} of {len(modules)} adapted modules; its tensors are called {', '.join(list(entries)[:3])}"
        )
    strip, add = fitting[0]
    tensors = {module: f"{add}{module.removeprefix(strip)}.weight" for module in modules}
    known = torch_kernels({name: entry.shape for name, entry in entries.items()})
    kernels = {}
    for module, name in tensors.items():
        kernel = known.get(name.removesuffix(".weight"))
        if kernel is None:
            raise ValueError(f"{name!r} is {entries[name].shape} in {checkpoint.folder}: no dense kernel")
        _check_theta(module, adapter.thetas[module], kernel, adapter.module_config(module))
        kernels[module] = kernel
    saved = {name: _saved_place(name, entries, strip, add) for name in adapter.saved}
    return Places(tensors, kernels, saved, strip)


def _check_theta(module: str, theta: Mapping[str, np.ndarray], kernel: Kernel, config: Method) -> None:
    """Refuses a theta that is not of the kernel's shape."""
    for leaf, shape in config.shapes(kernel.d_in, kernel.d_out).items():
        if leaf not in theta or theta[leaf].shape != shape:
            found = theta[leaf].shape if leaf in theta else "missing"
            raise ValueError(
                f"module {module!r} is [{kernel.d_in}, {kernel.d_out}] in the checkpoint, for which {leaf} must be "
                f"{shape}; the adapter's is {found}. It was trained on another base"
            )


def _saved_place(name: str, entries: Iterable[str], strip: str, add: str) -> str | None:
    names = [name, add + name.removeprefix(strip)]
    for new, old in _OLD_NAMES.items():
        names += [candidate.removesuffix(new) + old for candidate in names if candidate.endswith(new)]
    return next((candidate for candidate in names if candidate in entries), None)
