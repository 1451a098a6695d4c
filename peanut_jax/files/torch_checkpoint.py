"""A Hugging Face checkpoint in PyTorch's safetensors, read one tensor at a time, and an adapter's place in it."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from peanut_jax.adapters import theta_shapes
from peanut_jax.base.kernels import Kernel
from peanut_jax.base.torch_names import torch_kernels
from peanut_jax.files.hub import INDEX_FILE, local_folder, read_index, weight_files
from peanut_jax.files.safetensors import Entry, Header, read_entry, read_header
from peanut_jax.interop.peft_folder import ModuleAdapters
from peanut_jax.methods.base import Config

# What old checkpoints call the leaves of a LayerNorm.
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
# Written beside merged weights: reading them as a base again would apply an adapter to the wrong kernels.
MERGED_FILE = "peanut_jax_merged.json"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where every tensor of a checkpoint is."""

    folder: Path
    headers: dict[Path, Header]
    entries: dict[str, Entry]

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its own dtype (bfloat16 as ml_dtypes has it)."""
        entry = self.entries[name]
        return read_entry(entry, name, self.headers[entry.file].data)

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows of one tensor, without reading the others."""
        entry = self.entries[name]
        row = (entry.stop - entry.start) // entry.shape[0]
        part = dataclasses.replace(
            entry,
            shape=(stop - start, *entry.shape[1:]),
            start=entry.start + start * row,
            stop=entry.start + stop * row,
        )
        return read_entry(part, name, self.headers[entry.file].data)


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


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Reads the headers of a checkpoint, one file or shards, in a folder or on the hub.

    Raises:
        FileNotFoundError: no folder, config.json or safetensors; a shard that is missing.
        ValueError: a file that is corrupt, a tensor that is there twice or not where the index says, a checkpoint saved
            by Flax.
    """
    folder = local_folder(str(source))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a Hugging Face checkpoint")
    files = weight_files(str(folder), None)
    if files[0].suffix != ".safetensors":
        raise ValueError(f"{files[0]} is Flax's own format; a PyTorch checkpoint in safetensors is needed here")
    headers = {file: read_header(file) for file in files}
    entries: dict[str, Entry] = {}
    for file, header in headers.items():
        if header.metadata.get("format", "pt") != "pt":
            raise ValueError(
                f"{file} was saved by {header.metadata['format']!r}; only PyTorch's names and layout can be kept. "
                "For a Flax checkpoint use peanut_jax.merge and the model's save_pretrained"
            )
        for name, entry in header.entries.items():
            if name in entries:
                raise ValueError(
                    f"tensor {name!r} is in {entries[name].file.name} and in {file.name}; fetch them again"
                )
            entries[name] = entry
    if (index := folder / INDEX_FILE).is_file():
        weight_map = read_index(index)["weight_map"]
        wrong = [name for name, file in weight_map.items() if name not in entries or entries[name].file.name != file]
        if wrong or len(weight_map) != len(entries):
            first = wrong[0] if wrong else next(name for name in entries if name not in weight_map)
            raise ValueError(f"{index} and the shards disagree about {first!r}; fetch them again")
    return Checkpoint(folder, headers, entries)


def open_base(source: str | Path, fingerprinted: bool) -> Checkpoint:
    """As `open_checkpoint`, of a checkpoint that is to take an adapter.

    Args:
        fingerprinted: Whether a fingerprint will tell that it is the adapter's base.

    Raises:
        ValueError: merged weights, and no fingerprint to say that the adapter was trained on them.
    """
    checkpoint = open_checkpoint(source)
    if (checkpoint.folder / MERGED_FILE).is_file() and not fingerprinted:
        raise ValueError(
            f"{checkpoint.folder} holds merged weights ({MERGED_FILE} says so): an adapter's update is a function of "
            "the kernels that it was trained on, so give the checkpoint from which this one was merged (an adapter "
            "that save_adapter wrote for merged weights is told by its fingerprint)"
        )
    return checkpoint


def locate(checkpoint: Checkpoint, adapter: ModuleAdapters) -> Places:
    """Finds an adapter's modules in a checkpoint, with or without the prefix of a model with a head.

    Raises:
        ValueError: a module that is not there, or whose weight does not have the shape that theta asks for.
    """
    modules, entries = list(adapter.thetas), checkpoint.entries
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


def _check_theta(module: str, theta: Mapping[str, np.ndarray], kernel: Kernel, config: Config) -> None:
    """Refuses a theta that is not of the kernel's shape."""
    for leaf, shape in theta_shapes(kernel, config).items():
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
