"""Flax paths and the PyTorch names of the same parameters.

HF's Flax models name their modules as the torch ones, so a dotted path is a torch module name but for two things: the
leaf (`kernel` is `weight`, stored the other way round), and an `nn.scan` stack, whose rows torch keeps as numbered
modules: `model/layers/mlp/up_proj/kernel` [L, ...] is `model.layers.0.mlp.up_proj` and so on.
"""

from collections.abc import Collection, Iterable, Mapping

import jax
import numpy as np

from peanut_jax.base.kernels import Kernel, Leaf, find, module_of
from peanut_jax.base.select import Target

# The modules that hold a model's layers in HF's naming; a scanned one must carry one of these names.
CONTAINERS = ("layers", "layer", "h", "block", "blocks")
_WEIGHTS = ("kernel", "scale", "embedding")

# Torch module name -> (kernel path, row of its stack or None).
Slots = dict[str, tuple[str, int | None]]


def modules(path: str, rows: Iterable[int] | None) -> list[str]:
    """The torch modules of a kernel: one, or one for each of `rows` of a scanned stack.

    Raises:
        NotImplementedError: a stack whose layers have no torch name.
    """
    if rows is None:
        return [module_of(path)]
    return [module_of(numbered(path, row)) for row in rows]


def slots(targets: Iterable[Target]) -> Slots:
    """Where each torch module's kernel is."""
    found: Slots = {}
    for target in targets:
        rows = rows_of(target)
        numbers: list[int] | list[None] = [None] if rows is None else rows
        names = modules(target.kernel.path, rows)
        found |= {name: (target.kernel.path, row) for name, row in zip(names, numbers, strict=True)}
    return found


def rows_of(target: Target) -> list[int] | None:
    """The rows of the stack that are adapted; None for a kernel outside nn.scan."""
    stack = target.kernel.stack
    if len(stack) > 1:
        raise NotImplementedError(
            f"kernel {target.kernel.path!r} is a stack of {stack} kernels; PyTorch's names reach one axis of layers. "
            "Keep such an adapter with orbax"
        )
    return list(target.rows if target.rows is not None else range(stack[0])) if stack else None


def numbered(path: str, row: int) -> str:
    """The path with the layer's number put in after the module that holds the layers."""
    prefix = container(path)
    if prefix is None:
        raise NotImplementedError(
            f"{path!r} is a stack of layers, and no part of its path is one of {CONTAINERS}, after which PyTorch's "
            'names carry the layer\'s number; name the nn.scan module so, as nn.scan(Layer, ...)(name="layers")'
        )
    return f"{prefix}/{row}/{path.removeprefix(prefix + '/')}"


def container(path: str) -> str | None:
    """The path up to the module that would hold scanned layers; None where no module does."""
    parts = path.split("/")
    for i, part in enumerate(parts[:-1]):
        if part in CONTAINERS and not parts[i + 1].isdecimal():
            return "/".join(parts[: i + 1])
    return None


def every_module(flat: Mapping[str, Leaf], scanned: Collection[str]) -> dict[str, str]:
    """Every torch module, containers too -> the dotted Flax module that it is, or is a layer of."""
    found = {}
    for path, leaf in flat.items():
        prefix = container(path)
        rows: list[int] | list[None] = list(range(leaf.shape[0])) if prefix in scanned else [None]
        for row in rows:
            parts = path.split("/")[:-1]
            for depth in range(1, len(parts) + 1):
                module = "/".join(parts[:depth])
                inside = module.startswith(f"{prefix}/")
                name = numbered(module, row) if inside and row is not None else module
                found[name.replace("/", ".")] = module.replace("/", ".")
    return found


def to_torch(leaves: Mapping[str, Leaf], scanned: Collection[str]) -> dict[str, np.ndarray]:
    """Flax leaves (path -> array) under their torch names and in torch's layout.

    Args:
        leaves: Whole modules: a kernel's bias tells which of its axes are outputs.
        scanned: The containers (see `container`) whose leaves carry a layer axis.
    """
    tensors = {}
    for path in leaves:
        array = np.asarray(jax.device_get(leaves[path]))
        stacked = container(path) in scanned
        kernel = _dense(path, leaves, stacked)
        names = tensor_names(path, range(len(array)) if stacked else None)
        for name, part in zip(names, array if stacked else [array], strict=True):
            tensors[name] = _to_torch(path, part, kernel)
    return tensors


def from_torch(
    tensors: Mapping[str, np.ndarray], leaves: Mapping[str, Leaf], scanned: Collection[str]
) -> dict[str, np.ndarray]:
    """The inverse of `to_torch`: `leaves` gives the paths and shapes.

    Raises:
        ValueError: a tensor that is missing, left over, or of another shape.
    """
    found, used = {}, set()
    for path, leaf in leaves.items():
        stacked = container(path) in scanned
        shape = tuple(leaf.shape)[1:] if stacked else tuple(leaf.shape)
        kernel = _dense(path, leaves, stacked)
        expected = _to_torch(path, np.empty(shape, bool), kernel).shape
        parts = []
        for name in tensor_names(path, range(leaf.shape[0]) if stacked else None):
            if name not in tensors:
                raise ValueError(f"{name!r} of the saved modules is missing")
            if tensors[name].shape != expected:
                raise ValueError(f"{name!r} is {tensors[name].shape}, and {expected} in this model")
            parts.append(_from_torch(path, tensors[name], shape, kernel))
            used.add(name)
        found[path] = np.stack(parts) if stacked else parts[0]
    if extra := sorted(tensors.keys() - used):
        raise ValueError(f"{extra[0]!r} is in no saved module of this model{_and_more(extra)}")
    return found


def tensor_names(path: str, rows: Iterable[int] | None) -> list[str]:
    """The torch tensors of a leaf, as `modules`: `a/b/kernel` is `a.b.weight`."""
    leaf = path.rpartition("/")[2]
    name = "weight" if leaf in _WEIGHTS else leaf
    return [f"{module}.{name}".removeprefix(".") for module in modules(path, rows)]


def torch_kernels(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Kernel]:
    """The dense kernels of a torch checkpoint (tensor name -> shape), by module name.

    torch's Linear is [d_out, d_in] where Flax stores [d_in, d_out], and its Conv1D [d_in, d_out] where FlaxConv1D
    stores [d_out, d_in]: a transposed torch tensor is the Flax leaf in both cases.
    """
    flat = {
        name.removesuffix("weight").replace(".", "/") + "kernel": jax.ShapeDtypeStruct(shape[::-1], np.float32)
        for name, shape in shapes.items()
        if (name == "weight" or name.endswith(".weight")) and len(shape) == 2
    }
    return {kernel.module: kernel for kernel in find(flat).values()}


def _dense(path: str, leaves: Mapping[str, Leaf], stacked: bool) -> Kernel | None:
    """What `find` says of a leaf without its layer axis: the dense kernel that it is, if it is one."""
    bias = path.removesuffix("kernel") + "bias"
    tree = {
        name: jax.ShapeDtypeStruct(tuple(leaves[name].shape)[1 if stacked else 0 :], np.float32)
        for name in (path, bias)
        if name in leaves
    }
    return find(tree).get(path)


def _and_more(names: Collection[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _to_torch(path: str, array: np.ndarray, kernel: Kernel | None) -> np.ndarray:
    if not path.endswith("kernel"):
        return array
    if kernel is not None:
        return np.ascontiguousarray(array.reshape(kernel.d_in, kernel.d_out).T)
    return np.ascontiguousarray(np.moveaxis(array, (-1, -2), (0, 1)))  # a convolution


def _from_torch(path: str, tensor: np.ndarray, shape: tuple[int, ...], kernel: Kernel | None) -> np.ndarray:
    if not path.endswith("kernel"):
        return tensor
    if kernel is not None:
        return tensor.T.reshape(shape)
    return np.moveaxis(tensor, (0, 1), (-1, -2))
